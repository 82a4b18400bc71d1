"""The models in demo/: small, whole, and what their cards say."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

import cosmos_jax
from cosmos_jax import exported
from cosmos_jax.data import sources, tokens

DEMO = Path(__file__).parents[1] / "demo"
NAMES = ("sentences", "synopses")


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return cosmos_jax.load(DEMO / request.param)


def test_there_are_no_others():
    assert {path.name for path in DEMO.iterdir() if exported.is_exported(path)} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_the_card(name):
    directory = DEMO / name
    assert sum(path.stat().st_size for path in directory.rglob("*")) <= 30e6
    card = (directory / "README.md").read_text()
    assert f"--config=configs/demo/{name}.py" in card
    table = card.split("\n## Scores\n")[1].split("\n## ")[0]
    assert "autoregressive" in table
    assert ("first words" in table) == (name == "synopses")
    samples = card.split("\n## Samples\n")[1].split("\n## ")[0]
    assert len(re.findall(r"^\d+\. ", samples, re.M)) == 12
    assert "none left out" in samples
    assert not re.search(r"/tmp|/root|/home", card)


def test_texts_of_a_seed(model):
    given = (DEMO / "descriptions.txt").read_text().splitlines() if model.conditional else None
    first, again = (model.generate(3, sources=given, seed=3) for _ in range(2))
    assert first == again
    assert len(set(first)) == 3
    assert all(len(text.split()) >= 2 for text in first)


def test_synopses_are_cut_out_of_descriptions():
    """Most words are the source's, and most of those follow each other there."""
    synopses = cosmos_jax.load(DEMO / "synopses")
    descriptions = (DEMO / "descriptions.txt").read_text().splitlines()
    found = synopses.generate(sources=descriptions * 4, seed=0)
    words = {0: [], 1: []}  # by itself, and with the one before it
    for source, text in zip(descriptions * 4, found, strict=True):
        given, said = (re.findall(r"\w+", x.lower()) for x in (source, text))
        assert 2 <= len(said) <= 18
        words[0] += [word in given for word in said]
        words[1] += [pair in set(itertools.pairwise(given)) for pair in itertools.pairwise(said)]
    assert np.mean(words[0]) > 0.75
    assert np.mean(words[1]) > 0.5


def test_it_reconstructs_as_its_card_says():
    """The share of tokens, counted anew on held-out sentences, of weights rounded for the disk."""
    model = cosmos_jax.load(DEMO / "sentences")
    valid = sources.load("sentences").valid
    texts = sources.first_texts(valid, 1_000)
    length = model.config.data.max_length
    given = tokens.encode(model.tokenizer, texts, length)
    back = tokens.encode(model.tokenizer, model.reconstruct(texts), length)
    same = [
        np.mean([a in found for a in ids])
        for ids, found in zip(given.ids_BxL, back.ids_BxL, strict=True)
    ]
    evaluation = json.loads((DEMO / "sentences" / "evaluation.json").read_text())
    said = evaluation["held_out"]["autoencoder"]["token_accuracy"]
    assert abs(np.mean(same) - said) < 0.03
