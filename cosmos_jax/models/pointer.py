"""A pointer to the part of the source that a text repeats; not the paper's, and off by default.

A text that follows its source word for word is a window of it, known but for where it begins. One
latent is too noisy to tell; all of them together tell early. A small denoiser does not find that
out by itself (demo/README.md), so it is given the way: every place the window may begin at is
scored by all latents, and cross-attention reads the window beside the source. With x the noised
latents, e the self-condition, c the condition, h a head of K features and D the width:

    (1) y_j,h = sum_n A_h,n,j (exp(g_h(t)) W x_n + exp(g'_h(t)) W' e_n)_h     what seems to be at j
    (2) s_p   = prior(c_p) + D^-1/2 sum_j,h y_j,h . (V c_(p + j))_h           p: where it begins
    (3) pi    = softmax of s over the positions p of the source
    (4) window_j = sum_p pi_p c_(p + j)
    (5) loss  = - sum_p q_p log pi_p,  q_p = m_p^4 / (1 + sum m^4)

m_p is the number of tokens that text and window have in common, place by place; where the source
does not hold the text, q is nearly 0 and little is asked. W and W' begin at 0, and pi uniform.

Shape letters: B batch, N latents, L text positions, S source positions, D width, H heads.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cosmos_jax.models.layers import Dtype, linear, split_heads

_zeros = nn.initializers.zeros


def diagonal_sums(x_BxLxS: jax.Array) -> jax.Array:
    """sum_j x[j, p + j] for every p, [B, S]; beyond the end of the source there are zeros."""
    batch, length, source = x_BxLxS.shape
    width = source + length
    rows = jnp.pad(x_BxLxS, ((0, 0), (0, 0), (0, length))).reshape(batch, length * width)
    # Cut into rows that are one longer, each begins one further on than the row above it.
    rows = jnp.pad(rows, ((0, 0), (0, length))).reshape(batch, length, width + 1)
    return jnp.sum(rows[:, :, :source], axis=1)


def windows(shares_BxS: jax.Array, length: int) -> jax.Array:
    """What position j of the window takes of each position of the source, [B, L, S].

    It is shares[m - j] at m, so that a matrix product with the source gives equation (4).
    """
    batch, source = shares_BxS.shape
    width = source + length
    rows = jnp.pad(shares_BxS, ((0, 0), (0, length + 1)))
    rows = jnp.broadcast_to(rows[:, None], (batch, length, width + 1)).reshape(batch, -1)
    return rows[:, : length * width].reshape(batch, length, width)[:, :, :source]


def targets(
    ids_BxL: jax.Array, mask_BxL: jax.Array, source_ids_BxS: jax.Array, source_mask_BxS: jax.Array
) -> jax.Array:
    """q of equation (5), [B, S] fp32; [CLS] and [SEP] of either text do not count."""

    def between(mask: jax.Array) -> jax.Array:
        followed = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        return followed & (jnp.arange(mask.shape[1]) > 0)

    same_BxLxS = ids_BxL[:, :, None] == source_ids_BxS[:, None, :]
    same_BxLxS &= between(mask_BxL)[:, :, None] & between(source_mask_BxS)[:, None, :]
    counts_BxS = diagonal_sums(same_BxLxS.astype(jnp.float32)) ** 4
    return counts_BxS / (1 + jnp.sum(counts_BxS, axis=1, keepdims=True))


def loss(log_shares_BxS: jax.Array, targets_BxS: jax.Array) -> jax.Array:
    """Equation (5), [B]."""
    # Shares at hidden positions are 0, and so are their targets.
    return -jnp.sum(jnp.where(targets_BxS > 0, targets_BxS * log_shares_BxS, 0), axis=1)


class PointerKeys(nn.Module):
    """What equation (2) takes of the source, which is the same in every step."""

    num_heads: int
    dtype: Dtype

    @nn.compact
    def __call__(self, condition_BxSxD: jax.Array) -> tuple[jax.Array, jax.Array]:
        """V c by heads [B, S, H, K], and the prior [B, S] fp32."""
        width = condition_BxSxD.shape[-1]
        condition = condition_BxSxD.astype(self.dtype)
        keys = linear(width, width, dtype=self.dtype, name="key")(condition)
        hidden = nn.silu(
            linear(width, width, use_bias=True, dtype=self.dtype, name="up")(condition)
        )
        prior = nn.Dense(1, kernel_init=_zeros, name="prior")(hidden.astype(jnp.float32))
        return split_heads(keys, self.num_heads), prior[..., 0]


class Pointer(nn.Module):
    """Where the window begins, as far as the noised latents and the estimate tell."""

    num_heads: int
    length: int
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x_t_BxNxD: jax.Array,
        estimate_BxNxD: jax.Array,
        time_BxD: jax.Array,
        keys_BxSxHxK: jax.Array,
        prior_BxS: jax.Array,
        mask_BxS: jax.Array,
    ) -> jax.Array:
        """log pi of equation (3), [B, S] fp32; `time_BxD` says what t is."""
        num_latents, width = x_t_BxNxD.shape[1:]
        heads = self.num_heads
        gains_Bx2H = nn.Dense(
            2 * heads, kernel_init=_zeros, bias_init=nn.initializers.constant(-1.0), name="gains"
        )(time_BxD.astype(jnp.float32))
        of_noised, of_estimate = jnp.split(jnp.exp(gains_Bx2H)[:, None, :, None], 2, axis=2)

        def project(x: jax.Array, name: str) -> jax.Array:
            dense = nn.Dense(width, use_bias=False, kernel_init=_zeros, dtype=self.dtype, name=name)
            return split_heads(dense(x.astype(self.dtype)), heads).astype(jnp.float32)

        evidence_BxNxHxK = of_noised * project(x_t_BxNxD, "noised")
        evidence_BxNxHxK += of_estimate * project(estimate_BxNxD, "estimate")
        places_HxNxL = self.param("places", _near_the_diagonal, (heads, num_latents, self.length))
        seen_BxLxHxK = jnp.einsum("hnl,bnhk->blhk", places_HxNxL, evidence_BxNxHxK)
        keys = jnp.where(mask_BxS[:, :, None, None], keys_BxSxHxK, 0).astype(jnp.float32)
        alike_BxLxS = jnp.einsum("blhk,bshk->bls", seen_BxLxHxK, keys) * width**-0.5
        scores_BxS = prior_BxS + diagonal_sums(alike_BxLxS)
        scores_BxS = jnp.where(mask_BxS, scores_BxS, jnp.finfo(jnp.float32).min)
        return jax.nn.log_softmax(scores_BxS)


def _near_the_diagonal(key: jax.Array, shape: tuple[int, int, int]) -> jax.Array:
    """A of equation (1) at first: latent n tells of its share of the positions, mostly."""
    _, num_latents, length = shape
    latent_of_L = jnp.arange(length) * num_latents // length
    return jax.nn.one_hot(latent_of_L, num_latents, axis=0) + 0.3 * jax.random.normal(key, shape)
