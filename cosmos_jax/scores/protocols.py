"""Which scores make up a protocol, and what they are called when a setting differs.

A protocol is a tuple of functions, each from the texts to scores by name. Its name is plain only
where every setting it rests on is the one it is known for: with a smaller scorer in its place
"cosmos" becomes "cosmos(perplexity_model=distilgpt2)".
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import classifier, language_model
from cosmos_jax.encoder import TextEncoder
from cosmos_jax.encoder import load as load_encoder
from cosmos_jax.errors import UserError
from cosmos_jax.scores import bertscore, detoxification, embeddings, ngrams, perplexity
from cosmos_jax.scores import mauve as mauve_lib
from cosmos_jax.scores.ngram_model import ngram_perplexity as score_ngram_perplexity
from cosmos_jax.scores.score import JACKKNIFE, Score, jackknife

Scores = dict[str, Score]
GPT2_LARGE = "openai-community/gpt2-large"


@dataclasses.dataclass(frozen=True, eq=False)
class Texts:
    """What is scored, and what it is compared with.

    Attributes:
      generated: the texts.
      references: real texts; with `paired`, reference i is the answer to what text i answers.
      sources: of each text, what it was generated from; empty if from nothing.
      training: the training texts, each time from the start; None if they are not at hand.
      normalise: brings texts into the form of generated ones, so that neither letter case nor
        spacing tells them apart; `form` says how.
      encoder: the text encoder at hand, for scores that need no other model.
      settings: `config.evaluate`.
    """

    generated: list[str]
    references: list[str]
    sources: list[str]
    paired: bool
    training: Callable[[], Iterable[str]] | None
    normalise: Callable[[list[str]], list[str]]
    form: str
    encoder: TextEncoder
    settings: ConfigDict

    @functools.cached_property
    def kept(self) -> list[str]:
        """The generated texts that say something, in their common form."""
        return self.normalise([text for text in self.generated if text.strip()])

    @functools.cached_property
    def real(self) -> list[str]:
        return self.normalise(self.references)

    @functools.cached_property
    def block_size(self) -> int:
        """Texts in a set that is scored as one; no more than there are on either side."""
        return min(self.settings.block_size, len(self.kept), len(self.real))

    def blocks(self, items: Any) -> list[Any]:
        """Whole blocks of texts, or of rows of features."""
        size = max(1, self.block_size)
        return [items[i : i + size] for i in range(0, len(items) - size + 1, size)]

    @functools.cached_property
    def nlls(self) -> tuple[perplexity.TokenNlls, perplexity.TokenNlls]:
        """Of generated and of real texts, what the perplexity model thinks of each token."""
        model = language_model.load(self.settings.perplexity_model)
        return perplexity.token_nlls(model, self.kept), perplexity.token_nlls(model, self.real)

    def pairs(self) -> tuple[list[str], list[str]]:
        if not self.paired:
            raise UserError("needs a reference for each text: these references are not paired")
        return self.generated, self.references


# Scores of sets of texts


def mauve(texts: Texts) -> Scores:
    model = language_model.load(texts.settings.feature_model)
    ours, theirs = (perplexity.features(model, group) for group in (texts.kept, texts.real))
    return _mauve(texts, ours, theirs, {"model": texts.settings.feature_model}, "")


def encoder_mauve(texts: Texts) -> Scores:
    ours, theirs = (embeddings.pooled(texts.encoder, group) for group in (texts.kept, texts.real))
    flags = {"model": f"{texts.encoder.name}, mean of the last states"}
    return _mauve(texts, ours, theirs, flags, "encoder_")


def _mauve(
    texts: Texts, ours: np.ndarray, theirs: np.ndarray, flags: dict[str, str], prefix: str
) -> Scores:
    """Means over all pairs of a block of generated and one of real texts, and over seeds."""
    seeds = range(texts.settings.seeds)
    found = [
        mauve_lib.mauve(p, q, seeds=seeds)
        for p, q in itertools.product(texts.blocks(ours), texts.blocks(theirs))
    ]
    scores = {}
    for name, score in found[0].items():
        values = [pair[name].value for pair in found]
        spread, over = score.spread, score.spread_over
        if len(values) > 1:
            spread, over = float(np.std(values)), "pairs of blocks"
        all_flags = {**flags, **score.flags, "block": texts.block_size, "form": texts.form}
        scores[prefix + name] = Score(float(np.mean(values)), all_flags, spread, over)
    return scores


def diversity(texts: Texts) -> Scores:
    return {"diversity": _of_blocks(texts, ngrams.diversity)}


def unigram_entropy(texts: Texts) -> Scores:
    return {"unigram_entropy": _of_blocks(texts, ngrams.unigram_entropy)}


def _of_blocks(texts: Texts, score: Callable[[list[str], ngrams.Split], float]) -> Score:
    """A score that depends on the number of texts, the mean over blocks of one size."""
    split = ngrams.SPLITTERS[texts.settings.words]
    values = [score(block, split) for block in texts.blocks(texts.kept)]
    if not values:
        raise UserError("needs texts on both sides")
    spread: float | None = float(np.std(values))
    over = "blocks"
    if len(values) == 1:
        (block,) = texts.blocks(texts.kept)
        spread = jackknife(lambda some: score([block[i] for i in some], split), len(block))
        over = JACKKNIFE
    real = float(np.mean([score(block, split) for block in texts.blocks(texts.real)]))
    flags = {"words": texts.settings.words, "block": texts.block_size, "form": texts.form}
    return Score(float(np.mean(values)), flags, spread, over, real)


def memorisation(texts: Texts) -> Scores:
    if texts.training is None:
        raise UserError("needs the training texts")
    split = ngrams.SPLITTERS[texts.settings.words]
    score = ngrams.memorisation(texts.kept, texts.training(), split)
    flags = {**score.flags, "words": texts.settings.words, "form": texts.form}
    return {"memorisation": dataclasses.replace(score, flags=flags)}


def trimmed_perplexity(texts: Texts) -> Scores:
    size = texts.block_size
    score = functools.partial(perplexity.trimmed_mean, block_size=size)
    return {"perplexity": _perplexity(texts, score)}


def mean_perplexity(texts: Texts) -> Scores:
    return {"mean_perplexity": _perplexity(texts, perplexity.mean)}


def corpus_perplexity(texts: Texts) -> Scores:
    return {"corpus_perplexity": _perplexity(texts, perplexity.corpus)}


def _perplexity(texts: Texts, score: Callable[[perplexity.TokenNlls], Score]) -> Score:
    ours, theirs = map(score, texts.nlls)
    return dataclasses.replace(ours, real=theirs.value, flags={**ours.flags, "form": texts.form})


def ngram_perplexity(texts: Texts) -> Scores:
    score = score_ngram_perplexity(texts.kept, texts.real)
    return {
        "ngram_perplexity": dataclasses.replace(score, flags={**score.flags, "form": texts.form})
    }


# Scores of pairs


def rouge(texts: Texts) -> Scores:
    return ngrams.rouge(*texts.pairs(), stemming=texts.settings.stemming)


def bleu(texts: Texts) -> Scores:
    return {"bleu": ngrams.bleu(*texts.pairs())}


def bert_score(texts: Texts) -> Scores:
    settings = texts.settings
    layer = settings.bertscore_layer or None
    model = load_encoder(settings.bertscore_model)
    return bertscore.bertscore(model, *texts.pairs(), layer=layer)


def encoder_bert_score(texts: Texts) -> Scores:
    scores = bertscore.bertscore(texts.encoder, *texts.pairs())
    return {f"encoder_{name}": score for name, score in scores.items()}


def j_score(texts: Texts) -> Scores:
    """Style, similarity and fluency of each text, and the mean of their products."""
    settings = texts.settings
    generated, references = texts.pairs()
    if not texts.sources:
        raise UserError("needs the sources of the texts")
    style = (
        detoxification.classified(classifier.load(settings.style_model), settings.style_label)
        if settings.style_model
        else detoxification.naive_bayes(texts.sources, references)
    )
    fluency = (
        detoxification.classified(classifier.load(settings.fluency_model), settings.fluency_label)
        if settings.fluency_model
        else detoxification.ngram_rank(references)
    )
    similarity = detoxification.cosine(texts.encoder)
    return detoxification.j_score(
        generated, texts.sources, style=style, similarity=similarity, fluency=fluency
    )


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Scores that belong together.

    Attributes:
      scores: functions from the texts to scores by name.
      standard: the settings with which it has its plain name.
      paired: whether each text needs its own reference.
    """

    scores: tuple[Callable[[Texts], Scores], ...]
    standard: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paired: bool = False


