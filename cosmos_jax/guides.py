"""What may change each estimate of the clean latents while sampling.

Given x_t, the clean latents are taken to be distributed as

    (1) N(x_0, sigma_t^2 I)

around the denoiser's estimate x_0. A function g of them that is to be large tilts this by
exp(w g), which moves its mean, to first order, by

    (2) w sigma_t^2 grad g(x_0)

Tokens y at given positions are held by Polyak's steps, each the shortest way to where
f(x) = -sum over given positions of log p(y | x) would be 0, were f a plane:

    (3) x - f(x) grad f(x) / |grad f(x)|^2

No move is larger than the deviation of (1) in the root mean square, so that none leads out of
where the denoiser knows its way. Gradients go through the decompressor and not through the
denoiser, as in MPGD (arXiv 2311.16424).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.sampling import Refine

Guide = Callable[[jax.Array, jax.Array], jax.Array]
"""(standardised latents [B, N, D], log-probabilities of the head's rows [B, L, V]) -> [B]: what is
to be large, text by text. What it does not look at is not computed."""

# How often (3) is done for each estimate, and for the last one.
STEPS, LAST_STEPS = 3, 20
TINY = 1e-12


def log_probabilities(model: Cosmos, weights: Weights, x_0_BxNxD: jax.Array) -> jax.Array:
    """Of the head's rows at each position, [B, L, V] fp32, from standardised latents."""
    _, logits = model.decompress(weights, model.unstandardise(weights, x_0_BxNxD))
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def guided(model: Cosmos, weights: Weights, guide: Guide, weight: jax.Array | float) -> Refine:
    """Equation (2)."""

    def total(x_0: jax.Array) -> jax.Array:
        return jnp.sum(guide(x_0, log_probabilities(model, weights, x_0)))

    def refine(x_0: jax.Array, sigma: jax.Array) -> jax.Array:
        return x_0 + _at_most(sigma, weight * sigma**2 * jax.grad(total)(x_0))

    return refine


def holding(
    model: Cosmos,
    weights: Weights,
    ids_BxL: jax.Array,
    given_BxL: jax.Array,
    steps: int = STEPS,
) -> Refine:
    """Equation (3): estimates whose decoded tokens are `ids_BxL` where `given_BxL` says so."""
    rows_BxLx1 = weights["head_index"][ids_BxL][..., None]

    def shortfall(x: jax.Array) -> jax.Array:
        log_probs = log_probabilities(model, weights, x)
        of_ids_BxL = jnp.take_along_axis(log_probs, rows_BxLx1, axis=2)[..., 0]
        return -jnp.sum(jnp.where(given_BxL, of_ids_BxL, 0.0), axis=1)

    def refine(x_0: jax.Array, sigma: jax.Array) -> jax.Array:
        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            f_B, pull_back = jax.vjp(shortfall, x)
            (gradient,) = pull_back(jnp.ones_like(f_B))
            steepness_B = jnp.maximum(jnp.sum(gradient**2, axis=(1, 2)), TINY)
            return x - _at_most(sigma, (f_B / steepness_B)[:, None, None] * gradient), None

        return jax.lax.scan(step, x_0, None, steps)[0]

    return refine


def _at_most(sigma: jax.Array, move_BxNxD: jax.Array) -> jax.Array:
    """The move of each text, shortened where its root mean square is above sigma."""
    size = jnp.sqrt(jnp.mean(move_BxNxD**2, axis=(1, 2), keepdims=True))
    return move_BxNxD * jnp.minimum(1.0, sigma / jnp.maximum(size, TINY))
