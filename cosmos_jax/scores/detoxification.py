"""The J-score of text style transfer (Krishna et al., 2020), for texts made harmless.

    J = mean over texts of style * similarity * fluency

Each factor lies between 0 and 1: the probability that the text is harmless, how much of its
source it says, the probability that it is well formed. What measures them is a choice, and the
three that need no classifier are stand-ins: `naive_bayes`, `cosine`, `ngram_rank`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from cosmos_jax.classifier import Classifier, probabilities
from cosmos_jax.encoder import TextEncoder
from cosmos_jax.errors import UserError
from cosmos_jax.scores import score
from cosmos_jax.scores.embeddings import pooled
from cosmos_jax.scores.ngram_model import NgramModel
from cosmos_jax.scores.ngrams import words
from cosmos_jax.scores.score import Score


@dataclasses.dataclass(frozen=True)
class Factor:
    """A measure of one side of a text; `name` says which in the flags of the score.

    `measure` takes the texts, that of similarity also their sources, and answers one number
    from 0 to 1 for each.
    """

    name: str
    measure: Callable[..., np.ndarray]


def j_score(
    texts: Sequence[str],
    sources: Sequence[str],
    *,
    style: Factor,
    similarity: Factor,
    fluency: Factor,
) -> dict[str, Score]:
    """J and the means of its three factors: "j", "style", "similarity", "fluency".

    Raises:
      UserError: there are no texts, another number of sources, or an empty text.
    """
    if len(texts) != len(sources):
        raise UserError(f"J-score: {len(texts)} texts for {len(sources)} sources; pairs are needed")
    if not texts:
        raise UserError("J-score: there are no texts")
    for what, group in (("text", texts), ("source", sources)):
        for i, text in enumerate(group):
            if not text.strip():
                raise UserError(f"J-score: {what} {i + 1} is empty")
    factors = {"style": style, "similarity": similarity, "fluency": fluency}
    values = {}
    for name, factor in factors.items():
        inputs = (texts, sources) if name == "similarity" else (texts,)
        values[name] = np.asarray(factor.measure(*inputs), np.float64)
        if not (values[name].shape == (len(texts),) and np.all(abs(values[name] - 0.5) <= 0.5)):
            raise ValueError(f"{factor.name} does not answer one number from 0 to 1 for each text")
    values["j"] = values["style"] * values["similarity"] * values["fluency"]
    names = {name: factor.name for name, factor in factors.items()}
    return {
        name: Score(
            **score.mean(values[name].tolist()), flags=names if name == "j" else {"by": names[name]}
        )
        for name in ("j", *factors)
    }


def classified(classifier: Classifier, label: str) -> Factor:
    """The probability of a label, given as its name or its number."""
    column = classifier.index(label)
    return Factor(
        f"{classifier.name}[{classifier.labels[column]}] {classifier.fingerprint[:12]}",
        lambda texts: probabilities(classifier, texts)[:, column],
    )


def cosine(encoder: TextEncoder) -> Factor:
    """Similarity: the cosine of mean states of a text and its source, negative ones as 0."""

    def measure(texts: Sequence[str], sources: Sequence[str]) -> np.ndarray:
        ours_NxD, theirs_NxD = pooled(encoder, texts), pooled(encoder, sources)
        norms_N = np.linalg.norm(ours_NxD, axis=1) * np.linalg.norm(theirs_NxD, axis=1)
        return np.clip((ours_NxD * theirs_NxD).sum(axis=1) / norms_N, 0, 1)

    return Factor(f"offline: cosine of mean states, {encoder.name}", measure)


def naive_bayes(sources: Sequence[str], references: Sequence[str]) -> Factor:
    """Style: the probability that a text is one of the references and not of the sources.

    Multinomial over words in lower case, add-one smoothing; words of neither say nothing.
    """
    if not sources or not references:
        raise UserError("naive Bayes: there are no sources or no references to learn from")
    counts = [
        collections.Counter(word for text in group for word in words(text.lower()))
        for group in (sources, references)
    ]
    vocabulary = counts[0].keys() | counts[1].keys()
    totals = [count.total() + len(vocabulary) for count in counts]
    evidence = {
        word: math.log((counts[1][word] + 1) / totals[1] / ((counts[0][word] + 1) / totals[0]))
        for word in vocabulary
    }
    prior = math.log(len(references) / len(sources))

    def measure(texts: Sequence[str]) -> np.ndarray:
        logits = [
            prior + math.fsum(evidence.get(word, 0.0) for word in words(text.lower()))
            for text in texts
        ]
        return np.exp(-np.logaddexp(0, -np.array(logits)))

    return Factor(
        f"offline: naive Bayes, {len(sources)} sources, {len(references)} references", measure
    )


def ngram_rank(references: Sequence[str]) -> Factor:
    """Fluency: the share of references that an n-gram model finds no more likely than the text.

    The model learns one half of the references, and the text is ranked among the other, which
    are as new to the model. So real texts get 1/2 on average.
    """
    if len(references) < 2:
        raise UserError(f"n-gram fluency: needs 2 references or more, not {len(references)}")
    model = NgramModel().fit(references[0::2])

    def log_likelihoods(texts: Sequence[str]) -> np.ndarray:
        """Means over words, of which perplexity is exp(-x)."""
        return np.array([model.log_probs(text).mean() for text in texts])

    ranked = np.sort(log_likelihoods(references[1::2]))
    return Factor(
        f"offline: n-gram rank among {len(ranked)} references",
        lambda texts: np.searchsorted(ranked, log_likelihoods(texts), side="right") / len(ranked),
    )
