"""No compression: latents are the encoder's states themselves, one a token (arXiv 2402.19097).

In the place of the compressor stands a module that does nothing, in that of the decompressor a
transformer over the latents, which reads a token together with its context. It needs that when the
latents come out of a diffusion and not out of the encoder.

Shape letters: B batch, L text positions, which are the latents too, D width, V vocabulary.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from cosmos_jax.models.autoencoder import AutoencoderConfig
from cosmos_jax.models.denoiser import Attention
from cosmos_jax.models.layers import (
    Dtype,
    FeedForward,
    RMSNorm,
    fold_in,
    linear,
    rematerialised,
)


class IdentityCompressor(nn.Module):
    """The states as they are, under the signature of `Compressor`; it has no parameters."""

    def __call__(
        self,
        states_BxLxD: jax.Array,
        mask_BxL: jax.Array,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        del mask_BxL, dropout_keys_B
        return states_BxLxD.astype(jnp.float32)


class Block(nn.Module):
    """Self-attention with rotary positions and the autoencoder's MLP, each residual."""

    config: AutoencoderConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x_BxLxD: jax.Array, dropout_keys_B: jax.Array | None = None) -> jax.Array:
        normed = RMSNorm(name="norm_attention")(x_BxLxD)
        x = x_BxLxD + Attention(self.config.num_heads, True, self.dtype, name="attention")(
            normed, normed, None
        )
        return x + FeedForward(self.config.dropout, self.dtype, name="mlp")(x, dropout_keys_B)


class TokenDecoder(nn.Module):
    """Latents to token states and logits, under the signature of `Decompressor`."""

    config: AutoencoderConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        latents_BxLxD: jax.Array,
        mask_embedding_D: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        """Returns the predicted standardised states [B, L, D] and the logits [B, L, V], fp32.

        Dropout, as in training, only with a key for each text.
        """
        del mask_embedding_D  # no position starts from nothing
        config = self.config
        x_BxLxD = latents_BxLxD.astype(self.dtype)
        block = rematerialised(Block, config.remat)
        for i in range(config.num_layers):
            x_BxLxD = block(config, self.dtype, name=f"layers_{i}")(
                x_BxLxD, fold_in(dropout_keys_B, i)
            )
        logits_BxLxV = linear(config.vocab_size, config.width, dtype=self.dtype, name="head")(
            x_BxLxD
        )
        return x_BxLxD.astype(jnp.float32), logits_BxLxV.astype(jnp.float32)
