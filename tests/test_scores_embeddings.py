"""Pooled states against the model of transformers, one text at a time."""

import numpy as np
import pytest
import tiny_bert
from tiny import WORDS, write_encoder

from cosmos_jax import encoder
from cosmos_jax.errors import UserError
from cosmos_jax.scores import embeddings
from cosmos_jax.scores.embeddings import each_text, pooled, token_ids


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return encoder.load(str(write_encoder(tmp_path_factory.mktemp("embeddings") / "encoder")))


@pytest.mark.parametrize("family", ["Bert", "Roberta"])
def test_against_transformers(tmp_path, family):
    directory = str(tiny_bert.write(tmp_path / "model", family))
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(directory).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    expected = []
    for text in tiny_bert.TEXTS:
        ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(model(ids).last_hidden_state[0].mean(dim=0).numpy())
    actual = pooled(encoder.load(directory), tiny_bert.TEXTS)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_a_text_does_not_depend_on_the_others_nor_on_their_order(small):
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(WORDS, size=rng.integers(1, 12))) for _ in range(30)]
    together = pooled(small, texts)
    order = rng.permutation(30)
    shuffled = pooled(small, [texts[i] for i in order])
    np.testing.assert_allclose(shuffled, together[order], atol=1e-6)
    for i in (0, 7):
        np.testing.assert_allclose(pooled(small, [texts[i]])[0], together[i], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_every_chunk_of_texts_has_its_place(small, monkeypatch):
    texts = ["the river", "a long red road under the bridge", "king", "one " * 30, "never"]
    whole = token_ids(small.tokenizer, texts, 8)
    monkeypatch.setattr(embeddings, "_CHUNK", 2)
    ids, cut = token_ids(small.tokenizer, texts, 8)
    assert cut == whole[1] == 2
    assert ids == whole[0]
    assert ids[0] == small.tokenizer("the river")["input_ids"]


def test_rows_come_in_the_order_of_the_texts(small):
    texts = ["the " * n for n in (9, 1, 5, 3)]
    counts = each_text(lambda ids, mask: mask.sum(axis=1), small.tokenizer, texts, 14)
    assert counts.tolist() == [11, 3, 7, 5]


def test_bad_input(small):
    with pytest.raises(UserError, match="texts: there are none"):
        pooled(small, [])
    with pytest.raises(UserError, match="texts: text 2 is empty"):
        pooled(small, ["the river", " "])
    with pytest.raises(UserError, match=r"texts: the tokenizer finds no tokens in the text '\\u"):
        pooled(small, ["the river", "\u200b"])
