"""J and its factors: by hand, by direction, and with a classifier."""

import numpy as np
import pytest
import tiny_bert
from tiny import write_encoder

from cosmos_jax import classifier, encoder
from cosmos_jax.errors import UserError
from cosmos_jax.scores import detoxification
from cosmos_jax.scores.detoxification import Factor, cosine, j_score, naive_bayes, ngram_rank
from cosmos_jax.scores.embeddings import pooled

SOURCES = [
    "the stupid farmer takes a bird",
    "that stupid baker carries the lamp",
    "a king leaves the stupid road",
    "one stupid child sees a tree",
]
REFERENCES = [text.replace("stupid", "quiet") for text in SOURCES]


def fixed(name, *numbers):
    return Factor(name, lambda texts, *_: np.array(numbers)[: len(texts)])


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return encoder.load(str(write_encoder(tmp_path_factory.mktemp("j") / "encoder")))


def test_by_hand():
    scores = j_score(
        ["a", "b"],
        ["c", "d"],
        style=fixed("S", 1.0, 0.5),
        similarity=fixed("M", 0.8, 0.2),
        fluency=fixed("F", 0.5, 1.0),
    )
    values = {name: score.value for name, score in scores.items()}
    # The mean of the products, (0.4 + 0.1) / 2, not the product of the means.
    assert values == pytest.approx({"j": 0.25, "style": 0.75, "similarity": 0.5, "fluency": 0.75})
    # Deviations 0.15 of two numbers: sqrt(2 * 0.15 ** 2 / 1) / sqrt(2).
    assert scores["j"].spread == pytest.approx(0.15)
    assert scores["j"].signature() == "style:S|similarity:M|fluency:F"
    assert scores["fluency"].signature() == "by:F"


def test_similarity_is_given_both_sides():
    seen = []

    def measure(texts, sources):
        seen.append((texts, sources))
        return np.ones(1)

    one = fixed("one", 1.0)
    j_score(["a"], ["b"], style=one, similarity=Factor("both", measure), fluency=one)
    assert seen == [(["a"], ["b"])]


def test_naive_bayes_by_hand():
    style = naive_bayes(["bad bad dog", "Bad"], ["good dog"]).measure(
        ["bad", "GOOD dog", "dog dog", "unheard of", "good bad"]
    )
    # Words: bad 3, dog 1 of 4 against good 1, dog 1 of 2, of a vocabulary of 3; prior 2 to 1.
    toxic = {"bad": 4 / 7, "dog": 2 / 7, "good": 1 / 7}
    clean = {"bad": 1 / 5, "dog": 2 / 5, "good": 2 / 5}
    expected = []
    for text in ("bad", "good dog", "dog dog", "", "good bad"):
        p, q = 2 / 3, 1 / 3
        for word in text.split():
            p, q = p * toxic[word], q * clean[word]
        expected.append(q / (p + q))
    np.testing.assert_allclose(style, expected, atol=1e-12)


def test_naive_bayes_of_a_long_text_is_still_a_number():
    style = naive_bayes(SOURCES, REFERENCES).measure(["stupid " * 10_000, "quiet " * 10_000])
    np.testing.assert_array_equal(style, [0, 1])


def test_cosine_by_numpy(small):
    texts, sources = REFERENCES[:2], SOURCES[2:]
    ours, theirs = pooled(small, texts), pooled(small, sources)
    expected = [u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in zip(ours, theirs, strict=True)]
    actual = cosine(small).measure(texts, sources)
    np.testing.assert_allclose(actual, np.clip(expected, 0, 1), atol=1e-6)
    np.testing.assert_allclose(cosine(small).measure(texts, texts), 1, atol=1e-6)


def test_opposite_texts_have_no_negative_similarity(small, monkeypatch):
    vectors = {"up": [1.0, 0.0], "down": [-1.0, 0.0], "aside": [1.0, 1.0]}
    monkeypatch.setattr(
        detoxification, "pooled", lambda _, texts: np.array([vectors[text] for text in texts])
    )
    measured = cosine(small).measure(["up", "up"], ["down", "aside"])
    np.testing.assert_allclose(measured, [0, 0.5**0.5])


def test_ngram_rank():
    rng = np.random.default_rng(0)
    animals, verbs = ["dog", "cat", "fox", "cow"], ["runs", "sleeps", "eats"]
    references = [
        f"the {rng.choice(animals)} {rng.choice(verbs)} and the {rng.choice(animals)} waits"
        for _ in range(80)
    ]
    fluency = ngram_rank(references)
    real = fluency.measure(references[1::2])
    assert real.min() > 0
    assert 0.5 <= real.mean() < 0.6  # Uniform, and a little more for ties.
    shuffled = [" ".join(rng.permutation(text.split())) for text in references[1::2]]
    assert fluency.measure(shuffled).mean() < 0.1
    np.testing.assert_array_equal(fluency.measure(["runs the waits the", "sky sea sun"]), 0)
    # The most common words in their most common order are ahead of all.
    likeliest = max(references[1::2], key=lambda text: fluency.measure([text])[0])
    assert fluency.measure([likeliest])[0] == 1


def test_direction(small):
    factors = dict(
        style=naive_bayes(SOURCES, REFERENCES),
        similarity=cosine(small),
        fluency=ngram_rank([*SOURCES, *REFERENCES]),
    )
    copied = j_score(SOURCES, SOURCES, **factors)
    good = j_score(REFERENCES, SOURCES, **factors)
    unrelated = j_score(["night and winter behind two hills"] * 4, SOURCES, **factors)
    assert copied["style"].value < 0.5 < good["style"].value
    assert copied["similarity"].value > good["similarity"].value > unrelated["similarity"].value
    assert good["j"].value > max(copied["j"].value, unrelated["j"].value)
    assert all(" " in name and "offline" in name for name in good["j"].flags.values())


def test_a_classifier_as_a_factor(tmp_path):
    directory = tiny_bert.write(
        tmp_path / "model",
        "Roberta",
        "ForSequenceClassification",
        id2label={0: "toxic", 1: "neutral", 2: "other"},
    )
    model = classifier.load(str(directory))
    expected = classifier.probabilities(model, tiny_bert.TEXTS)[:, 1]
    for label in ("neutral", "1"):
        factor = detoxification.classified(model, label)
        np.testing.assert_array_equal(factor.measure(tiny_bert.TEXTS), expected)
        assert factor.name == f"{directory}[neutral] {model.fingerprint[:12]}"


@pytest.mark.parametrize(
    ("texts", "sources", "message"),
    [
        ([], [], "there are no texts"),
        (["a"], [], "1 texts for 0 sources"),
        (["a", " "], ["b", "c"], "text 2 is empty"),
        (["a"], [""], "source 1 is empty"),
    ],
)
def test_bad_input(texts, sources, message):
    one = fixed("one", 1.0, 1.0)
    with pytest.raises(UserError, match=message):
        j_score(texts, sources, style=one, similarity=one, fluency=one)


@pytest.mark.parametrize("numbers", [(1.5,), (-0.1,), (float("nan"),), ()])
def test_a_factor_that_is_no_probability(numbers):
    one, bad = fixed("one", 1.0), fixed("bad", *numbers)
    with pytest.raises(ValueError, match="bad does not answer one number"):
        j_score(["a"], ["b"], style=one, similarity=one, fluency=bad)


def test_stand_ins_need_something_to_learn_from():
    with pytest.raises(UserError, match="no sources or no references"):
        naive_bayes([], ["a"])
    with pytest.raises(UserError, match="needs 2 references or more, not 1"):
        ngram_rank(["a"])
