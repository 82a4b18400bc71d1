"""Stage one: compress the states of a frozen BERT and recover states and tokens from them.

    (1) L = CE(tokens, logits) + w MSE(h, h_hat),  means over non-pad tokens

against clean standardised states h (arXiv 2506.21170, section 3). What the compressor sees
is perturbed, so that texts that are close lie close in the latent space:

    (2) token masking      a share of the tokens is hidden from the compressor's attention
    (3) activation noise   h' = delta h + sqrt(1 - delta^2) eps
    (4) latent dropout     each element of z is 0 with probability p, without rescaling

(2) and (3) meet a text with probabilities `masked_share` and `noised_share`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.models.layers import is_greatest
from cosmos_jax.stages.base import Batch, Frozen, Params, Stage, Sums, row_keys


def make(
    config: ConfigDict, model: Cosmos, frozen: Frozen, statistics: dict[str, np.ndarray], data: str
) -> Stage:
    """The stage; `frozen` holds bert, mask_embedding and the `statistics`.

    With a head_kernel [D, V] in it, the head starts from that.
    """
    settings = config.autoencoder
    length, width = config.data.max_length, config.encoder.hidden_size

    def init(key: jax.Array, frozen: Frozen) -> Params:
        compressor_key, decompressor_key = jax.random.split(key)
        states = jnp.zeros((1, length, width))
        latents = jnp.zeros((1, settings.num_latents, width))
        mask = jnp.ones((1, length), bool)
        compressor = model.compressor.init(compressor_key, states, mask)
        decompressor = model.decompressor.init(decompressor_key, latents, jnp.zeros(width))[
            "params"
        ]
        if "head_kernel" in frozen:
            decompressor = {**decompressor, "head": {"kernel": frozen["head_kernel"]}}
        params = {"decompressor": decompressor}
        # Without compression there is no compressor to train.
        return {"compressor": compressor["params"], **params} if compressor else params

    def features(frozen: Frozen, tokens: Batch) -> Batch:
        if "states" in tokens:
            return tokens
        states = model.text_states(frozen, tokens["ids"], tokens["mask"])
        return {**tokens, "states": states}

    def losses(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        keys_B = row_keys(key, batch["rows"])
        perturb_keys, compressor_keys, decompressor_keys = jnp.unstack(
            jax.vmap(lambda key: jax.random.split(key, 3))(keys_B), axis=1
        )
        states, visible, keep_latents = perturb(
            settings, batch["states"], batch["mask"], perturb_keys, (settings.num_latents, width)
        )
        weights = {**frozen, **params}
        latents = model.compress(weights, states, visible, compressor_keys)
        predicted, logits = model.decompress(weights, latents * keep_latents, decompressor_keys)
        return _sums(frozen, batch, predicted, logits, settings.alignment_weight)

    def validation(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        del key  # nothing is perturbed
        weights = {**frozen, **params}
        latents = model.compress(weights, batch["states"], batch["mask"])
        predicted, logits = model.decompress(weights, latents)
        return _sums(frozen, batch, predicted, logits, settings.alignment_weight)

    return Stage(
        name="autoencoder",
        settings=settings,
        init=init,
        features=features,
        losses=losses,
        validation=validation,
        frozen=frozen,
        statistics=statistics,
        provenance={"data": data},
    )


def perturb(
    settings: ConfigDict,
    states_BxLxD: jax.Array,
    mask_BxL: jax.Array,
    keys_B: jax.Array,
    latent_shape: tuple[int, int],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Equations (2), (3) and (4), text by text.

    Returns the states for the compressor [B, L, D], the mask of the tokens it may attend to
    [B, L], and what to multiply the latents with [B, N, D].
    """
    delta = settings.activation_noise_delta

    def one_text(states_LxD, mask_L, key):
        keys = jax.random.split(key, 5)
        masked = jax.random.bernoulli(keys[0], settings.masked_share)
        hidden_L = masked & jax.random.bernoulli(keys[1], settings.token_mask_rate, mask_L.shape)
        noised = jax.random.bernoulli(keys[2], settings.noised_share)
        noise_LxD = jax.random.normal(keys[3], states_LxD.shape, states_LxD.dtype)
        mixed_LxD = delta * states_LxD + (1 - delta**2) ** 0.5 * noise_LxD
        states_LxD = jnp.where(noised, mixed_LxD, states_LxD)
        if settings.zero_masked_states:
            states_LxD = jnp.where(hidden_L[:, None], 0, states_LxD)
        keep_NxD = ~jax.random.bernoulli(keys[4], settings.latent_dropout, latent_shape)
        return states_LxD, mask_L & ~hidden_L, keep_NxD

    return jax.vmap(one_text)(states_BxLxD.astype(jnp.float32), mask_BxL, keys_B)


def _sums(
    frozen: Frozen, batch: Batch, predicted: jax.Array, logits: jax.Array, alignment_weight: float
) -> Sums:
    """Equation (1), its parts and how many tokens and whole texts come back right."""
    mask_BxL = batch["mask"]
    if "real" in batch:
        mask_BxL = mask_BxL & batch["real"][:, None]
    targets_BxL = frozen["head_index"][batch["ids"]]
    states = batch["states"].astype(jnp.float32)
    crossentropy = optax.softmax_cross_entropy_with_integer_labels(logits, targets_BxL)
    squared_error = jnp.mean((predicted - states) ** 2, axis=-1)
    # A token the head cannot say counts as wrong, though the loss has it as [UNK].
    sayable_BxL = frozen["vocabulary"][targets_BxL] == batch["ids"]
    right_BxL = is_greatest(logits, targets_BxL) & sayable_BxL
    num_tokens = jnp.sum(mask_BxL, dtype=jnp.float32)

    def mean_over_tokens(values_BxL: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.sum(jnp.where(mask_BxL, values_BxL, 0.0)), num_tokens

    exact_B = jnp.all(right_BxL | ~mask_BxL, axis=1) & jnp.any(mask_BxL, axis=1)
    return {
        "loss": mean_over_tokens(crossentropy + alignment_weight * squared_error),
        "crossentropy": mean_over_tokens(crossentropy),
        "alignment": mean_over_tokens(squared_error),
        "token_accuracy": mean_over_tokens(right_BxL.astype(jnp.float32)),
        "exact_match": (
            jnp.sum(exact_B, dtype=jnp.float32),
            jnp.sum(jnp.any(mask_BxL, axis=1), dtype=jnp.float32),
        ),
    }
