"""What a language model makes of texts: their likelihood, and its features for MAUVE.

Papers call three numbers perplexity. With s_t the summed negative log-likelihood of the n_t
tokens of text t, and PPL_t = exp(s_t / n_t):

    (1) trimmed_mean  mean of the PPL_t without the lowest and the highest 5%
    (2) mean          mean of all PPL_t
    (3) corpus        exp(sum s_t / sum n_t)

Repetition lowers all three, so they say little without diversity and entropy beside them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.errors import UserError
from cosmos_jax.language_model import LanguageModel
from cosmos_jax.models.gpt2 import Gpt2, Gpt2Config, Params, logits
from cosmos_jax.scores import score
from cosmos_jax.scores.batches import padded_batches
from cosmos_jax.scores.score import Flag, Score

MAX_LENGTH = 1024
TRIM = 0.05


@dataclasses.dataclass(frozen=True, eq=False)
class TokenNlls:
    """The negative log-likelihoods in nats of the tokens of each text, and how they were made.

    UserError if there are no texts, or one without tokens or of likelihood 0.
    """

    texts: list[np.ndarray]
    flags: Mapping[str, Flag] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        _require_tokens(self.texts)
        for i, nll in enumerate(self.texts):
            if not np.isfinite(nll).all():
                raise UserError(f"text {i + 1}: its likelihood is not a finite number")

    @property
    def perplexities_T(self) -> np.ndarray:
        return np.exp([nll.mean() for nll in self.texts])


def token_nlls(
    model: LanguageModel, texts: Sequence[str], max_length: int = MAX_LENGTH
) -> TokenNlls:
    """How likely the model finds each token of the texts, given those before it.

    The start token stands before a text, so that its first token counts too. At most
    `max_length` tokens with the start token are read; the flag `cut` is the number of texts
    that are longer.

    Raises:
      UserError: there are no texts, or one of them has no token.
    """
    start = model.tokenizer.bos_token_id
    longest = min(max_length, model.config.max_positions)
    ids = _tokens(model, texts)
    sequences = [[start, *tokens[: longest - 1]] for tokens in ids]
    nlls: list[np.ndarray] = [np.empty(0)] * len(texts)
    params = jax.device_put(model.params)
    for indices_T, ids_BxL, lengths_B in padded_batches(sequences, longest):
        nll_BxM = np.asarray(_next_token_nll(model.config, params, ids_BxL), np.float64)
        for row, i in enumerate(indices_T):
            nlls[i] = nll_BxM[row, : lengths_B[row] - 1]
    return TokenNlls(
        nlls,
        {
            "model": model.name,
            "weights": model.fingerprint[:12],
            "start": model.tokenizer.bos_token,
            "max_length": longest,
            "cut": sum(len(tokens) >= longest for tokens in ids),
        },
    )


def features(
    model: LanguageModel, texts: Sequence[str], max_length: int = MAX_LENGTH
) -> np.ndarray:
    """The features of MAUVE (Pillutla et al., 2021), [number of texts, D].

    They are the last hidden state at the last token, without a start token. UserError as in
    `token_nlls`.
    """
    longest = min(max_length, model.config.max_positions)
    sequences = [tokens[:longest] for tokens in _tokens(model, texts)]
    features_TxD = np.empty((len(texts), model.config.hidden_size), np.float32)
    params = jax.device_put(model.params)
    for indices_T, ids_BxL, lengths_B in padded_batches(sequences, longest):
        state_BxD = _state_at(model.config, params, ids_BxL, lengths_B - 1)
        features_TxD[indices_T] = np.asarray(state_BxD)[: len(indices_T)]
    return features_TxD


def trimmed_mean(nlls: TokenNlls, *, trim: float = TRIM, block_size: int | None = None) -> Score:
    """Equation (1): of n texts the int(trim n) at either end are left out.

    With at least two whole blocks of `block_size` texts, value and spread are mean and standard
    deviation over these blocks; texts after the last whole one are left out.
    """
    ppl_T = nlls.perplexities_T
    flags = {**nlls.flags, "perplexity": "trimmed mean over texts", "trim": trim}
    count = len(ppl_T) // block_size if block_size else 1
    if block_size and count > 1:
        blocks = np.split(ppl_T[: count * block_size], count)
        values = [_trimmed(block, trim) for block in blocks]
        return Score(
            float(np.mean(values)),
            {**flags, "block": block_size},
            float(np.std(values, ddof=1)),
            "blocks",
        )
    spread = score.jackknife(lambda chosen: _trimmed(ppl_T[chosen], trim), len(ppl_T))
    return Score(_trimmed(ppl_T, trim), flags, spread, score.JACKKNIFE)


def mean(nlls: TokenNlls) -> Score:
    """Equation (2)."""
    flags = {**nlls.flags, "perplexity": "mean over texts"}
    return Score(flags=flags, **score.mean(list(nlls.perplexities_T)))


def corpus(nlls: TokenNlls) -> Score:
    """Equation (3)."""
    sums_T = np.array([nll.sum() for nll in nlls.texts])
    counts_T = np.array([nll.size for nll in nlls.texts])

    def perplexity(chosen: np.ndarray) -> float:
        return float(np.exp(sums_T[chosen].sum() / counts_T[chosen].sum()))

    everything = np.arange(len(counts_T))
    spread = score.jackknife(perplexity, len(everything))
    flags = {**nlls.flags, "perplexity": "of the corpus", "tokens": int(counts_T.sum())}
    return Score(perplexity(everything), flags, spread, score.JACKKNIFE)


# On a device the default precision of a float32 product may be lower than float32.
@functools.partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _next_token_nll(config: Gpt2Config, params: Params, ids_BxL: jax.Array) -> jax.Array:
    """Of the tokens from the second on, [B, L - 1]."""
    states_BxMxD: Any = Gpt2(config).apply({"params": params}, ids_BxL[:, :-1])
    logits_BxMxV = logits(params, states_BxMxD)
    chosen_BxM = jnp.take_along_axis(logits_BxMxV, ids_BxL[:, 1:, None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits_BxMxV, axis=-1) - chosen_BxM


@functools.partial(jax.jit, static_argnums=0)
@jax.default_matmul_precision("highest")
def _state_at(
    config: Gpt2Config, params: Params, ids_BxL: jax.Array, last_B: jax.Array
) -> jax.Array:
    states_BxLxD: Any = Gpt2(config).apply({"params": params}, ids_BxL)
    return jnp.take_along_axis(states_BxLxD, last_B[:, None, None], axis=1)[:, 0]


def _tokens(model: LanguageModel, texts: Sequence[str]) -> list[list[int]]:
    _require_tokens(texts)
    # Without `verbose` it does not warn of texts longer than the model reads: they are cut.
    ids = model.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    _require_tokens(ids)
    return ids


def _require_tokens(texts: Sequence[Sized]) -> None:
    if not texts:
        raise UserError("there are no texts to score")
    for i, tokens in enumerate(texts):
        if not len(tokens):
            raise UserError(f"text {i + 1} of {len(texts)} is empty: leave such texts out")


def _trimmed(ppl_T: np.ndarray, trim: float) -> float:
    cut = int(trim * len(ppl_T))
    return float(np.sort(ppl_T)[cut : len(ppl_T) - cut].mean())
