"""Texts changed in latent space: pure functions of weights and keys, to be compiled."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax import guides
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.sampling import Start, make_sampler
from cosmos_jax.stages.base import Source

# Where infilling begins, as a strength, and what counts as the deviation of its last estimate.
INFILL_STRENGTH, LAST_SIGMA = 0.9, 0.3


def encode(
    model: Cosmos,
    weights: Weights,
    ids_BxL: jax.Array,
    mask_BxL: jax.Array,
    visible_BxL: jax.Array | None = None,
) -> jax.Array:
    """Standardised latents [B, N, D] of texts; with `visible`, from these of their tokens."""
    states_BxLxD = model.text_states(weights, ids_BxL, mask_BxL)
    visible_BxL = mask_BxL if visible_BxL is None else visible_BxL
    return model.standardise(weights, model.compress(weights, states_BxLxD, visible_BxL))


def decode(model: Cosmos, weights: Weights, x_0_BxNxD: jax.Array) -> jax.Array:
    """Token ids [B, L] of standardised latents."""
    return model.decode(weights, model.unstandardise(weights, x_0_BxNxD))


def interpolate(
    x_0_NxD: jax.typing.ArrayLike, other_NxD: jax.typing.ArrayLike, num: int
) -> jax.Array:
    """(1 - w) x_0 + w other for `num` values of w from 0 to 1, [num, N, D]."""
    w = jnp.linspace(0, 1, num)[:, None, None]
    return (1 - w) * jnp.asarray(x_0_NxD) + w * jnp.asarray(other_NxD)


def make_editor(config: ConfigDict, model: Cosmos) -> Callable[..., jax.Array]:
    """(weights, keys [B], latents [B, N, D], strength, source) -> latents [B, N, D].

    Latents are noised as far as the strength says, from 0 to 1, and denoised again: near 0 they
    come back, at 1 nothing of them is left.
    """
    draw = make_sampler(config, model)

    def edit(
        weights: Weights,
        keys_B: jax.Array,
        x_0_BxNxD: jax.Array,
        strength: jax.Array | float,
        source: Source | None = None,
    ) -> jax.Array:
        return draw(weights, keys_B, source, start=Start(x_0_BxNxD, strength))

    return edit


def make_infiller(config: ConfigDict, model: Cosmos) -> Callable[..., jax.Array]:
    """(weights, keys [B], ids [B, L], mask [B, L], given [B, L], source) -> token ids [B, L].

    `ids` have [MASK] where `given` is False; what comes back has other tokens there and, as far
    as the latent space allows, the given ones in their places. Sampling begins near the latents
    that the encoder finds for the masked text, and each estimate is held to the given tokens.
    """
    draw = make_sampler(config, model)

    def infill(
        weights: Weights,
        keys_B: jax.Array,
        ids_BxL: jax.Array,
        mask_BxL: jax.Array,
        given_BxL: jax.Array,
        source: Source | None = None,
    ) -> jax.Array:
        # The compressor has learned to do without tokens that it is not shown.
        x_0 = encode(model, weights, ids_BxL, mask_BxL, given_BxL)
        hold = guides.holding(model, weights, ids_BxL, given_BxL)
        last = guides.holding(model, weights, ids_BxL, given_BxL, guides.LAST_STEPS)
        x_0 = draw(weights, keys_B, source, start=Start(x_0, INFILL_STRENGTH), refine=hold)
        return decode(model, weights, last(x_0, jnp.float32(LAST_SIGMA)))

    return infill
