"""Perplexity under an n-gram model fitted on references: fluency without a neural model.

Interpolated Kneser-Ney smoothing (Chen & Goodman 1999). For a word w after the context h,

    (1) p_n(w | h) = (max(0, c(h w) - D_n) + D_n T(h) p_{n-1}(w | h without its first word)) / c(h)

where c(h) = sum over w of c(h w), T(h) is the number of different words after h, and
p_n = p_{n-1} if h was never seen. In the highest order c counts occurrences; below it, how
many different words stand before h w. p_0 is uniform over the vocabulary: the words of the
fitting texts, the end of a text and one for all other words. That last one has no
count, so a word never seen is as unlikely as the model can say. A discount is estimated for
each order:

    (2) D_n = n_1 / (n_1 + 2 n_2), n_i being how many n-grams of the order have c = i
"""

import collections
import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import Self

import numpy as np
import numpy.typing as npt

from cosmos_jax.errors import UserError
from cosmos_jax.scores.ngrams import words
from cosmos_jax.scores.score import Flag, Score

Ngram = tuple[str, ...]

# `words` cuts these in three, so no text holds one.
START, END, UNKNOWN = "<s>", "</s>", "<unk>"
ORDER = 3


class NgramModel:
    """A model of texts by equation (1).

    Args:
      order: how many words an n-gram has.
      discounts: D_1 to D_order, each from 0 to 1; estimated by equation (2) if not given.
    """

    def __init__(self, order: int = ORDER, discounts: Sequence[float] | None = None):
        if order < 1 or (discounts is not None and len(discounts) != order):
            raise ValueError(f"order {order} with discounts {discounts}")
        self.order = order
        self.discounts = discounts
        self._levels: list[_Level] = []

    def fit(self, texts: Sequence[str]) -> Self:
        """Counts n-grams; UserError without texts or if none has a word."""
        if not texts:
            raise UserError("no texts to fit an n-gram model on")
        tokens = [words(text) for text in texts]
        if not any(tokens):
            raise UserError(f"none of the {len(texts)} texts to fit an n-gram model on has a word")
        counts: collections.Counter[Ngram] = collections.Counter(
            itertools.chain.from_iterable(self._ngrams(text) for text in tokens)
        )
        self.vocabulary = {END, UNKNOWN}.union(*tokens)
        levels = [counts]
        while len(levels) < self.order:
            levels.append(collections.Counter(ngram[1:] for ngram in levels[-1]))
        discounts = self.discounts or [_discount(level) for level in reversed(levels)]
        self._levels = [
            _Level(level, discount)
            for level, discount in zip(reversed(levels), discounts, strict=True)
        ]
        return self

    def log_probs(self, text: str) -> npt.NDArray[np.float64]:
        """Natural logarithm of the probability of each word and, last, of the end; after `fit`."""
        known = [word if word in self.vocabulary else UNKNOWN for word in words(text)]
        return np.log([self._probability(ngram) for ngram in self._ngrams(known)])

    def perplexity(self, texts: Sequence[str]) -> float:
        """Of all words and ends of the texts together; after `fit`."""
        return math.exp(-np.concatenate([self.log_probs(text) for text in texts]).mean())

    def _ngrams(self, tokens: list[str]) -> Iterator[Ngram]:
        padded = [START] * (self.order - 1) + tokens + [END]
        return zip(*(padded[first:] for first in range(self.order)), strict=False)

    def _probability(self, ngram: Ngram) -> float:
        p = 1 / len(self.vocabulary)
        for n, level in enumerate(self._levels, 1):
            part = ngram[-n:]
            total = level.totals.get(part[:-1])
            if total is None:  # then no longer context was seen either
                break
            passed_on = level.discount * level.types[part[:-1]]
            p = (max(0.0, level.counts.get(part, 0) - level.discount) + passed_on * p) / total
        return p


class _Level:
    """c(h w), c(h), T(h) and D of one order."""

    def __init__(self, counts: collections.Counter[Ngram], discount: float):
        self.counts, self.discount = counts, discount
        self.totals: collections.Counter[Ngram] = collections.Counter()
        for ngram, count in counts.items():
            self.totals[ngram[:-1]] += count
        self.types = collections.Counter(ngram[:-1] for ngram in counts)


def ngram_perplexity(
    texts: Sequence[str], references: Sequence[str], *, order: int = ORDER
) -> Score:
    """Perplexity of the words and ends of all `texts`, the mean over two models.

    One model is fitted on every second reference from the first, one on the others. `real`
    is the mean of each half scored by the model of the other, so it compares with the
    value: both are of texts that the model has not seen. UserError without texts, with
    fewer than two references or if a text has no word.
    """
    if not texts:
        raise UserError("no texts to score")
    if len(references) < 2:
        raise UserError(
            f"{len(references)} references to fit n-gram models on; at least 2 are needed"
        )
    for what, some in (("texts", texts), ("references", references)):
        for number, text in enumerate(some, 1):
            if not words(text):
                raise UserError(f"{what}: text {number} has no word; leave it out")
    halves = references[::2], references[1::2]
    models = [NgramModel(order).fit(half) for half in halves]
    values = [model.perplexity(texts) for model in models]
    real = [model.perplexity(half) for model, half in zip(models, reversed(halves), strict=True)]
    flags: dict[str, Flag] = {
        "order": order,
        "smoothing": "interpolated Kneser-Ney",
        "discounts": "n1/(n1+2*n2)",
        "words": "letters and digits, or one mark",
        "fitted_on": "even and odd references, mean of both",
        "references": len(references),
        "texts": len(texts),
    }
    return Score(
        statistics.fmean(values),
        flags,
        spread=statistics.stdev(values),
        spread_over="models",
        real=statistics.fmean(real),
    )


def _discount(counts: collections.Counter[Ngram]) -> float:
    """Equation (2); a half where counts of 1 or of 2 are missing, as in very small sets."""
    once, twice = (sum(count == n for count in counts.values()) for n in (1, 2))
    return once / (once + 2 * twice) if once and twice else 0.5
