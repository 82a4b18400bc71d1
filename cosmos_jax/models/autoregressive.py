"""The autoregressive baseline: a GPT-2 that reads the source, where there is one, by
cross-attention to the frozen encoder's states.

Tokens are rows of the head, which is the table of word embeddings. Residual stream, norms and
softmax are fp32; embeddings and matrix products are in `dtype`.

Shape letters: B batch, T positions of a text, W beams of a text, L places of a cache, S source
positions, H heads, K width of a head, D width, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax.models.bert import Bert
from cosmos_jax.models.layers import (
    NORM_EPS,
    Dtype,
    dropout,
    fold_in,
    rematerialised,
    split_heads,
)
from cosmos_jax.models.states import Weights, apply, make_bert, text_states

INIT_STD = 0.02

KeysValues = tuple[jax.Array, jax.Array]
"""Keys and values of a layer, each [B, H, positions, K]: a step of decoding reads them head by
head."""
Source = tuple[tuple[KeysValues, ...], jax.Array]
"""Keys and values of the source for every layer, and its mask [B, S]."""


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder."""

    width: int
    num_heads: int
    num_layers: int
    max_length: int
    vocab_size: int
    conditional: bool = False
    dropout: float = 0.1
    remat: bool = False


def _layer_norm() -> nn.LayerNorm:
    # The fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
    return nn.LayerNorm(epsilon=NORM_EPS, dtype=jnp.float32, use_fast_variance=False)


def _attend(
    query_BxHxTxK: jax.Array, key_BxHxSxK: jax.Array, value_BxHxSxK: jax.Array, mask: jax.Array
) -> jax.Array:
    """Softmax attention of few queries that leaves the keys where they are, [B, T, H*K].

    False in `mask` hides a key.
    """
    scores = jnp.einsum(
        "bhtk,bhsk->bhts", query_BxHxTxK, key_BxHxSxK, preferred_element_type=jnp.float32
    )
    scores = jnp.where(mask, scores * query_BxHxTxK.shape[-1] ** -0.5, -jnp.inf)
    shares = jax.nn.softmax(scores, axis=-1).astype(value_BxHxSxK.dtype)
    out_BxHxTxK = jnp.einsum("bhts,bhsk->bhtk", shares, value_BxHxSxK)
    return out_BxHxTxK.swapaxes(1, 2).reshape(*out_BxHxTxK.shape[::2], -1)