PROTOCOLS = {
    # The paper's, for unconditional text.
    "cosmos": Protocol(
        (mauve, trimmed_perplexity, diversity, memorisation, unigram_entropy),
        {
            "feature_model": GPT2_LARGE,
            "perplexity_model": GPT2_LARGE,
            "words": "spacy",
            "block_size": 1_000,
        },
    ),
    # LD4LG's perplexity, and that of the papers on discrete diffusion with the entropy beside it.
    "mean-ppl": Protocol((mean_perplexity,), {"perplexity_model": GPT2_LARGE}),
    "corpus-ppl": Protocol((corpus_perplexity, unigram_entropy), {"perplexity_model": GPT2_LARGE}),
    # Conditional text.
    "rouge": Protocol((rouge,), {"stemming": True}, paired=True),
    "bleu": Protocol((bleu,), paired=True),
    "bertscore": Protocol(
        (bert_score,),
        {"bertscore_model": "FacebookAI/roberta-large", "bertscore_layer": 0},
        paired=True,
    ),
    "detoxification": Protocol(
        (j_score, bleu),
        {
            "style_model": "s-nlp/roberta_toxicity_classifier",
            "style_label": "neutral",
            "fluency_model": "textattack/roberta-base-CoLA",
            "fluency_label": "1",
        },
        paired=True,
    ),
    # Nothing that would have to be fetched. Scores of pairs are left out of unpaired texts.
    "offline": Protocol(
        (
            encoder_mauve,
            ngram_perplexity,
            diversity,
            unigram_entropy,
            memorisation,
            rouge,
            bleu,
            encoder_bert_score,
        )
    ),
}
# Scores that "offline" leaves out where the texts do not allow them.
OPTIONAL: dict[Callable[[Texts], Scores], Callable[[Texts], bool]] = {
    rouge: lambda texts: texts.paired,
    bleu: lambda texts: texts.paired,
    encoder_bert_score: lambda texts: texts.paired,
    memorisation: lambda texts: texts.training is not None,
}


