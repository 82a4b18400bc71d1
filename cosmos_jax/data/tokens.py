"""Texts to token ids of one fixed length, and back."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cosmos_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A fast tokenizer keeps the length it cuts and pads to as state, so calls from the thread
# that makes batches and from the one that evaluates must not meet.
_LOCK = threading.Lock()
_SHOWN = 60  # characters of a text in an error message


@dataclass(frozen=True)
class Encoded:
    """Token ids of B texts, padded to L tokens.

    ids_BxL: int32; `[CLS]`, the text, `[SEP]`, then padding.
    mask_BxL: bool; False on padding.
    cut_B: bool; whether the text was longer than L and lost its end.
    """

    ids_BxL: np.ndarray
    mask_BxL: np.ndarray
    cut_B: np.ndarray


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int) -> Encoded:
    """Token ids of `texts`, each cut or padded to `max_length` tokens, the special ones included.

    The name of a special token inside a text, such as `[SEP]`, stands for that token.

    Raises:
      UserError: a text has no tokens.
    """
    if not texts:
        none = np.zeros((0, max_length))
        return Encoded(none.astype(np.int32), none.astype(bool), np.zeros(0, bool))
    with _LOCK:
        encodings = tokenizer(
            list(texts), truncation=True, max_length=max_length, padding="max_length"
        ).encodings
    assert encodings is not None, "only a fast tokenizer keeps what it cut off"
    ids_BxL = np.array([e.ids for e in encodings], np.int32)
    mask_BxL = np.array([e.attention_mask for e in encodings], bool)
    empty_B = mask_BxL.sum(axis=1) <= tokenizer.num_special_tokens_to_add()
    if empty_B.any():
        text = texts[int(empty_B.argmax())]
        shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
        raise UserError(
            f"the tokenizer finds no tokens in the text {shown!r}: remove it from the data"
        )
    return Encoded(ids_BxL, mask_BxL, np.array([bool(e.overflowing) for e in encodings], bool))


def decode(tokenizer: PreTrainedTokenizerBase, ids_BxL: np.ndarray) -> list[str]:
    """The texts that token ids spell, up to the first `[SEP]` and without special tokens."""
    ends_B = [
        int((ids_L == tokenizer.sep_token_id).argmax())
        if (ids_L == tokenizer.sep_token_id).any()
        else len(ids_L)
        for ids_L in ids_BxL
    ]
    texts = tokenizer.batch_decode(
        [ids_L[:end].tolist() for ids_L, end in zip(ids_BxL, ends_B, strict=True)],
        skip_special_tokens=True,
        clean_up_tokenization_spaces=True,
    )
    return [" ".join(text.split()) for text in texts]


def round_trip(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], max_length: int
) -> list[str]:
    """The texts as generated ones look: cut to `max_length` tokens, encoded and decoded."""
    return decode(tokenizer, encode(tokenizer, texts, max_length).ids_BxL)
