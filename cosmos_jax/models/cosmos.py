"""The whole model as pure functions of one dictionary of weights.

`Cosmos` holds modules, which carry no arrays; every method takes the `weights` it needs:

    bert, mask_embedding [D]             the frozen text encoder
    states_mean, states_std [D]          standardise its states
    compressor, decompressor             the autoencoder
    vocabulary [V]                       token id of each row of the decompressor's head
    head_index [encoder's vocabulary]    the inverse; tokens without a row have that of [UNK]
    latents_mean, latents_std [N, D]     standardise the latents
    denoiser, condition_encoder          the diffusion transformer
    no_source_states [S, D], no_source_mask [S]   the empty source, standardised

Shape letters: B batch, L text positions, S source positions, N latents, D width, V head rows.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cosmos_jax.models.autoencoder import AutoencoderConfig, Compressor, Decompressor
from cosmos_jax.models.bert import Bert
from cosmos_jax.models.denoiser import (
    IN_FP32,
    Condition,
    ConditionEncoder,
    Denoiser,
    DenoiserConfig,
    keys_and_values,
)
from cosmos_jax.models.layers import MANY_POSITIONS, in_parts, most_likely
from cosmos_jax.models.states import Weights, apply, make_bert, text_states
from cosmos_jax.models.token_decoder import IdentityCompressor, TokenDecoder
from cosmos_jax.sharding import split_batch

# Variances of states and latents are at least this, so that a dead feature is not blown up.
MIN_VARIANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class Cosmos:
    """The modules of one configuration."""

    bert: Bert
    compressor: Compressor | IdentityCompressor
    decompressor: Decompressor | TokenDecoder
    denoiser: Denoiser
    condition_encoder: ConditionEncoder

    @property
    def conditional(self) -> bool:
        return self.denoiser.config.conditional

    def text_states(self, weights: Weights, ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        """Standardised states of the frozen encoder, [B, L, D] fp32."""
        return text_states(self.bert, weights, ids_BxL, mask_BxL)

    def compress(
        self,
        weights: Weights,
        states_BxLxD: jax.Array,
        mask_BxL: jax.Array,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Latents, [B, N, D] fp32, as the decompressor reads them; dropout only with keys."""
        params = weights.get("compressor", {})  # without compression there are none
        return apply(self.compressor, params, states_BxLxD, mask_BxL, dropout_keys_B)

    def decompress(
        self, weights: Weights, latents_BxNxD: jax.Array, dropout_keys_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """Predicted standardised states [B, L, D] and logits over head rows [B, L, V]."""
        return apply(
            self.decompressor,
            weights["decompressor"],
            latents_BxNxD,
            weights["mask_embedding"],
            dropout_keys_B,
        )

    def decode(self, weights: Weights, latents_BxNxD: jax.Array) -> jax.Array:
        """Most likely token ids at all L positions, [B, L] int32; the text ends at [SEP]."""
        decode = functools.partial(self.decode_at_once, weights)
        # On a CPU the logits of many texts at once take as long to put into memory as to compute.
        size = -(-MANY_POSITIONS // self.decompressor.config.max_length)
        return jax.lax.platform_dependent(
            latents_BxNxD, cpu=functools.partial(in_parts, decode, size=size), default=decode
        )

    def decode_at_once(self, weights: Weights, latents_BxNxD: jax.Array) -> jax.Array:
        """`decode`, whatever memory that takes."""
        # With the decompressor's own head; its logits, not asked for, are not computed.
        states_BxLxD, _ = self.decompress(weights, latents_BxNxD)
        head_DxV, dtype = weights["decompressor"]["head"]["kernel"], self.decompressor.dtype
        rows_BxL = most_likely(states_BxLxD.astype(dtype), head_DxV.astype(dtype))
        return weights["vocabulary"][rows_BxL]

    def standardise(self, weights: Weights, latents_BxNxD: jax.Array) -> jax.Array:
        """Latents as the diffusion sees them."""
        return (latents_BxNxD - weights["latents_mean"]) / weights["latents_std"]

    def unstandardise(self, weights: Weights, x_0_BxNxD: jax.Array) -> jax.Array:
        return x_0_BxNxD * weights["latents_std"] + weights["latents_mean"]

    def encode_condition(
        self, weights: Weights, source_states_BxSxD: jax.Array, source_mask_BxS: jax.Array
    ) -> jax.Array:
        """What the denoiser attends to, [B, S, D] fp32."""
        params = weights["condition_encoder"]
        return apply(self.condition_encoder, params, source_states_BxSxD, source_mask_BxS)

    def read_condition(self, weights: Weights, condition_BxSxD: jax.Array) -> Condition:
        """The condition in the form that costs nothing more in each step; see there."""
        read = keys_and_values(self.denoiser, weights["denoiser"], condition_BxSxD)
        return jax.tree.map(split_batch, read)

    def for_sampling(self, weights: Weights) -> Weights:
        """The weights with the denoiser's in the type of its products, converted once.

        What multiplies in fp32, such as the gains of norms, is left alone.
        """

        def convert(path: tuple, x: jax.Array) -> jax.Array:
            in_fp32 = any(part.key in IN_FP32 for part in path)
            return x if in_fp32 else x.astype(self.denoiser.dtype)

        denoiser = jax.tree_util.tree_map_with_path(convert, weights["denoiser"])
        return {**weights, "denoiser": denoiser}

    def at_pointer_temperature(self, temperature: float) -> "Cosmos":
        """The model with another temperature of its pointer, if it has one."""
        config = dataclasses.replace(self.denoiser.config, pointer_temperature=temperature)
        return dataclasses.replace(self, denoiser=dataclasses.replace(self.denoiser, config=config))

    def denoise(self, weights: Weights, *inputs: Any) -> jax.Array:
        """`Denoiser.__call__`."""
        return apply(self.denoiser, weights["denoiser"], *inputs)

    def point(self, weights: Weights, *inputs: Any) -> jax.Array:
        """Where in the source the denoiser's pointer points, logarithms [B, S] fp32."""
        return apply(self.denoiser, weights["denoiser"], *inputs, method="point")


def build(config: ConfigDict, vocabulary_size: int) -> Cosmos:
    """The modules for a configuration; `vocabulary_size` is the number of rows of the head."""
    dtype = jnp.dtype(config.dtype)
    encoder = config.encoder
    autoencoder = AutoencoderConfig(
        width=encoder.hidden_size,
        num_heads=config.autoencoder.num_heads,
        num_layers=config.autoencoder.num_layers,
        num_latents=config.autoencoder.num_latents,
        max_length=config.data.max_length,
        vocab_size=vocabulary_size,
        dropout=config.autoencoder.dropout,
        position_std=config.autoencoder.position_std,
        remat=config.autoencoder.remat,
    )
    denoiser = DenoiserConfig(
        width=encoder.hidden_size,
        num_heads=config.diffusion.num_heads,
        num_layers=config.diffusion.num_layers,
        condition_layers=config.diffusion.condition_layers,
        max_source_length=config.data.max_source_length if config.data.conditional else 0,
        latent_positions=config.diffusion.latent_positions,
        time_gains=config.diffusion.time_gains,
        pointer_length=config.data.max_length if config.diffusion.pointer else 0,
        remat=config.diffusion.remat,
    )
    compress = config.autoencoder.compress
    decompressor = dataclasses.replace(
        autoencoder,
        num_layers=config.autoencoder.decompressor_layers or config.autoencoder.num_layers,
    )
    return Cosmos(
        make_bert(config),
        Compressor(autoencoder, dtype) if compress else IdentityCompressor(),
        Decompressor(decompressor, dtype) if compress else TokenDecoder(decompressor, dtype),
        Denoiser(denoiser, dtype),
        ConditionEncoder(denoiser, dtype),
    )


def inverse_vocabulary(vocabulary_V: np.ndarray, encoder_size: int, unknown: int) -> np.ndarray:
    """`head_index` of a `vocabulary`: row of each token id, that of `unknown` if it has none."""
    index = np.full(encoder_size, np.flatnonzero(vocabulary_V == unknown)[0], np.int32)
    index[vocabulary_V] = np.arange(len(vocabulary_V), dtype=np.int32)
    return index
