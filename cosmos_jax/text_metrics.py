"""Scores of texts that need no model: pure functions on lists of strings.

    (1) Div = product over n = 2, 3, 4 of (different n-grams / all n-grams), pooled over texts
    (2) Mem = share of the generated n-grams that occur in the training texts
    (3) H   = -sum over words w of p(w) log p(w), p being frequencies pooled over texts

All three depend on how many texts there are, so compare equal numbers only. A word is a
match of WORD: letters and digits, or one punctuation mark. The paper counts spaCy's
English tokens, which split "don't" elsewhere; its Div and Mem are close to these, not equal.
"""

import collections
import importlib.metadata
import math
import re
from collections.abc import Iterable, Iterator, Sequence

import sacrebleu
from rouge_score import rouge_scorer

from cosmos_jax.errors import UserError

WORD = re.compile(r"\w+|[^\w\s]")
ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")


def words(text: str) -> list[str]:
    """The words of a text, in their own case."""
    return WORD.findall(text)


def diversity(texts: Sequence[str]) -> float:
    """Equation (1), from 0 to 1; 0 if no text has four words. UserError without texts."""
    _require(texts, "texts")
    product = 1.0
    for n in (2, 3, 4):
        counts = _count(texts, n)
        product *= len(counts) / max(1, counts.total())
    return product


def memorisation(texts: Sequence[str], training_texts: Iterable[str], n: int = 4) -> float:
    """Equation (2), from 0 to 1, repeated n-grams counted each time; 0 if there are none.

    Reads the training texts once and keeps only n-grams that were generated. UserError
    without texts on either side.
    """
    _require(texts, "texts")
    generated = _count(texts, n)
    seen: set[tuple[str, ...]] = set()
    text = None
    for text in training_texts:
        seen.update(ngram for ngram in _ngrams(text, n) if ngram in generated)
    if text is None:
        raise UserError("no training texts to score against")
    return sum(generated[ngram] for ngram in seen) / max(1, generated.total())


def unigram_entropy(texts: Sequence[str]) -> float:
    """Equation (3) in nats; 0 if there are no words. UserError without texts."""
    _require(texts, "texts")
    counts = _count(texts, 1)
    total = counts.total()
    return math.fsum(count / total * math.log(total / count) for count in counts.values())


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, stemming: bool = True
) -> dict[str, float | str]:
    """Means over pairs of the F-measures of ROUGE-1, 2 and L, times 100, and their signature.

    `stemming` reduces words to Porter stems first, as is usual for summaries. UserError
    without pairs, ValueError if the two are not equally many.
    """
    _require_pairs(predictions, references)
    scorer = rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=stemming)
    pairs = [scorer.score(r, p) for p, r in zip(predictions, references, strict=True)]
    means: dict[str, float | str] = {
        name: 100 * math.fsum(pair[name].fmeasure for pair in pairs) / len(pairs)
        for name in ROUGE_TYPES
    }
    version = importlib.metadata.version("rouge-score")
    return means | {"signature": f"rouge-score:{version}|stemming:{'yes' if stemming else 'no'}"}


def bleu(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """BLEU-4 of the corpus, from 0 to 100, and sacrebleu's signature of it.

    UserError without pairs, ValueError if the two are not equally many.
    """
    _require_pairs(predictions, references)
    metric = sacrebleu.BLEU()
    score = metric.corpus_score(predictions, [references])
    return {"bleu": score.score, "signature": str(metric.get_signature())}


def _ngrams(text: str, n: int) -> Iterator[tuple[str, ...]]:
    found = words(text)
    return zip(*(found[start:] for start in range(n)), strict=False)


def _count(texts: Iterable[str], n: int) -> collections.Counter[tuple[str, ...]]:
    return collections.Counter(ngram for text in texts for ngram in _ngrams(text, n))


def _require(texts: Sequence[str], what: str) -> None:
    if not texts:
        raise UserError(f"no {what} to score")


def _require_pairs(predictions: Sequence[str], references: Sequence[str]) -> None:
    _require(predictions, "predictions")
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
