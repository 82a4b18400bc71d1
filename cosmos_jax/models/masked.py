"""Masked diffusion over tokens, MDLM (arXiv 2406.07524): a transformer that fills in [MASK]s.

Tokens are numbered by the rows of the head, 0 .. V-1, and row V of the word table is the mask. The
head has no such row, so the mask is never predicted, and only masked positions are ever asked for:
the two halves of the paper's SUBS parameterisation, by construction. The network is not told the
time, which the share of masks shows anyway; so its answer changes only when a token does.

Shape letters: B batch, L text positions, S source positions, D width, V vocabulary.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax.models.bert import Bert
from cosmos_jax.models.denoiser import Block, DenoiserConfig
from cosmos_jax.models.layers import Dtype, RMSNorm, dropout, fold_in, linear, rematerialised
from cosmos_jax.models.states import Weights, apply, make_bert, text_states

WORD_STD = 0.02


class MaskedDenoiser(nn.Module):
    """The transformer in three parts: what it makes of a source, of a text, and the head."""

    config: DenoiserConfig
    vocab_size: int
    dropout: float = 0.0
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        config = self.config
        self.words = nn.Embed(
            self.vocab_size + 1,
            config.width,
            dtype=self.dtype,
            embedding_init=nn.initializers.normal(WORD_STD),
        )
        self.source = linear(config.width, config.width, dtype=self.dtype, name="source")
        self.norm_source = RMSNorm()
        block = rematerialised(Block, config.remat)
        self.layers = [block(config, self.dtype) for _ in range(config.num_layers)]
        self.norm_out = RMSNorm()
        self.head = linear(self.vocab_size, config.width, dtype=self.dtype, name="head")

    def condition(self, source_states_BxSxD: jax.Array) -> jax.Array:
        """What the blocks attend to, from the standardised states of the source; [B, S, D]."""
        return self.norm_source(self.source(source_states_BxSxD))

    def hidden(
        self,
        rows_BxL: jax.Array,
        condition_BxSxD: jax.Array | None = None,
        condition_mask_BxS: jax.Array | None = None,
        dropout_keys_B: jax.Array | None = None,
    ) -> jax.Array:
        """What the head reads, [B, L, D] fp32; dropout, of what a block adds, only with keys."""
        x = self.words(rows_BxL)
        for i, layer in enumerate(self.layers):
            after = layer(x, None, condition_BxSxD, condition_mask_BxS)
            if dropout_keys_B is not None:
                after = x + dropout(after - x, self.dropout, fold_in(dropout_keys_B, i))
            x = after
        return self.norm_out(x.astype(jnp.float32))

    def logits(self, hidden_BxTxD: jax.Array) -> jax.Array:
        """[B, T, V] fp32, of whichever positions."""
        return self.head(hidden_BxTxD).astype(jnp.float32)

    def __call__(
        self,
        rows_BxL: jax.Array,
        source_states_BxSxD: jax.Array | None = None,
        source_mask_BxS: jax.Array | None = None,
    ) -> jax.Array:
        """All of it, [B, L, V]; the way to initialise every parameter."""
        condition = None if source_states_BxSxD is None else self.condition(source_states_BxSxD)
        return self.logits(self.hidden(rows_BxL, condition, source_mask_BxS))


@dataclasses.dataclass(frozen=True)
class Masked:
    """The modules of one configuration as pure functions of one dictionary of weights.

    Of `weights` they read bert, states_mean, states_std and masked_denoiser.
    """

    bert: Bert
    denoiser: MaskedDenoiser
    conditional: bool

    @property
    def mask_row(self) -> int:
        """The number that stands for [MASK]."""
        return self.denoiser.vocab_size

    def text_states(self, weights: Weights, ids_BxL: jax.Array, mask_BxL: jax.Array) -> jax.Array:
        """Standardised states of the frozen encoder, [B, L, D] fp32."""
        return text_states(self.bert, weights, ids_BxL, mask_BxL)

    def condition(self, weights: Weights, source_states_BxSxD: jax.Array) -> jax.Array:
        """`MaskedDenoiser.condition`."""
        return self._apply("condition", weights, source_states_BxSxD)

    def hidden(self, weights: Weights, *inputs: jax.Array | None) -> jax.Array:
        """`MaskedDenoiser.hidden`."""
        return self._apply("hidden", weights, *inputs)

    def logits(self, weights: Weights, hidden_BxTxD: jax.Array) -> jax.Array:
        """`MaskedDenoiser.logits`."""
        return self._apply("logits", weights, hidden_BxTxD)

    def _apply(self, method: str, weights: Weights, *inputs: jax.Array | None) -> jax.Array:
        return apply(self.denoiser, weights["masked_denoiser"], *inputs, method=method)


def build(config: ConfigDict, vocabulary_size: int) -> Masked:
    """The modules for a configuration; `vocabulary_size` is the number of rows of the head."""
    settings = config.masked
    sizes = DenoiserConfig(
        width=config.encoder.hidden_size,
        num_heads=settings.num_heads,
        num_layers=settings.num_layers,
        remat=settings.remat,
    )
    denoiser = MaskedDenoiser(sizes, vocabulary_size, settings.dropout, jnp.dtype(config.dtype))
    return Masked(make_bert(config), denoiser, bool(config.data.conditional))
