"""The autoencoder between token states and compressed latents (arXiv 2506.21170, section 3).

The compressor reads the standardised states of a frozen BERT, [B, L, D], into N latent
vectors, [B, N, D]; the decompressor turns latents back into states and token logits for all
L positions in one pass. Both are stacks of one block, in which a stream of queries attends
to itself and to a memory that no layer changes: for the compressor the queries are the
latents and the memory is the text, for the decompressor it is the other way round.

Shape letters: B batch, L text positions, N latents, D width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from cosmos_jax.models.layers import (
    Dtype,
    FeedForward,
    RMSNorm,
    attend,
    fold_in,
    linear,
    rematerialised,
    split_heads,
)


@dataclasses.dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder; `width` is that of the text encoder."""

    width: int
    num_heads: int
    num_layers: int
    num_latents: int
    max_length: int
    vocab_size: int
    dropout: float = 0.1
    position_std: float = 1.0
    remat: bool = False

    @property
    def num_positions(self) -> int:
        """Rows of the position tables, which serve the text and the latents alike."""
        return max(self.max_length, self.num_latents)


class MemoryAttention(nn.Module):
    """Queries attend to the memory and to themselves, each through its own norm and key/value
    projection; RMSNorm on the queries and keys of every head.

    Queries that are the same for all texts, [1, T, D], are projected once.
    """

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self, queries_BxTxD: jax.Array, memory_BxMxD: jax.Array, mask_BxM: jax.Array | None
    ) -> jax.Array:
        batch, width = memory_BxMxD.shape[0], queries_BxTxD.shape[-1]

        def project(x: jax.Array, name: str) -> jax.Array:
            projected = linear(width, width, dtype=self.dtype, name=name)(x)
            heads = split_heads(projected, self.num_heads)
            return jnp.broadcast_to(heads, (batch, *heads.shape[1:]))

        queries = RMSNorm(name="norm_queries")(queries_BxTxD)
        memory = RMSNorm(name="norm_memory")(memory_BxMxD)
        # Attention does not depend on the order of its keys, so one order serves both stacks.
        key = jnp.concatenate([project(memory, "memory_key"), project(queries, "key")], axis=1)
        value = jnp.concatenate(
            [project(memory, "memory_value"), project(queries, "value")], axis=1
        )
        query = RMSNorm(name="norm_query_heads")(project(queries, "query"))
        key = RMSNorm(name="norm_key_heads")(key)
        mask = None
        if mask_BxM is not None:
            mask = jnp.concatenate(
                [mask_BxM, jnp.ones((batch, queries_BxTxD.shape[1]), dtype=bool)], axis=1
            )
        return linear(width, width, dtype=self.dtype, name="out")(attend(query, key, value, mask))


class Gate(nn.Module):
    """Multiplies a residual branch of the decompressor by 1 + w m + b with learned scalars.

    m is 1 at [MASK] positions and every query of the decompressor is one, so m = 1 here; the
    two scalars are kept apart because the released checkpoints hold both.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def init(key: jax.Array) -> jax.Array:
            return jax.random.uniform(key, (), minval=-1.0, maxval=1.0)

        weight = self.param("weight", init)
        bias = self.param("bias", init)
        return x * (1 + weight + bias).astype(x.dtype)


class Block(nn.Module):
    """Attention over queries and memory, then the MLP, each added to the query stream."""

    config: AutoencoderConfig
    gated: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        queries_BxTxD: jax.Array,
        memory_BxMxD: jax.Array,
        mask_BxM: jax.Array | None,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        x = queries_BxTxD
        branch = MemoryAttention(self.config.num_heads, self.dtype, name="attention")(
            x, memory_BxMxD, mask_BxM
        )
        x = x + (Gate(name="attention_gate")(branch) if self.gated else branch)
        branch = FeedForward(self.config.dropout, self.dtype, name="mlp")(x, dropout_keys_B)
        return x + (Gate(name="mlp_gate")(branch) if self.gated else branch)


def _position_table(module: nn.Module, config: AutoencoderConfig) -> jax.Array:
    """Learned positions drawn from N(0, position_std^2), scaled by width^-0.5."""
    table = module.param(
        "positions",
        nn.initializers.normal(config.position_std),
        (config.num_positions, config.width),
    )
    return table * config.width**-0.5


class Compressor(nn.Module):
    """Standardised token states to latents."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        states_BxLxD: jax.Array,
        mask_BxL: jax.Array,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Returns latents [B, N, D]; positions with a False mask are not attended to.

        Dropout, as in training, only with a key for each text.
        """
        config = self.config
        length = states_BxLxD.shape[1]
        queries_NxD = self.param(
            "queries", nn.initializers.normal(0.02), (config.num_latents, config.width)
        )
        positions = _position_table(self, config)
        tokens_BxLxD = (states_BxLxD + positions[:length]).astype(self.dtype)
        x_BxNxD = RMSNorm(name="norm_queries")(queries_NxD).astype(self.dtype)[None]
        block = rematerialised(Block, config.remat)
        for i in range(config.num_layers):
            x_BxNxD = block(config, gated=False, dtype=self.dtype, name=f"layers_{i}")(
                x_BxNxD, tokens_BxLxD, mask_BxL, fold_in(dropout_keys_B, i)
            )
        return RMSNorm(name="norm_out")(x_BxNxD.astype(jnp.float32))


class Decompressor(nn.Module):
    """Latents to token states and token logits, all positions at once."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents_BxNxD: jax.Array,
        mask_embedding_D: jax.Array,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the predicted standardised states [B, L, D] and the logits [B, L, V], fp32.

        `mask_embedding_D` is the word embedding of [MASK] in the frozen text encoder, from
        which every query starts. Dropout, as in training, only with a key for each text.
        """
        config = self.config
        batch = latents_BxNxD.shape[0]
        positions = _position_table(self, config)
        memory_BxNxD = (latents_BxNxD + positions[: config.num_latents]).astype(self.dtype)
        # All positions start alike, so one row does, unless dropout treats each of them apart.
        alike = dropout_keys_B is None or not config.dropout
        rows = (1, 1) if alike else (batch, config.max_length)
        start = FeedForward(config.dropout, self.dtype, name="mask_mlp")(
            jnp.broadcast_to(mask_embedding_D, (*rows, config.width)),
            fold_in(dropout_keys_B, config.num_layers),
        )
        start = Gate(name="mask_gate")(start) + positions[: config.max_length]
        x_BxLxD = start.astype(self.dtype)
        block = rematerialised(Block, config.remat)
        for i in range(config.num_layers):
            x_BxLxD = block(config, gated=True, dtype=self.dtype, name=f"layers_{i}")(
                x_BxLxD, memory_BxNxD, None, fold_in(dropout_keys_B, i)
            )
        logits_BxLxV = linear(config.vocab_size, config.width, dtype=self.dtype, name="head")(
            x_BxLxD
        )
        return x_BxLxD.astype(jnp.float32), logits_BxLxV.astype(jnp.float32)
