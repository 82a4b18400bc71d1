"""Scores of texts against counts by hand, and that they move the right way."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_jax import text_metrics
from cosmos_jax.errors import UserError

TEXTS = st.lists(st.lists(st.sampled_from("abcde"), max_size=12).map(" ".join), min_size=1)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("The cat, the CAT.", ["The", "cat", ",", "the", "CAT", "."]),
        ("don't pay $3.50\n\tnow", ["don", "'", "t", "pay", "$", "3", ".", "50", "now"]),
        ("Ærø – café", ["Ærø", "–", "café"]),
    ],
)
def test_words(text, wanted):
    assert text_metrics.words(text) == wanted


def test_diversity_by_hand():
    # Bigrams: a b, b a, a b, b a | a b: 2 of 5. Trigrams: aba, bab, aba: 2 of 3. 4-grams: all.
    assert text_metrics.diversity(["a b a b a", "a b"]) == pytest.approx(2 / 5 * 2 / 3 * 1)


def test_diversity_does_not_join_texts():
    # Joined, "b c" would be a bigram more.
    assert text_metrics.diversity(["a b", "c d e f"]) == 1


def test_diversity_of_texts_too_short_to_tell_is_zero():
    assert text_metrics.diversity(["", "a b c"]) == 0


@given(TEXTS)
def test_repeating_all_texts_divides_diversity_by_eight(texts):
    once = text_metrics.diversity(texts)
    assert 0 <= once <= 1
    assert text_metrics.diversity(texts * 2) == pytest.approx(once / 8)


def test_memorisation_by_hand():
    generated = ["a b c d e", "a b c d", "x"]  # abcd, bcde, abcd
    assert text_metrics.memorisation(generated, ["z a b c d"]) == pytest.approx(2 / 3)
    assert text_metrics.memorisation(generated, ["b c d e z"]) == pytest.approx(1 / 3)
    assert text_metrics.memorisation(generated, ["a b c", "d e"]) == 0
    assert text_metrics.memorisation(generated, ["a b"], n=2) == pytest.approx(2 / 7)


def test_memorisation_reads_training_texts_once():
    generated = ["one two three four five"]
    stream = (text for text in ["zero one two three four", "two three four five"])
    assert text_metrics.memorisation(generated, stream) == 1


def test_memorisation_of_texts_too_short_to_tell_is_zero():
    assert text_metrics.memorisation(["a b c"], ["a b c"]) == 0


@given(TEXTS, TEXTS, TEXTS)
def test_more_training_texts_never_lower_memorisation(texts, training, more):
    fewer = text_metrics.memorisation(texts, training, n=2)
    assert fewer <= text_metrics.memorisation(texts, training + more, n=2)
    whole = text_metrics.memorisation(texts, texts, n=2)
    assert whole == (1 if any(len(text.split()) > 1 for text in texts) else 0)


def test_entropy_by_hand():
    assert text_metrics.unigram_entropy(["a b", "c d"]) == pytest.approx(math.log(4))
    assert text_metrics.unigram_entropy(["a a a", "a"]) == 0
    wanted = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert text_metrics.unigram_entropy(["a a b", "a"]) == pytest.approx(wanted)
    assert text_metrics.unigram_entropy([""]) == 0


def test_rouge_by_hand():
    # Two of three unigrams and one of two bigrams on each side; "the cat" in order.
    scores = text_metrics.rouge(["The cat sat."], ["the cat slept"])
    assert scores["rouge1"] == pytest.approx(100 * 2 / 3)
    assert scores["rouge2"] == pytest.approx(100 / 2)
    assert scores["rougeL"] == pytest.approx(100 * 2 / 3)
    # Precision 2/2 and recall 2/4 make F = 2/3; then the mean with a pair that agrees.
    scores = text_metrics.rouge(["cat the", "x"], ["the cat and dog", "x"])
    assert scores["rouge1"] == pytest.approx((100 * 2 / 3 + 100) / 2)
    # In order, one word of two and of four agree: F = 2 (1/2) (1/4) / (1/2 + 1/4).
    assert scores["rougeL"] == pytest.approx((100 / 3 + 100) / 2)
    assert scores["rouge2"] == 0


def test_rouge_states_its_stemming():
    with_stems = text_metrics.rouge(["dogs running"], ["dog runs"])
    without = text_metrics.rouge(["dogs running"], ["dog runs"], stemming=False)
    assert with_stems["rouge1"] == 100
    assert without["rouge1"] == 0
    assert with_stems["signature"].endswith("|stemming:yes")
    assert without["signature"].endswith("|stemming:no")


def test_bleu_by_hand():
    # Of n-grams in "a b c d e f": 5 of 6, 4 of 5, 3 of 4, 2 of 3 match; equal lengths.
    scores = text_metrics.bleu(["a b c d e f"], ["a b c d e x"])
    assert scores["bleu"] == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # All match, but 5 words stand for 6.
    scores = text_metrics.bleu(["a b c d e"], ["a b c d e f"])
    assert scores["bleu"] == pytest.approx(100 * math.exp(1 - 6 / 5))
    assert "tok:13a" in scores["signature"]
    assert "case:mixed" in scores["signature"]


def test_bleu_pools_over_the_corpus():
    predictions, references = ["a b c d e", "v w x y z"], ["a b c d e", "p q r s t"]
    scores = text_metrics.bleu(predictions, references)
    assert scores["bleu"] == pytest.approx(50)


@pytest.mark.parametrize("score", [text_metrics.rouge, text_metrics.bleu])
def test_closer_predictions_score_higher(score):
    reference = "the quick brown fox jumps over the lazy dog"
    nearer = (
        "a slow cat",
        "the quick cat jumps over a dog",
        "the quick brown fox jumps",
        reference,
    )
    key = "bleu" if score is text_metrics.bleu else "rougeL"
    scores = [score([prediction], [reference])[key] for prediction in nearer]
    assert scores == sorted(set(scores))
    assert scores[-1] == pytest.approx(100)


@pytest.mark.parametrize(
    "score",
    [
        lambda: text_metrics.diversity([]),
        lambda: text_metrics.unigram_entropy([]),
        lambda: text_metrics.memorisation([], ["a"]),
        lambda: text_metrics.memorisation(["a"], iter([])),
        lambda: text_metrics.rouge([], []),
        lambda: text_metrics.bleu([], []),
    ],
)
def test_nothing_to_score_is_an_error(score):
    with pytest.raises(UserError, match=r"^no "):
        score()


@pytest.mark.parametrize("score", [text_metrics.rouge, text_metrics.bleu])
def test_pairs_must_match(score):
    with pytest.raises(ValueError, match="2 predictions for 1 references"):
        score(["a", "b"], ["a"])
