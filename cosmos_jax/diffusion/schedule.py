"""Noise schedules: how much signal and noise there is at time t in [0, 1], 0 being clean.

A schedule is variance preserving, alpha_t^2 + sigma_t^2 = 1. With u = tan(pi t / 2):

    (1) alpha_t = 1 / sqrt(1 + d^2 u^2)
    (2) sigma_t = sqrt(1 - alpha_t^2)
    (3) beta_t  = -2 d/dt log alpha_t = pi d^2 u (1 + u^2) / (1 + d^2 u^2)

beta is unbounded as t -> 1; the authors' code clips t to 0.95 inside beta alone, and so
does this one. In fp32 alpha_1 is about 1e-8, never exactly 0, and sigma_t is 0 for
t < 1e-5 or so; samplers stop long before.
"""

import dataclasses
import math
from typing import Protocol

import jax
import jax.numpy as jnp

BETA_MAX_TIME = 0.95


class Schedule(Protocol):
    """What the process and the samplers ask of a schedule; shapes follow `t`, fp32."""

    def alpha(self, t: jax.Array) -> jax.Array: ...

    def sigma(self, t: jax.Array) -> jax.Array: ...

    def beta(self, t: jax.Array) -> jax.Array: ...


@dataclasses.dataclass(frozen=True)
class TanSchedule:
    """The tan-d schedule (arXiv 2506.21170, section 4): a larger d puts more noise in."""

    d: float

    def alpha(self, t: jax.Array) -> jax.Array:
        """Equation (1)."""
        return 1 / jnp.sqrt(1 + (self.d * _tan(t)) ** 2)

    def sigma(self, t: jax.Array) -> jax.Array:
        """Equation (2)."""
        return jnp.sqrt(1 - self.alpha(t) ** 2)

    def beta(self, t: jax.Array) -> jax.Array:
        """Equation (3), with t clipped to BETA_MAX_TIME."""
        u = _tan(jnp.minimum(t, BETA_MAX_TIME))
        return math.pi * self.d**2 * u * (1 + u**2) / (1 + self.d**2 * u**2)


def _tan(t: jax.Array) -> jax.Array:
    return jnp.tan(jnp.asarray(t, jnp.float32) * (math.pi / 2))
