"""The noising process and what follows from an estimate of the clean latents.

    (1) x_t   = alpha_t x_0 + sigma_t eps,  eps ~ N(0, I)
    (2) eps   = (x_t - alpha_t x_0) / sigma_t
    (3) score = grad log p(x_t | x_0) = -eps / sigma_t = (alpha_t x_0 - x_t) / sigma_t^2

Arrays are [B, ...]; t is a scalar or [B].
"""

import jax
import jax.numpy as jnp

from cosmos_jax.diffusion.schedule import Schedule


def add_noise(schedule: Schedule, x_0: jax.Array, t: jax.Array, eps: jax.Array) -> jax.Array:
    """Equation (1)."""
    t = _expand(t, x_0)
    return schedule.alpha(t) * x_0 + schedule.sigma(t) * eps


def noise_estimate(schedule: Schedule, x_t: jax.Array, t: jax.Array, x_0: jax.Array) -> jax.Array:
    """Equation (2)."""
    t = _expand(t, x_t)
    return (x_t - schedule.alpha(t) * x_0) / schedule.sigma(t)


def score(schedule: Schedule, x_t: jax.Array, t: jax.Array, x_0: jax.Array) -> jax.Array:
    """Equation (3)."""
    return -noise_estimate(schedule, x_t, t, x_0) / schedule.sigma(_expand(t, x_t))


def _expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """Appends axes to t until it broadcasts over x [B, ...]."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
