"""What a BERT makes of each of many texts, whatever texts stand beside it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.data import tokens
from cosmos_jax.encoder import TextEncoder
from cosmos_jax.errors import UserError
from cosmos_jax.models.bert import Bert, BertConfig, Params
from cosmos_jax.scores.batches import padded_batches

# Texts that the tokenizer is given at once.
_CHUNK = 1024


def longest(tokenizer: Any, config: BertConfig) -> int:
    """The most tokens of a text that a model reads, the special ones included."""
    return min(tokenizer.model_max_length, config.max_positions)


def token_ids(
    tokenizer: Any, texts: Sequence[str], max_length: int, what: str = "texts"
) -> tuple[list[list[int]], int]:
    """Each text's ids, special ones included, and how many texts `max_length` has cut.

    Raises:
      UserError: there are no texts, or one of them has no token; it calls them `what`.
    """
    if not texts:
        raise UserError(f"{what}: there are none")
    for i, text in enumerate(texts):
        if not text.strip():
            raise UserError(f"{what}: text {i + 1} is empty")
    ids: list[list[int]] = []
    cut = 0
    for start in range(0, len(texts), _CHUNK):
        try:
            encoded = tokens.encode(tokenizer, texts[start : start + _CHUNK], max_length)
        except UserError as error:
            raise UserError(f"{what}: {error}") from error
        lengths_B = encoded.mask_BxL.sum(axis=1)
        ids += [row[:n].tolist() for row, n in zip(encoded.ids_BxL, lengths_B, strict=True)]
        cut += int(encoded.cut_B.sum())
    return ids, cut


def each_text(
    function: Callable[[np.ndarray, np.ndarray], jax.Array],
    tokenizer: Any,
    texts: Sequence[str],
    max_length: int,
) -> np.ndarray:
    """The rows that a function of ids and mask, both [B, L], answers for the texts, in order."""
    rows: list[np.ndarray] = [np.empty(0)] * len(texts)
    ids, _ = token_ids(tokenizer, texts, max_length)
    for indices_T, ids_BxL, lengths_B in padded_batches(ids, max_length, tokenizer.pad_token_id):
        mask_BxL = np.arange(ids_BxL.shape[1]) < lengths_B[:, None]
        answers = np.asarray(function(ids_BxL, mask_BxL))
        for row, i in enumerate(indices_T):
            rows[i] = answers[row]
    return np.stack(rows)


def pooled(encoder: TextEncoder, texts: Sequence[str]) -> np.ndarray:
    """The mean over a text's tokens of the encoder's last states, [number of texts, D].

    Special tokens count, as in sentence-transformers. UserError as in `token_ids`.
    """
    function = functools.partial(_mean_state, encoder.config, jax.device_put(encoder.params))
    max_length = longest(encoder.tokenizer, encoder.config)
    return each_text(function, encoder.tokenizer, texts, max_length)


@functools.partial(jax.jit, static_argnums=0)
def _mean_state(
    config: BertConfig, params: Params, ids_BxL: jax.Array, mask_BxL: jax.Array
) -> jax.Array:
    with jax.default_matmul_precision("float32"):
        states_BxLxD: Any = Bert(config).apply({"params": params}, ids_BxL, mask_BxL)
    return jnp.mean(states_BxLxD, axis=1, where=mask_BxL[:, :, None])