def parse(names: str) -> list[str]:
    """The protocols of a list with commas; UserError for one that there is not."""
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in PROTOCOLS:
            raise UserError(f"protocol {name!r}: there are {', '.join(PROTOCOLS)}")
    return found


def full_name(name: str, settings: ConfigDict) -> str:
    """The name of a protocol with every setting that is not its own."""
    standard = PROTOCOLS[name].standard
    changed = [
        f"{key}={'offline' if settings[key] == '' else settings[key]}"
        for key, own in standard.items()
        if settings[key] != own
    ]
    return f"{name}({', '.join(changed)})" if changed else name


def pieces(texts: Texts) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to compute: by function, scores as they stand in `evaluation.json`.

    A function that several of the protocols share is there once, under the name of the first.
    """
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for name in parse(texts.settings.protocols):
        for function in PROTOCOLS[name].scores:
            wanted = name != "offline" or OPTIONAL.get(function, lambda _: True)(texts)
            if wanted and function.__name__ not in found:
                found[function.__name__] = functools.partial(
                    _entries, function, texts, full_name(name, texts.settings)
                )
    return found


def _entries(
    function: Callable[[Texts], Scores], texts: Texts, protocol: str
) -> dict[str, dict[str, Any]]:
    return {
        name: {**score.to_json(), "protocol": protocol} for name, score in function(texts).items()
    }


def compute(
    state: dict[str, Any], name: str, piece: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The state of an evaluation, {"scores", "done", "problems"}, with one more piece in it.

    A score that cannot be had is a problem of that name; the others are not touched by it.
    """
    problems = {other: text for other, text in state["problems"].items() if other != name}
    try:
        scores = piece()
    except UserError as error:
        return {**state, "problems": {**problems, name: str(error)}}
    return {
        **state,
        "scores": {**state["scores"], **scores},
        "done": [*state["done"], name],
        "problems": problems,
    }


def summary(texts: Texts) -> dict[str, Any]:
    """How many texts there are, how many of them say nothing, and their hashes."""
    return {
        "generated": _summary(texts.generated),
        "references": _summary(texts.references),
        "paired": texts.paired,
    }


def _summary(group: list[str]) -> dict[str, Any]:
    lines = "".join(f"{json.dumps(text)}\n" for text in group).encode()
    empty = sum(not text.strip() for text in group)
    return {"count": len(group), "empty": empty, "sha256": hashlib.sha256(lines).hexdigest()}
