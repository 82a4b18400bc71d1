"""Scores of texts against counts by hand, and that they move the right way."""

import math
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_jax.errors import UserError
from cosmos_jax.scores import ngrams

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
    assert ngrams.words(text) == wanted


def test_diversity_by_hand():
    # Bigrams: a b, b a, a b, b a | a b: 2 of 5. Trigrams: aba, bab, aba: 2 of 3. 4-grams: all.
    assert ngrams.diversity(["a b a b a", "a b"]) == pytest.approx(2 / 5 * 2 / 3 * 1)


def test_diversity_does_not_join_texts():
    # Joined, "b c" would be a bigram more.
    assert ngrams.diversity(["a b", "c d e f"]) == 1


def test_diversity_of_texts_too_short_to_tell_is_zero():
    assert ngrams.diversity(["", "a b c"]) == 0


@given(TEXTS)
def test_repeating_all_texts_divides_diversity_by_eight(texts):
    once = ngrams.diversity(texts)
    assert 0 <= once <= 1
    assert ngrams.diversity(texts * 2) == pytest.approx(once / 8)


def test_memorisation_by_hand():
    generated = ["a b c d e", "a b c d", "x"]  # abcd, bcde, abcd
    assert ngrams.memorisation(generated, ["z a b c d"]).value == pytest.approx(2 / 3)
    assert ngrams.memorisation(generated, ["b c d e z"]).value == pytest.approx(1 / 3)
    assert ngrams.memorisation(generated, ["a b c", "d e"]).value == 0
    assert ngrams.memorisation(generated, ["a b"], n=2).value == pytest.approx(2 / 7)


def test_memorisation_reads_training_texts_once():
    generated = ["one two three four five"]
    stream = (text for text in ["zero one two three four", "two three four five"])
    assert ngrams.memorisation(generated, stream).value == 1


def test_memorisation_of_texts_too_short_to_tell_is_zero():
    assert ngrams.memorisation(["a b c"], ["a b c"]).value == 0


@given(TEXTS, TEXTS, TEXTS)
def test_more_training_texts_never_lower_memorisation(texts, training, more):
    fewer = ngrams.memorisation(texts, training, n=2).value
    assert fewer <= ngrams.memorisation(texts, training + more, n=2).value
    whole = ngrams.memorisation(texts, texts, n=2).value
    assert whole == (1 if any(len(text.split()) > 1 for text in texts) else 0)


def test_entropy_by_hand():
    assert ngrams.unigram_entropy(["a b", "c d"]) == pytest.approx(math.log(4))
    assert ngrams.unigram_entropy(["a a a", "a"]) == 0
    wanted = -(3 / 4 * math.log(3 / 4) + 1 / 4 * math.log(1 / 4))
    assert ngrams.unigram_entropy(["a a b", "a"]) == pytest.approx(wanted)
    assert ngrams.unigram_entropy([""]) == 0


def test_rouge_by_hand():
    # Two of three unigrams and one of two bigrams on each side; "the cat" in order.
    scores = ngrams.rouge(["The cat sat."], ["the cat slept"])
    assert scores["rouge1"].value == pytest.approx(100 * 2 / 3)
    assert scores["rouge2"].value == pytest.approx(100 / 2)
    assert scores["rougeL"].value == pytest.approx(100 * 2 / 3)
    # Precision 2/2 and recall 2/4 make F = 2/3; then the mean with a pair that agrees.
    scores = ngrams.rouge(["cat the", "x"], ["the cat and dog", "x"])
    assert scores["rouge1"].value == pytest.approx((100 * 2 / 3 + 100) / 2)
    # In order, one word of two and of four agree: F = 2 (1/2) (1/4) / (1/2 + 1/4).
    assert scores["rougeL"].value == pytest.approx((100 / 3 + 100) / 2)
    assert scores["rouge2"].value == 0


def test_rouge_states_its_stemming():
    with_stems = ngrams.rouge(["dogs running"], ["dog runs"])
    without = ngrams.rouge(["dogs running"], ["dog runs"], stemming=False)
    assert with_stems["rouge1"].value == 100
    assert without["rouge1"].value == 0
    assert with_stems["rouge1"].signature().endswith("|stemming:yes")
    assert without["rouge1"].signature().endswith("|stemming:no")


def test_bleu_by_hand():
    # Of n-grams in "a b c d e f": 5 of 6, 4 of 5, 3 of 4, 2 of 3 match; equal lengths.
    scores = ngrams.bleu(["a b c d e f"], ["a b c d e x"])
    assert scores.value == pytest.approx(100 * (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25)
    # All match, but 5 words stand for 6.
    scores = ngrams.bleu(["a b c d e"], ["a b c d e f"])
    assert scores.value == pytest.approx(100 * math.exp(1 - 6 / 5))
    assert "tok:13a" in scores.signature()
    assert "case:mixed" in scores.signature()


def test_bleu_pools_over_the_corpus():
    predictions, references = ["a b c d e", "v w x y z"], ["a b c d e", "p q r s t"]
    scores = ngrams.bleu(predictions, references)
    assert scores.value == pytest.approx(50)


@pytest.mark.parametrize("score", [ngrams.rouge, ngrams.bleu])
def test_closer_predictions_score_higher(score):
    reference = "the quick brown fox jumps over the lazy dog"
    nearer = (
        "a slow cat",
        "the quick cat jumps over a dog",
        "the quick brown fox jumps",
        reference,
    )
    scores = []
    for prediction in nearer:
        found = score([prediction], [reference])
        scores.append((found["rougeL"] if isinstance(found, dict) else found).value)
    assert scores == sorted(set(scores))
    assert scores[-1] == pytest.approx(100)


@pytest.mark.parametrize(
    "score",
    [
        lambda: ngrams.diversity([]),
        lambda: ngrams.unigram_entropy([]),
        lambda: ngrams.memorisation([], ["a"]),
        lambda: ngrams.memorisation(["a"], iter([])),
        lambda: ngrams.rouge([], []),
        lambda: ngrams.bleu([], []),
    ],
)
def test_nothing_to_score_is_an_error(score):
    with pytest.raises(UserError, match=r"^no "):
        score()


@pytest.mark.parametrize("score", [ngrams.rouge, ngrams.bleu])
def test_pairs_must_match(score):
    with pytest.raises(UserError, match="2 predictions for 1 references"):
        score(["a", "b"], ["a"])


def test_scores_carry_the_error_of_their_texts():
    predictions = ["a b c d", "a b", "x y", "c d e"] * 10
    references = ["a b c d"] * 40
    pairs = [100 * f for f in (1, 2 / 3, 0, 2 * 2 / 7)] * 10
    score = ngrams.rouge(predictions, references)["rouge1"]
    assert score.value == pytest.approx(statistics.mean(pairs))
    assert score.spread == pytest.approx(statistics.stdev(pairs) / 40**0.5)
    # Ten groups of four texts; leaving one group out changes the share of known 2-grams.
    score = ngrams.memorisation([*["a b"] * 36, *["x y"] * 4], ["a b"], n=2)
    shares = [(36 - left) / 36 for left in [*[3] * 4, *[4] * 6]]
    assert score.spread == pytest.approx(9**0.5 * statistics.pstdev(shares))
    assert ngrams.bleu(predictions, references).spread > 0
    assert ngrams.bleu(predictions[:9], references[:9]).spread is None


def test_spacy_splits_contractions():
    pytest.importorskip("spacy", reason="spaCy is not installed")
    assert ngrams.spacy_words("I don't  know.") == ["I", "do", "n't", "know", "."]
