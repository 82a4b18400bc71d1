"""The n-gram model against nltk, against its equations written out, and as a distribution."""

import gzip
import itertools
import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.lm import KneserNeyInterpolated

import cosmos_jax
from cosmos_jax.errors import UserError
from cosmos_jax.scores.ngram_model import NgramModel, ngram_perplexity
from cosmos_jax.scores.ngrams import words

CORPUS = Path(cosmos_jax.__file__).parent / "data/corpus/valid.jsonl.gz"
TEXTS = st.lists(
    st.lists(st.sampled_from("abcd"), min_size=1, max_size=8).map(" ".join), min_size=1, max_size=8
)
FITTED = ["a b a b c", "b a c", "a b a", "c c a b", "a"]
OTHERS = ["a b a b c", "c b a", "", "b", "x a b", "a x x b c c c"]


@pytest.fixture(scope="module")
def corpus():
    with gzip.open(CORPUS, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in itertools.islice(lines, 900)]


def padded(tokens, order):
    return ["<s>"] * (order - 1) + tokens + ["</s>"]


def by_equations(texts, text, order, discounts=None):
    """Log probabilities by equations (1) and (2), counting anew for every word."""
    occurrences = []
    for some in texts:
        tokens = padded(words(some), order)
        occurrences += [tuple(tokens[i - order : i]) for i in range(order, len(tokens) + 1)]
    vocabulary = {word for some in texts for word in words(some)} | {"</s>", "<unk>"}

    def counted(n):  # every n-gram as often as c says
        if n == order:
            return occurrences
        longer = {gram[order - n - 1 :] for gram in occurrences}
        return [gram[1:] for gram in longer]

    def discount(n):
        if discounts is not None:
            return discounts[n - 1]
        grams = counted(n)
        times = [grams.count(gram) for gram in set(grams)]
        once, twice = times.count(1), times.count(2)
        return once / (once + 2 * twice) if once and twice else 0.5

    def probability(context, word):
        n = len(context) + 1
        shorter = probability(context[1:], word) if n > 1 else 1 / len(vocabulary)
        after = [gram[-1] for gram in counted(n) if gram[:-1] == context]
        if not after:
            return shorter
        kept = max(0, after.count(word) - discount(n))
        return (kept + discount(n) * len(set(after)) * shorter) / len(after)

    tokens = padded([w if w in vocabulary else "<unk>" for w in words(text)], order)
    return [
        math.log(probability(tuple(tokens[i - order + 1 : i]), tokens[i]))
        for i in range(order - 1, len(tokens))
    ]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("discounted", [False, True])
def test_agrees_with_the_equations(order, discounted):
    discounts = (0.4, 0.6, 0.8, 0.9)[:order] if discounted else None
    model = NgramModel(order, discounts).fit(FITTED)
    for text in OTHERS:
        wanted = by_equations(FITTED, text, order, discounts)
        np.testing.assert_allclose(model.log_probs(text), wanted, rtol=1e-12)


def test_agrees_with_the_equations_on_prose(corpus):
    fitted, other = corpus[:12], corpus[13]
    wanted = by_equations(fitted, other, 3)
    np.testing.assert_allclose(NgramModel().fit(fitted).log_probs(other), wanted, rtol=1e-12)


def test_agrees_with_nltk(corpus):
    # nltk has one discount for all orders above the first, where it has none.
    order, discount = 3, 0.7
    fitted = corpus[:30]

    def everygrams(text):
        tokens = padded(words(text), order)
        grams = (tuple(tokens[i : i + n]) for n in (1, 2, 3) for i in range(len(tokens) - n + 1))
        return [gram for gram in grams if gram[-1] != "<s>"]

    theirs = KneserNeyInterpolated(order, discount=discount)
    theirs.fit(map(everygrams, fitted), sorted({w for t in fitted for w in words(t)} | {"</s>"}))
    ours = NgramModel(order, (0, discount, discount)).fit(fitted)
    tokens = [word for word in words(corpus[2]) + words(corpus[40]) if word in ours.vocabulary]
    assert len(tokens) > 40
    around = padded(tokens, order)
    wanted = [
        theirs.logscore(around[i], around[i - 2 : i]) * math.log(2) for i in range(2, len(around))
    ]
    np.testing.assert_allclose(ours.log_probs(" ".join(tokens)), wanted, rtol=1e-9)


