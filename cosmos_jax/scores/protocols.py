"""Which scores make up a protocol, and what they are called when a setting differs.

A protocol is a tuple of functions, each from the texts to scores by name. Its name is plain only
where every setting it rests on is the one it is known for: with a smaller scorer in its place
"cosmos" becomes "cosmos(perplexity_model=distilgpt2)".

Scores of sets of texts see them in one form and without empty ones; scores of pairs see them as
they are: ROUGE and BLEU of an empty text are 0; BERTScore and J refuse a set that holds one.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import classifier, language_model
from cosmos_jax import config as config_lib
from cosmos_jax.data.files import has_text
from cosmos_jax.encoder import TextEncoder
from cosmos_jax.encoder import load as load_encoder
from cosmos_jax.errors import UserError
from cosmos_jax.scores import bertscore, detoxification, embeddings, ngrams, perplexity
from cosmos_jax.scores import mauve as mauve_lib
from cosmos_jax.scores.ngram_model import ngram_perplexity as score_ngram_perplexity
from cosmos_jax.scores.score import JACKKNIFE, Score, jackknife

Scores = dict[str, Score]

# Memorisation looks for generated n-grams in this many training texts, as the paper does.
MEMORISATION_TEXTS = 100_000


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
        return self._in_form(self.generated)

    @functools.cached_property
    def real(self) -> list[str]:
        return self._in_form(self.references)

    def _in_form(self, texts: list[str]) -> list[str]:
        found = self.normalise([text for text in texts if has_text(text)])
        return [text for text in found if text]  # nothing may be left of unknown characters

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
            spread, over = float(np.std(values, ddof=1)), "pairs of blocks"
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
    over = "blocks"
    if len(values) > 1:
        spread: float | None = float(np.std(values, ddof=1))
    else:
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
    training = itertools.islice(texts.training(), MEMORISATION_TEXTS)
    score = ngrams.memorisation(texts.kept, _in_parts(texts.normalise, training), split)
    flags = {**score.flags, "words": texts.settings.words, "form": texts.form}
    return {"memorisation": dataclasses.replace(score, flags=flags)}


def _in_parts(normalise: Callable[[list[str]], list[str]], texts: Iterator[str]) -> Iterator[str]:
    while part := list(itertools.islice(texts, 1_024)):
        yield from normalise(part)


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


# The settings that a score rests on, by which its protocol is named.
RESTS_ON: dict[Callable[[Texts], Scores], tuple[str, ...]] = {
    mauve: ("feature_model", "seeds"),
    encoder_mauve: ("seeds",),
    **dict.fromkeys((diversity, unigram_entropy, memorisation), ("words",)),
    **dict.fromkeys(
        (trimmed_perplexity, mean_perplexity, corpus_perplexity), ("perplexity_model",)
    ),
    rouge: ("stemming",),
    bert_score: ("bertscore_model", "bertscore_layer"),
    j_score: ("style_model", "style_label", "fluency_model", "fluency_label"),
}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Scores that belong together.

    Attributes:
      scores: functions from the texts to scores by name.
      own: what it has in place of the defaults of `config.evaluate`, and what else it is known
        for: the encoder by whose tokens texts are cut, the number of texts in a block.
      paired: whether each text needs its own reference.
    """

    scores: tuple[Callable[[Texts], Scores], ...]
    own: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    paired: bool = False

    @property
    def standard(self) -> dict[str, Any]:
        """The settings with which it has its plain name."""
        defaults = config_lib.base().evaluate
        names = [name for score in self.scores for name in RESTS_ON.get(score, ())]
        return {**{name: defaults[name] for name in names}, **self.own}


PROTOCOLS = {
    # The paper's, for unconditional text.
    "cosmos": Protocol(
        (mauve, trimmed_perplexity, diversity, memorisation, unigram_entropy),
        {"words": "spacy", "block_size": 1_000, "encoder": config_lib.BERT_BASE_CASED["name"]},
    ),
    # LD4LG's perplexity, and that of the papers on discrete diffusion with the entropy beside it.
    "mean-ppl": Protocol((mean_perplexity,)),
    "corpus-ppl": Protocol((corpus_perplexity, unigram_entropy)),
    # Conditional text.
    "rouge": Protocol((rouge,), paired=True),
    "bleu": Protocol((bleu,), paired=True),
    "bertscore": Protocol((bert_score,), paired=True),
    "detoxification": Protocol(
        (j_score, bleu),
        {
            "style_model": "s-nlp/roberta_toxicity_classifier",
            "fluency_model": "textattack/roberta-base-CoLA",
            "encoder": config_lib.MINILM["name"],  # of the similarity
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


def full_name(name: str, texts: Texts) -> str:
    """The name of a protocol with every setting that is not its own."""
    settings = {
        **texts.settings.to_dict(),
        "block_size": texts.block_size,
        "encoder": texts.encoder.name,
    }
    changed = [
        f"{key}={'offline' if settings[key] == '' else settings[key]}"
        for key, own in PROTOCOLS[name].standard.items()
        if settings[key] != own
    ]
    return f"{name}({', '.join(changed)})" if changed else name


def pieces(texts: Texts) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to compute: by function, scores as they stand in `evaluation.json`.

    A function that several of the protocols share is there once, under the names of all.
    """
    names: dict[Callable[[Texts], Scores], list[str]] = {}
    for name in parse(texts.settings.protocols):
        for function in PROTOCOLS[name].scores:
            if name != "offline" or OPTIONAL.get(function, lambda _: True)(texts):
                names.setdefault(function, []).append(full_name(name, texts))
    return {
        function.__name__: functools.partial(_entries, function, texts, " and ".join(those))
        for function, those in names.items()
    }


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
        "generated": _summary(texts.generated, texts.kept),
        "references": _summary(texts.references, texts.real),
        "paired": texts.paired,
    }


def _summary(group: list[str], kept: list[str]) -> dict[str, Any]:
    lines = "".join(f"{json.dumps(text)}\n" for text in group).encode()
    return {
        "count": len(group),
        "empty": len(group) - len(kept),
        "sha256": hashlib.sha256(lines).hexdigest(),
    }
