"""Classifiers against those of transformers with the same files."""

import json

import numpy as np
import pytest
import safetensors.numpy
import tiny_bert

from cosmos_jax import classifier
from cosmos_jax.errors import UserError

LABELS = {0: "toxic", 1: "neutral", 2: "other"}


@pytest.fixture(params=["Bert", "Roberta"])
def family(request):
    return request.param


def write(tmp_path, family, kind="ForSequenceClassification", **changes):
    return tiny_bert.write(tmp_path / "model", family, kind, **changes)


def their_logits(directory) -> np.ndarray:
    import torch
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(str(directory)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    rows = []
    for text in tiny_bert.TEXTS:
        ids = tokenizer(text, truncation=True, max_length=24, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            rows.append(model(ids).logits[0].numpy())
    return np.array(rows, np.float64)


def test_probabilities(tmp_path, family):
    directory = write(tmp_path, family, id2label=LABELS)
    logits = their_logits(directory)
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    model = classifier.load(str(directory))
    actual = classifier.probabilities(model, tiny_bert.TEXTS)
    assert actual.shape == (5, 3)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.ptp(actual, axis=0).max() > 0.05  # Or any answer would do.
    assert model.labels == ("toxic", "neutral", "other")


def test_labels_that_do_not_exclude_each_other(tmp_path, family):
    directory = write(tmp_path, family, problem_type="multi_label_classification")
    expected = 1 / (1 + np.exp(-their_logits(directory)))
    actual = classifier.probabilities(classifier.load(str(directory)), tiny_bert.TEXTS)
    np.testing.assert_allclose(actual, expected, atol=1e-5)
    assert np.abs(actual.sum(axis=1) - 1).max() > 0.1


def test_labels(tmp_path):
    directory = write(tmp_path, "Bert", id2label=LABELS)
    model = classifier.load(str(directory))
    assert [model.index(label) for label in ("toxic", "other", "1")] == [0, 2, 1]
    for label in ("polite", "3", "-1"):
        with pytest.raises(UserError, match=f"no label '{label}'; it has toxic, neutral, other"):
            model.index(label)
    config = json.loads((directory / "config.json").read_text())
    del config["id2label"]
    (directory / "config.json").write_text(json.dumps(config))
    assert classifier.load(str(directory)).labels == ("LABEL_0", "LABEL_1", "LABEL_2")


def test_a_model_without_a_head(tmp_path, family):
    directory = write(tmp_path, family, "Model")
    with pytest.raises(UserError, match=r"classifier weights: tensor .*dense.weight is missing"):
        classifier.load(str(directory))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("bert.pooler.dense.weight", (24, 23), r"has shape \[24, 23\], but .* asks for \[24, 24\]"),
        ("classifier.weight", (4, 24), r"has shape \[4, 24\], but .* asks for \[3, 24\]"),
    ],
)
def test_a_head_that_does_not_fit(tmp_path, name, shape, message):
    directory = write(tmp_path, "Bert")
    path = directory / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file({**tensors, name: np.zeros(shape, np.float32)}, path)
    with pytest.raises(UserError, match=message) as error:
        classifier.load(str(directory))
    assert str(directory) in str(error.value)


def test_a_regression_is_no_classifier(tmp_path):
    directory = write(tmp_path, "Bert", num_labels=1)
    with pytest.raises(UserError, match="one output is a regression"):
        classifier.load(str(directory))


def test_nothing_there():
    with pytest.raises(UserError, match="classifier '/no/such': there is no such directory"):
        classifier.load("/no/such")
