"""The noising process and what follows from an estimate of the clean latents.

    (1) x_t   = alpha_t x_0 + sigma_t eps,  eps ~ N(0, I)
    (2) eps   = (x_t - alpha_t x_0) / sigma_t
    (3) score = grad log p(x_t | x_0) = -eps / sigma_t = (alpha_t x_0 - x_t) / sigma_t^2

Self-conditioned estimates grow over many steps. Two ways to keep them at the scale of clean
latents, which are standardised, each for a text x_0 [N, D] by itself:

    (4) threshold    clip(x_0, -s, s) a / s,  s = max(a, q-quantile of |x_0|)
    (5) standardise  x_0 / max(1, rms),  rms^2 = mean over latents and features of x_0^2

(4) is the dynamic thresholding of Imagen (arXiv 2205.11487) with the q-quantile a of |N(0, 1)| in
the place of 1, the bound of pixels. (5) holds the law of total variance: x_0 is at best
E[X_0 | x_t], and E|X_0|^2 = E|E[X_0 | x_t]|^2 + E|X_0 - E[X_0 | x_t]|^2, so its mean square is at
most that of clean latents, 1. It may be less, near t = 1 it is nearly 0, so x_0 is never made
larger, and no mean is taken away, as that of a text is its own.

Arrays are [B, ...]; t is a scalar or [B].
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cosmos_jax.diffusion.schedule import Schedule

# q and a of equation (4).
QUANTILE = 0.995
QUANTILE_OF_CLEAN = 2.807034


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


def threshold(x_0_BxNxD: jax.Array) -> jax.Array:
    """Equation (4)."""
    quantile = jnp.quantile(jnp.abs(x_0_BxNxD), QUANTILE, axis=(1, 2), keepdims=True)
    bound = jnp.maximum(QUANTILE_OF_CLEAN, quantile)
    return jnp.clip(x_0_BxNxD, -bound, bound) * (QUANTILE_OF_CLEAN / bound)


def standardise(x_0_BxNxD: jax.Array) -> jax.Array:
    """Equation (5)."""
    mean_square = jnp.mean(x_0_BxNxD**2, axis=(1, 2), keepdims=True)
    return x_0_BxNxD / jnp.sqrt(jnp.maximum(1.0, mean_square))


RESCALE: dict[str, Callable[[jax.Array], jax.Array]] = {
    "none": lambda x_0: x_0,
    "threshold": threshold,
    "standardise": standardise,
}


def _expand(t: jax.Array, x: jax.Array) -> jax.Array:
    """Appends axes to t until it broadcasts over x [B, ...]."""
    t = jnp.asarray(t)
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim)) if t.ndim else t