def test_bigrams_by_hand():
    # Bigrams: <s>a ab b</s> <s>a a</s>. Before a: 1 kind of word; b: 1; </s>: 2.
    model = NgramModel(2, (0.5, 0.5)).fit(["a b", "a"])
    a, end = (0.5 + 1.5 * 0.25) / 4, (1.5 + 1.5 * 0.25) / 4  # 4 in the vocabulary
    unknown = 1.5 * 0.25 / 4
    wanted = [(1.5 + 0.5 * a) / 2, (0.5 + 1.0 * end) / 2]
    np.testing.assert_allclose(model.log_probs("a"), np.log(wanted))
    # Nothing was seen after an unknown word: its successor is scored without context.
    wanted = [0.5 * unknown / 2, a, (0.5 + 1.0 * end) / 2]
    np.testing.assert_allclose(model.log_probs("zebra a"), np.log(wanted))


@given(TEXTS, TEXTS, st.integers(1, 4))
def test_next_words_sum_to_one(fitted, prefixes, order):
    model = NgramModel(order).fit(fitted)
    for prefix in [*prefixes, "a unseen", ""]:
        at = len(words(prefix))
        end = math.exp(model.log_probs(prefix)[at])
        following = (model.vocabulary - {"</s>", "<unk>"}) | {"unseen"}
        nexts = [math.exp(model.log_probs(f"{prefix} {word}")[at]) for word in following]
        assert end + math.fsum(nexts) == pytest.approx(1, abs=1e-9)


def test_a_model_can_be_fitted_anew():
    model = NgramModel().fit(["x y z", "y z x"])
    again = model.fit(FITTED).log_probs("a b a")
    np.testing.assert_array_equal(again, NgramModel().fit(FITTED).log_probs("a b a"))


def test_perplexity_is_the_mean_over_both_halves():
    references, texts = ["a b c", "b c", "a c", "c a b", "b"], ["a b", "c"]
    halves = ["a b c", "a c", "b"], ["b c", "c a b"]

    def perplexity(fitted, scored):
        log_probs = [p for text in scored for p in by_equations(fitted, text, 3)]
        return math.exp(-sum(log_probs) / len(log_probs))

    score = ngram_perplexity(texts, references)
    values = [perplexity(half, texts) for half in halves]
    assert score.value == pytest.approx(sum(values) / 2)
    assert score.spread == pytest.approx(abs(values[0] - values[1]) / math.sqrt(2))
    real = (perplexity(halves[0], halves[1]) + perplexity(halves[1], halves[0])) / 2
    assert score.real == pytest.approx(real)
    assert score.flags["order"] == 3
    assert score.flags["smoothing"] == "interpolated Kneser-Ney"


def test_a_shorter_order_is_another_score(corpus):
    unigrams = ngram_perplexity(corpus[::3], corpus[1::3], order=1)
    trigrams = ngram_perplexity(corpus[::3], corpus[1::3])
    assert unigrams.signature() != trigrams.signature()
    assert trigrams.value < 0.8 * unigrams.value


def test_texts_of_the_same_source_score_as_the_references(corpus):
    texts, references = corpus[::3], corpus[1::3] + corpus[2::3]
    random.Random(0).shuffle(references)
    score = ngram_perplexity(texts, references)
    assert score.value == pytest.approx(score.real, rel=0.2)


def test_worse_texts_score_higher(corpus):
    rng = random.Random(0)
    texts, references = corpus[::3], corpus[1::3]

    def shuffled(text, share):
        found = words(text)
        places = rng.sample(range(len(found)), int(share * len(found)))
        for place, word in zip(places, [found[i] for i in sorted(places)], strict=True):
            found[place] = word
        return " ".join(found)

    def misspelt(text):
        return " ".join(word[::-1] if len(word) > 3 else word for word in words(text))

    ladder = [
        references,
        texts,
        [shuffled(text, 0.5) for text in texts],
        [shuffled(text, 1) for text in texts],
    ]
    values = [ngram_perplexity(rung, references).value for rung in ladder]
    assert values == sorted(values)
    assert values[3] > 1.5 * values[1] > 1.5 * values[0]
    assert ngram_perplexity([misspelt(text) for text in texts], references).value > 2 * values[1]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda: NgramModel().fit([]), "^no texts to fit"),
        (lambda: NgramModel().fit(["", " "]), "^none of the 2 texts"),
        (lambda: ngram_perplexity([], ["a", "b"]), "^no texts to score"),
        (lambda: ngram_perplexity(["a"], []), "^0 references"),
        (lambda: ngram_perplexity(["a"], ["a"]), "^1 references"),
        (lambda: ngram_perplexity(["a", " "], ["a", "b"]), "^texts: text 2 has no word"),
        (lambda: ngram_perplexity(["a"], ["a", "b", ""]), "^references: text 3 has no word"),
    ],
)
def test_bad_input_is_an_error(score, message):
    with pytest.raises(UserError, match=message):
        score()


def test_discounts_must_fit_the_order():
    with pytest.raises(ValueError, match="order 3"):
        NgramModel(3, (0.5, 0.5))
