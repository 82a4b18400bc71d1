"""What may change each estimate of the clean latents while sampling.

Given x_t, the clean latents are taken to be distributed as

    (1) N(x_0, sigma_t^2 I)

around the denoiser's estimate x_0. A function g of them that is to be large tilts this by
exp(w g), which moves its mean, to first order, by

    (2) w sigma_t^2 grad g(x_0)

and never by more than the deviation of (1) in the root mean square, so that no weight leads out
of where the denoiser knows its way. Tokens y at given positions are held by going up

    (3) sum over given positions of log p(y | x) - |x - x_0|^2 / (2 sigma_t^2)

some steps of Adam from x = x_0, the last time for longer; the gradient goes through the
decompressor and not through the denoiser, which is as in MPGD (arXiv 2311.16424).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.sampling import Refine

Guide = Callable[[jax.Array, jax.Array], jax.Array]
"""(standardised latents [B, N, D], log-probabilities of the head's rows [B, L, V]) -> [B]: what is
to be large, text by text. What it does not look at is not computed."""

# Of (3): steps of Adam for each estimate and for the last one, and their length in deviations.
STEPS, LAST_STEPS, RATE = 5, 40, 0.1


def log_probabilities(model: Cosmos, weights: Weights, x_0_BxNxD: jax.Array) -> jax.Array:
    """Of the head's rows at each position, [B, L, V] fp32, from standardised latents."""
    _, logits = model.decompress(weights, model.unstandardise(weights, x_0_BxNxD))
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def guided(model: Cosmos, weights: Weights, guide: Guide, weight: jax.Array | float) -> Refine:
    """Equation (2)."""

    def total(x_0: jax.Array) -> jax.Array:
        return jnp.sum(guide(x_0, log_probabilities(model, weights, x_0)))

    def refine(x_0: jax.Array, sigma: jax.Array) -> jax.Array:
        move = weight * sigma**2 * jax.grad(total)(x_0)
        size = jnp.sqrt(jnp.mean(move**2, axis=(1, 2), keepdims=True))
        return x_0 + move * jnp.minimum(1.0, sigma / jnp.maximum(size, 1e-12))

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
    optimizer = optax.adam(RATE, b1=0.8, b2=0.9)

    def refine(x_0: jax.Array, sigma: jax.Array) -> jax.Array:
        def loss(x: jax.Array) -> jax.Array:
            log_probs = jnp.take_along_axis(
                log_probabilities(model, weights, x), rows_BxLx1, axis=2
            )[..., 0]
            distance = jnp.sum((x - x_0) ** 2) / (2 * sigma**2)
            return distance - jnp.sum(jnp.where(given_BxL, log_probs, 0.0))

        def step(carry: tuple, _: None) -> tuple:
            x, state = carry
            # Adam's steps are as long as its rate, whatever the scale of the gradient.
            update, state = optimizer.update(sigma * jax.grad(loss)(x), state)
            return (x + sigma * update, state), None

        (x, _), _ = jax.lax.scan(step, (x_0, optimizer.init(x_0)), None, steps)
        return x

    return refine
