"""Statistics of the training texts against NumPy over the same texts."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_lib

from cosmos_jax import measure, pipeline, trained
from cosmos_jax.models import cosmos

LENGTH = 12


@pytest.fixture(scope="module")
def run(tiny, finished):
    return tiny.run(finished)


def tokenised(tiny):
    """Token ids and mask of all training texts, word by word."""
    ids = np.full((tiny_lib.NUM_ROWS["train"], LENGTH), tiny_lib.PAD, np.int32)
    for row, entry in zip(ids, tiny_lib.read_rows(tiny.texts / "train.jsonl"), strict=True):
        words = [tiny_lib.VOCABULARY.index(word) for word in entry["text"].split()]
        row[: len(words) + 2] = [tiny_lib.CLS, *words, tiny_lib.SEP]
    return ids, ids != tiny_lib.PAD


def test_states(tiny, run):
    # 48 texts in batches of 8: one epoch, whatever its order.
    model = cosmos.build(run.config, 60)
    weights = trained.encoder_weights(run)
    ids, mask = tokenised(tiny)
    states = np.asarray(model.bert.apply({"params": weights["bert"]}, ids, mask), np.float64)[mask]
    found = measure.states(run, model, weights)
    np.testing.assert_allclose(found["states_mean"], states.mean(axis=0), atol=1e-5)
    np.testing.assert_allclose(found["states_std"], states.std(axis=0), rtol=1e-4)
    assert found["states_mean"].dtype == found["states_std"].dtype == np.float32


def test_a_dead_feature_is_not_blown_up(run):
    model = cosmos.build(run.config, 60)
    weights = trained.encoder_weights(run)
    weights["bert"] = jax.tree.map(jnp.zeros_like, weights["bert"])
    found = measure.states(run, model, weights)
    np.testing.assert_array_equal(found["states_mean"], 0)
    np.testing.assert_allclose(found["states_std"], 1e-2, rtol=1e-6)


def test_latents_per_slot_and_feature(tiny, run):
    finished = pipeline.finished(run)
    model, weights = finished.model, finished.weights
    ids, mask = tokenised(tiny)
    states = model.bert.apply({"params": weights["bert"]}, ids, mask)
    states = (states - weights["states_mean"]) / weights["states_std"]
    latents = model.compressor.apply({"params": weights["compressor"]}, states, mask)
    latents = np.asarray(latents, np.float64)
    expected = np.sqrt(np.maximum(latents.var(axis=0), 1e-4))
    for found in (
        measure.latents(run, model, weights),
        trained.statistics(run.workdir / "diffusion"),
    ):
        assert found["latents_mean"].shape == (4, 32)
        np.testing.assert_allclose(found["latents_mean"], latents.mean(axis=0), atol=1e-4)
        np.testing.assert_allclose(found["latents_std"], expected, rtol=1e-3)


def test_only_so_many_texts_are_read(tiny, run, monkeypatch):
    few = tiny.run(run.workdir, autoencoder__statistics_texts=19)
    model, weights = cosmos.build(few.config, 60), trained.encoder_weights(few)
    read = []
    original = type(few).training_batches

    def spy(self, batch_size, purpose):
        load = original(self, batch_size, purpose)
        return lambda step: read.append(step) or load(step)

    monkeypatch.setattr(type(few), "training_batches", spy)
    measure.states(few, model, weights)
    assert read == [0, 1]  # 16 of 19 texts: whole batches


@pytest.mark.parametrize("min_count", [1, 9])
def test_vocabulary_of_the_texts(tiny, run, min_count):
    few = tiny.run(
        run.workdir, autoencoder__vocabulary="corpus", autoencoder__vocabulary_min_count=min_count
    )
    ids, mask = tokenised(tiny)
    counts = collections.Counter(ids[mask].tolist())
    expected = {token for token, count in counts.items() if count >= min_count} | {tiny_lib.UNK}
    assert 5 < len(expected) < 60
    found = measure.vocabulary(few)
    assert found.tolist() == sorted(expected)
    assert found.dtype == np.int32


def test_vocabulary_of_the_encoder(run):
    np.testing.assert_array_equal(measure.vocabulary(run), np.arange(60))


def test_head_is_ridge_regression_on_word_embeddings(tiny, run):
    finished = pipeline.finished(run)
    model, weights = finished.model, finished.weights
    ids, mask = tokenised(tiny)
    states = np.asarray(model.text_states(weights, ids, mask), np.float64)[mask]
    words = run.encoder.params["word_embeddings"]["embedding"].astype(np.float64)
    words = words - words.mean(axis=0)
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    # Ridge regression is least squares with rows of sqrt(c) I that ask for zeros.
    extra = np.sqrt(measure.RIDGE * len(states)) * np.eye(32)
    inputs, targets = np.concatenate([states, extra]), words[ids[mask]]
    solution = np.linalg.lstsq(inputs, np.concatenate([targets, np.zeros((32, 32))]), rcond=None)[0]
    kernel = measure.head(run, model, weights)["head_kernel"]
    expected = measure.HEAD_SCALE * solution @ words.T
    np.testing.assert_allclose(kernel, expected, atol=2e-3 * np.abs(expected).max())
    assert np.mean(np.argmax(states @ kernel, axis=1) == ids[mask]) > 0.9