class Block(nn.Module):
    """Self-attention, cross-attention if there is a source, and MLP, each after a LayerNorm."""

    config: DecoderConfig
    dtype: Dtype

    def setup(self) -> None:
        config, width = self.config, self.config.width

        def dense(features: int, std: float = INIT_STD) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=nn.initializers.normal(std))

        residual_std = INIT_STD * (2 * config.num_layers) ** -0.5
        self.attention_norm = _layer_norm()
        # Heads are outermost in the features, so that a split over devices is one of heads.
        self.query_key_value = dense(3 * width)
        self.attention_out = dense(width, residual_std)
        if config.conditional:
            self.cross_norm = _layer_norm()
            self.cross_query = dense(width)
            self.cross_key_value = dense(2 * width)
            self.cross_out = dense(width, residual_std)
        self.mlp_norm = _layer_norm()
        self.up = dense(4 * width)
        self.down = dense(width, residual_std)

    def __call__(
        self,
        x_BxTxD: jax.Array,
        source_BxSxD: jax.Array | None = None,
        source_mask_BxS: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """All positions of a text at once, each of which sees those before it."""
        rate = self.config.dropout
        x = x_BxTxD
        query, key, value = self._self_projections(x)
        mixed = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        out = self.attention_out(mixed.reshape(x.shape))
        x = x + dropout(out, rate, fold_in(dropout_keys_B, 0))
        if source_BxSxD is not None:
            query = split_heads(self.cross_query(self.cross_norm(x)), self.config.num_heads)
            key, value = self._source_projections(source_BxSxD)
            mask = None if source_mask_BxS is None else source_mask_BxS[:, None, None]
            mixed = jax.nn.dot_product_attention(query, key, value, mask=mask)
            out = self.cross_out(mixed.reshape(x.shape))
            x = x + dropout(out, rate, fold_in(dropout_keys_B, 1))
        return x + dropout(self._mlp(x), rate, fold_in(dropout_keys_B, 2))

    def read_source(self, source_BxSxD: jax.Array) -> KeysValues:
        key, value = self._source_projections(source_BxSxD)
        return key.swapaxes(1, 2), value.swapaxes(1, 2)

    def step(
        self,
        x_BxWxD: jax.Array,
        position: jax.Array,
        visible_BxWxL: jax.Array,
        cache: KeysValues,
        source: KeysValues | None,
        source_mask_BxS: jax.Array | None,
    ) -> tuple[jax.Array, KeysValues]:
        """One position of the W beams of each text; see `Decoder.step`."""
        x, heads = x_BxWxD, self.config.num_heads
        query, key, value = (part.swapaxes(1, 2) for part in self._self_projections(x))
        at = (0, 0, position * x.shape[1], 0)
        cache = (
            jax.lax.dynamic_update_slice(cache[0], key, at),
            jax.lax.dynamic_update_slice(cache[1], value, at),
        )
        x = x + self.attention_out(_attend(query, *cache, visible_BxWxL[:, None]))
        if source is not None and source_mask_BxS is not None:
            query = split_heads(self.cross_query(self.cross_norm(x)), heads).swapaxes(1, 2)
            x = x + self.cross_out(_attend(query, *source, source_mask_BxS[:, None, None]))
        return x + self._mlp(x), cache

    def _self_projections(self, x_BxTxD: jax.Array) -> tuple[jax.Array, ...]:
        fused = split_heads(
            self.query_key_value(self.attention_norm(x_BxTxD)), self.config.num_heads
        )
        return tuple(jnp.split(fused, 3, axis=-1))

    def _source_projections(self, source_BxSxD: jax.Array) -> tuple[jax.Array, ...]:
        fused = split_heads(self.cross_key_value(source_BxSxD), self.config.num_heads)
        return tuple(jnp.split(fused, 2, axis=-1))

    def _mlp(self, x: jax.Array) -> jax.Array:
        return self.down(nn.gelu(self.up(self.mlp_norm(x)), approximate=True))


class Decoder(nn.Module):
    """Scores of the next token after every position, or position by position with a cache.

    Dropout, after the embeddings and on every residual branch, only with a key for each text.
    """

    config: DecoderConfig
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        config = self.config
        init = nn.initializers.normal(INIT_STD)
        self.words = self.param("words", init, (config.vocab_size, config.width))
        self.positions = self.param("positions", init, (config.max_length, config.width))
        if config.conditional:
            self.source_norm = _layer_norm()
        block = rematerialised(Block, config.remat)
        self.layers = [block(config, self.dtype) for _ in range(config.num_layers)]
        self.norm = _layer_norm()

    def __call__(
        self,
        rows_BxT: jax.Array,
        source_states_BxSxD: jax.Array | None = None,
        source_mask_BxS: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """Logits of the token after each position, [B, T, V] fp32."""
        x = self._embed(rows_BxT, jnp.arange(rows_BxT.shape[1]))
        x = dropout(x, self.config.dropout, fold_in(dropout_keys_B, self.config.num_layers))
        source = None if source_states_BxSxD is None else self.source_norm(source_states_BxSxD)
        for i, layer in enumerate(self.layers):
            x = layer(x, source, source_mask_BxS, fold_in(dropout_keys_B, i))
        return self._head(x, self.words.astype(self.dtype).T)

    def read_source(self, source_states_BxSxD: jax.Array, source_mask_BxS: jax.Array) -> Source:
        """What every step reads of the source."""
        source = self.source_norm(source_states_BxSxD)
        return tuple(layer.read_source(source) for layer in self.layers), source_mask_BxS

    def step(
        self,
        head_DxV: jax.Array,
        rows_BxW: jax.Array,
        position: jax.Array,
        visible_BxWxL: jax.Array,
        cache: tuple[KeysValues, ...],
        source: Source | None = None,
    ) -> tuple[jax.Array, tuple[KeysValues, ...]]:
        """Logits [B, W, V] of the token after `position`, and the cache with this one in it.

        A cache has W places for each position, and `visible_BxWxL` says which of them belong to a
        beam's past. So beams that change places move a few numbers and not their keys and values.
        """
        x = self._embed(rows_BxW, position)
        keys_values, mask_BxS = source or ((None,) * len(self.layers), None)
        filled = []
        for layer, past, of_source in zip(self.layers, cache, keys_values, strict=True):
            x, now = layer.step(x, position, visible_BxWxL, past, of_source, mask_BxS)
            filled.append(now)
        return self._head(x, head_DxV), tuple(filled)

    def _embed(self, rows: jax.Array, positions: jax.Array) -> jax.Array:
        words, places = (table.astype(self.dtype) for table in (self.words, self.positions))
        return words[rows].astype(jnp.float32) + places[positions].astype(jnp.float32)

    def _head(self, x_BxTxD: jax.Array, head_DxV: jax.Array) -> jax.Array:
        x_BxTxD = self.norm(x_BxTxD).astype(self.dtype)
        return jnp.matmul(x_BxTxD, head_DxV, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Autoregressive:
    """The modules of one configuration; see `models/cosmos.py` for what `weights` holds.

    Of them it takes bert, states_*, vocabulary, head_index, and

        decoder            the parameters of `Decoder`
        start, end         token ids of [CLS] and [SEP], with which a text starts and ends
    """

    bert: Bert
    decoder: Decoder

    @property
    def conditional(self) -> bool:
        return self.decoder.config.conditional

    def text_states(self, weights: Weights, ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        """Standardised states of the frozen encoder, [B, L, D] fp32."""
        return text_states(self.bert, weights, ids_BxL, mask_BxL)

    def logits(self, weights: Weights, *inputs: jax.Array | None) -> jax.Array:
        """`Decoder.__call__`."""
        return apply(self.decoder, weights["decoder"], *inputs)

    def for_decoding(self, weights: Weights) -> Any:
        """Parameters for the methods below, each as it is used, so that no step need convert it.

        The head is the transposed table, which a product with few rows reads up to twice as fast.
        """
        dtype = self.decoder.dtype
        params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if "norm" in path[-2].key else leaf.astype(dtype),
            {"decoder": weights["decoder"]},
        )
        return {**params, "head": params["decoder"]["words"].T}

    def read_source(self, params: Any, states_BxSxD: jax.Array, mask_BxS: jax.Array) -> Source:
        """`Decoder.read_source`."""
        return self._call(Decoder.read_source, params, states_BxSxD, mask_BxS)

    def step(self, params: Any, *inputs: Any) -> tuple[jax.Array, tuple[KeysValues, ...]]:
        """`Decoder.step`."""
        return self._call(Decoder.step, params, params["head"], *inputs)

    def _call(self, method: Callable[..., Any], params: Any, *inputs: Any) -> Any:
        return self.decoder.apply({"params": params["decoder"]}, *inputs, method=method)

    def empty_cache(self, num_texts: int) -> tuple[KeysValues, ...]:
        """A cache without places."""
        config = self.decoder.config
        shape = (num_texts, config.num_heads, 0, config.width // config.num_heads)
        nothing = jnp.zeros(shape, self.decoder.dtype)
        return ((nothing, nothing),) * config.num_layers


def build(config: ConfigDict, vocabulary_size: int) -> Autoregressive:
    """The modules for a configuration; `vocabulary_size` is the number of rows of the head."""
    settings = config.autoregressive
    decoder = DecoderConfig(
        width=config.encoder.hidden_size,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        max_length=config.data.max_length,
        vocab_size=vocabulary_size,
        conditional=config.data.conditional,
        dropout=settings.dropout,
        remat=settings.remat,
    )
    return Autoregressive(make_bert(config), Decoder(decoder, jnp.dtype(config.dtype)))
