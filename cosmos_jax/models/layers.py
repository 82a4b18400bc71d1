"""Layers shared by the autoencoder and the denoiser.

Shape letters: B batch, T queries, S keys, H heads, K width of a head, D model width.
Parameters are always fp32; `dtype` is the type of the matrix products. Norms and
softmax are computed in fp32.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

Dtype = Any
NORM_EPS = 1e-5
ROPE_THETA = 10_000.0
COLUMNS = 512  # of `most_likely`
MANY_POSITIONS = 1_000  # whose logits a CPU treats in another way than those of a few


def linear(
    features: int, fan_in: int, *, dtype: Dtype, name: str, use_bias: bool = False
) -> nn.Dense:
    """A dense layer initialised as PyTorch does: uniform with bound 1/sqrt(fan_in).

    The released models were trained from this initialisation, which has a third of the
    variance of Flax's default.
    """
    bound = fan_in**-0.5
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        bias_init=lambda key, shape, dtype=jnp.float32: jax.random.uniform(
            key, shape, dtype, -bound, bound
        ),
        name=name,
    )


class RMSNorm(nn.Module):
    """x / max(rms(x), eps) * gain over the last axis; eps bounds the rms from below."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gain = self.param("gain", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(x32**2, axis=-1, keepdims=True))
        return (x32 / jnp.maximum(rms, NORM_EPS) * gain).astype(x.dtype)


def split_heads(x_BxTxD: jax.Array, num_heads: int) -> jax.Array:
    """[B, T, H*K] -> [B, T, H, K]."""
    return x_BxTxD.reshape(*x_BxTxD.shape[:-1], num_heads, -1)


def attend(
    query_BxTxHxK: jax.Array,
    key_BxSxHxK: jax.Array,
    value_BxSxHxK: jax.Array,
    mask_BxS: jax.Array | None = None,
) -> jax.Array:
    """Softmax attention with scale 1/sqrt(K); False in `mask_BxS` hides a key. [B, T, H*K]."""
    mask = None if mask_BxS is None else mask_BxS[:, None, None, :]
    out_BxTxHxK = jax.nn.dot_product_attention(query_BxTxHxK, key_BxSxHxK, value_BxSxHxK, mask=mask)
    return out_BxTxHxK.reshape(*out_BxTxHxK.shape[:2], -1)


def fold_in(keys_B: jax.Array | None, number: int) -> jax.Array | None:
    """The keys of one layer, or None where there are none."""
    return None if keys_B is None else jax.vmap(jax.random.fold_in, (0, None))(keys_B, number)


def dropout(x: jax.Array, rate: float, keys_B: jax.Array | None) -> jax.Array:
    """Zeroes a share of the elements and scales the others up; nothing without keys.

    Each text has a key of its own, so that what it loses does not depend on the batch.
    """
    if keys_B is None or not rate:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys_B)
    return jnp.where(keep, x / (1 - rate), 0)


class FeedForward(nn.Module):
    """LayerNorm, Dense to 4 D, exact GELU, dropout, Dense to D; the autoencoder's MLP."""

    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, dropout_keys_B: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        # The fast variance, E[x^2] - E[x]^2, loses digits where the mean is large.
        x = nn.LayerNorm(epsilon=NORM_EPS, dtype=jnp.float32, use_fast_variance=False, name="norm")(
            x
        )
        x = linear(4 * width, width, use_bias=True, dtype=self.dtype, name="up")(x)
        x = nn.gelu(x, approximate=False)
        x = dropout(x, self.dropout, dropout_keys_B)
        return linear(width, 4 * width, use_bias=True, dtype=self.dtype, name="down")(x)


def rematerialised(block: type[nn.Module], remat: bool) -> type[nn.Module]:
    """The block, or one whose activations the backward pass computes again to save memory."""
    return nn.remat(block) if remat else block


class SwiGLU(nn.Module):
    """down(SiLU(gate(x)) * up(x)) without biases; the denoiser's MLP."""

    inner_width: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        gate = linear(self.inner_width, width, dtype=self.dtype, name="gate")(x)
        up = linear(self.inner_width, width, dtype=self.dtype, name="up")(x)
        return linear(width, self.inner_width, dtype=self.dtype, name="down")(nn.silu(gate) * up)


def rotate(x_BxTxHxK: jax.Array) -> jax.Array:
    """Rotary position embedding of positions 0..T-1 in the half-rotation layout."""
    length, width = x_BxTxHxK.shape[1], x_BxTxHxK.shape[-1]
    # By NumPy: constants, where XLA would compute them anew for every element of x.
    frequencies = np.float32(ROPE_THETA) ** (-np.arange(0, width, 2, dtype=np.float32) / width)
    angles_TxK = np.tile(np.outer(np.arange(length, dtype=np.float32), frequencies), (1, 2))
    cos, sin = np.cos(angles_TxK)[:, None], np.sin(angles_TxK)[:, None]
    x32 = x_BxTxHxK.astype(jnp.float32)
    first, second = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return (x32 * cos + turned * sin).astype(x_BxTxHxK.dtype)


def most_likely(x: jax.Array, head_DxV: jax.Array) -> jax.Array:
    """argmax of x @ head over the last axis, without biases; int32.

    On a CPU argmax goes number by number and would take as long as the product. The greatest of
    each column of logits, laid out in rows of COLUMNS, takes next to nothing, and only the column
    of the greatest of these is looked through. The head is widened for that by its own first
    columns, a copy that few positions would not pay for.
    """
    positions, vocabulary_size = x.size // x.shape[-1], head_DxV.shape[1]

    def plain(x: jax.Array, head_DxV: jax.Array) -> jax.Array:
        return jnp.argmax(x @ head_DxV, axis=-1).astype(jnp.int32)

    def by_columns(x: jax.Array, head_DxV: jax.Array) -> jax.Array:
        wide = jnp.concatenate([head_DxV, head_DxV[:, : -vocabulary_size % COLUMNS]], axis=1)
        logits = (x @ wide).reshape(*x.shape[:-1], -1, COLUMNS)
        column = jnp.argmax(jnp.max(logits, axis=-2), axis=-1)
        there = jnp.take_along_axis(logits, column[..., None, None], axis=-1)[..., 0]
        row = jnp.argmax(there, axis=-1) * COLUMNS + column
        return (row % vocabulary_size).astype(jnp.int32)

    if positions < MANY_POSITIONS or vocabulary_size < COLUMNS:
        return plain(x, head_DxV)
    return jax.lax.platform_dependent(x, head_DxV, cpu=by_columns, default=plain)


def in_parts(function: Callable[[jax.Array], jax.Array], x_B: jax.Array, *, size: int) -> jax.Array:
    """function(x), computed for `size` rows after the other, where rows do not know each other."""
    parts = len(x_B) // size
    if parts < 2:
        return function(x_B)
    first = x_B[: parts * size].reshape(parts, size, *x_B.shape[1:])
    found = jax.lax.map(function, first)
    found = found.reshape(parts * size, *found.shape[2:])
    rest = x_B[parts * size :]
    return jnp.concatenate([found, function(rest)]) if len(rest) else found


def is_greatest(logits_V: jax.Array, row: jax.Array) -> jax.Array:
    """Whether no logit of the last axis is above that of `row`, which lacks that axis.

    As good as comparing with argmax, but for equal logits; on a CPU argmax over a vocabulary takes
    a twentieth of a training step, and the greatest logit next to nothing.
    """
    of_row = jnp.take_along_axis(logits_V, row[..., None], axis=-1)[..., 0]
    return of_row >= jnp.max(logits_V, axis=-1)
