"""Noise schedules: how much signal and noise there is at time t in [0, 1], 0 being clean.

A schedule is variance preserving, alpha_t^2 + sigma_t^2 = 1. With u = tan(pi t / 2):

    (1) alpha_t = 1 / sqrt(1 + d^2 u^2)
    (2) sigma_t = sqrt(1 - alpha_t^2)
    (3) beta_t  = -2 d/dt log alpha_t = pi d^2 u (1 + u^2) / (1 + d^2 u^2)
    (4) lambda_t = log(alpha_t / sigma_t) = -log(d u), half the log of the signal-to-noise ratio

beta is unbounded as t -> 1; the authors' code clips t to 0.95 inside beta alone, and so
does this one. In fp32 alpha_1 is about 1e-8, never exactly 0, and sigma_t is 0 for
t < 1e-5 or so; samplers stop long before. lambda is taken from the angle itself, so its ends
are what they are: infinite.
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

    def half_log_snr(self, t: jax.Array) -> jax.Array: ...

    def time(self, half_log_snr: jax.Array) -> jax.Array: ...


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

    def half_log_snr(self, t: jax.Array) -> jax.Array:
        """Equation (4): from infinity at t = 0 down to minus infinity at t = 1, both exact."""
        t = jnp.asarray(t, jnp.float32)
        # The cosine of pi t / 2, which fp32 would not let be 0 at t = 1.
        cos, sin = jnp.sin((1 - t) * (math.pi / 2)), jnp.sin(t * (math.pi / 2))
        return jnp.log(cos) - jnp.log(sin) - math.log(self.d)

    def time(self, half_log_snr: jax.Array) -> jax.Array:
        """The t of a lambda, the inverse of equation (4)."""
        half_log_snr = jnp.asarray(half_log_snr, jnp.float32)
        return jnp.arctan(jnp.exp(-half_log_snr) / self.d) * (2 / math.pi)


def _tan(t: jax.Array) -> jax.Array:
    return jnp.tan(jnp.asarray(t, jnp.float32) * (math.pi / 2))
