"""Scores of texts from their n-grams.

    (1) Div = product over n = 2, 3, 4 of (different n-grams / all n-grams), pooled over texts
    (2) Mem = share of the generated n-grams that occur in the training texts
    (3) H   = -sum over words w of p(w) log p(w), p being frequencies pooled over texts

All three depend on how many texts there are, so compare equal numbers only. By default a word
is a match of WORD: letters and digits, or one punctuation mark. The paper counts spaCy's English
tokens (`SPLITTERS["spacy"]`), which split "don't" elsewhere; its Div and Mem are close, not equal.
"""

import collections
import functools
import importlib.metadata
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import sacrebleu

from cosmos_jax.errors import UserError
from cosmos_jax.scores.score import JACKKNIFE, Flag, Score, jackknife, mean

WORD = re.compile(r"\w+|[^\w\s]")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")

Split = Callable[[str], list[str]]


def words(text: str) -> list[str]:
    """The words of a text, in their own case."""
    return WORD.findall(text)


def spacy_words(text: str) -> list[str]:
    """spaCy's English tokens, white space left out; UserError if spaCy is not installed."""
    return [token.text for token in _spacy()(text) if not token.is_space]


@functools.cache
def _spacy():
    try:
        import spacy
    except ImportError as error:
        raise UserError(
            "words 'spacy' need spaCy: pip install spacy, or take words 'regex'"
        ) from error
    return spacy.blank("en")


SPLITTERS: dict[str, Split] = {"regex": words, "spacy": spacy_words}


def diversity(texts: Sequence[str], split: Split = words) -> float:
    """Equation (1), from 0 to 1; 0 if no text has four words. UserError without texts."""
    _require(texts, "texts")
    product = 1.0
    for n in (2, 3, 4):
        counts = _count(texts, n, split)
        product *= len(counts) / max(1, counts.total())
    return product


def memorisation(
    texts: Sequence[str], training_texts: Iterable[str], split: Split = words, n: int = 4
) -> Score:
    """Equation (2), from 0 to 1, repeated n-grams counted each time; 0 if there are none.

    Reads the training texts once and keeps only n-grams that were generated. UserError
    without texts on either side.
    """
    _require(texts, "texts")
    generated = _count(texts, n, split)
    seen: set[tuple[str, ...]] = set()
    count = 0
    for text in training_texts:
        count += 1
        seen.update(ngram for ngram in _ngrams(text, n, split) if ngram in generated)
    if not count:
        raise UserError("no training texts to score against")
    found = [[ngram in seen for ngram in _ngrams(text, n, split)] for text in texts]
    known, total = np.array([(sum(row), len(row)) for row in found]).T

    def share(indices: np.ndarray | slice) -> float:
        return float(known[indices].sum() / max(1, total[indices].sum()))

    return Score(
        share(slice(None)),
        {"n": n, "training_texts": count},
        spread=jackknife(share, len(texts)),
        spread_over=JACKKNIFE,
    )


def unigram_entropy(texts: Sequence[str], split: Split = words) -> float:
    """Equation (3) in nats; 0 if there are no words. UserError without texts."""
    _require(texts, "texts")
    counts = _count(texts, 1, split)
    total = counts.total()
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, stemming: bool = True
) -> dict[str, Score]:
    """Means over pairs of the F-measures of ROUGE-1, 2 and L, times 100.

    `stemming` reduces words to Porter stems first, as is usual for summaries. UserError
    without pairs or if the two are not equally many.
    """
    from rouge_score import rouge_scorer  # loads SciPy's statistics, which takes a second

    _require_pairs(predictions, references)
    scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=stemming)
    pairs = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    flags: dict[str, Flag] = {
        "rouge-score": importlib.metadata.version("rouge-score"),
        "stemming": stemming,
    }
    return {
        name: Score(flags=flags, **mean([100 * pair[name].fmeasure for pair in pairs], "pairs"))
        for name in ROUGE_TYPES
    }


def bleu(predictions: Sequence[str], references: Sequence[str]) -> Score:
    """BLEU-4 of the corpus by sacrebleu, from 0 to 100; its flags are those of sacrebleu.

    UserError without pairs or if the two are not equally many.
    """
    _require_pairs(predictions, references)
    metric = sacrebleu.BLEU()

    def score(indices: Sequence[int]) -> float:
        some = [predictions[i] for i in indices], [references[i] for i in indices]
        return metric.corpus_score(some[0], [some[1]]).score

    value = score(range(len(predictions)))
    flags = dict(part.split(":", 1) for part in str(metric.get_signature()).split("|"))
    spread = jackknife(lambda indices: score(indices.tolist()), len(predictions))
    return Score(value, flags, spread=spread, spread_over=JACKKNIFE)


def _ngrams(text: str, n: int, split: Split) -> Iterator[tuple[str, ...]]:
    found = split(text)
    return zip(*(found[start:] for start in range(n)), strict=False)


def _count(texts: Iterable[str], n: int, split: Split) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(ngram for text in texts for ngram in _ngrams(text, n, split))


def _require(texts: Sequence[str], what: str) -> None:
    if not texts:
        raise UserError(f"no {what} to score")


def _require_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    _require(predictions, "predictions")
    if len(predictions) != len(references):
        raise UserError(f"{len(predictions)} predictions for {len(references)} references")
