"""The stage that writes `evaluation.json`: losses on held-out text and scores of the samples.

Generated and real texts are compared in one form: cut to `data.max_length` tokens of the
encoder and decoded back, so that neither letter case nor spacing tells them apart.
"""

import functools
import hashlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from cosmos_jax import distributed, pipeline, provenance, text_metrics, workdir
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import Rows
from cosmos_jax.errors import UserError
from cosmos_jax.generate import read_samples
from cosmos_jax.run import Run
from cosmos_jax.train import Totals, add, make_validation, means

logger = logging.getLogger(__name__)

# Memorisation looks for generated n-grams in this many training texts, as the paper does.
MEMORISATION_TEXTS = 100_000

# The trained parameters of each stage.
PARAMETERS = {
    "autoencoder": ("compressor", "decompressor"),
    "diffusion": ("denoiser", "condition_encoder"),
}


def evaluate(run: Run) -> None:
    """Scores the finished stages and `samples.jsonl`.

    What is done is kept in `evaluation.partial.json`, so that a run that is stopped or killed
    goes on after the last batch of held-out texts or the last score.
    """
    path, partial = run.workdir / "evaluation.json", run.workdir / "evaluation.partial.json"
    samples_path = run.workdir / "samples.jsonl"
    samples_hash = distributed.on_first(lambda: _hash(samples_path))
    finished = pipeline.finished(run)
    identity = {
        **finished.identity,
        "samples_sha256": samples_hash,
        "num_texts": run.config.evaluate.num_texts,
    }
    recorded = distributed.on_first(lambda: workdir.read_json(path))
    if recorded is not None and recorded["identity"] == identity:
        logger.info("evaluate: finished")
        distributed.on_first(lambda: partial.unlink(missing_ok=True))
        return
    state = distributed.on_first(lambda: workdir.read_json(partial))
    if state is None or state["identity"] != identity:
        state = {"identity": identity, "held_out": {}, "texts": {}}

    def save() -> None:
        distributed.on_first(lambda: workdir.write_json(partial, state))
        if distributed.preempted():
            raise distributed.Preempted("evaluate: what is done is saved")

    for name in finished.stages:
        sums = state["held_out"].setdefault(name, {"texts": 0, "totals": {}})
        for texts, totals in held_out_sums(run, finished, name, **sums):
            sums.update(texts=texts, totals=totals)
            save()
    for name, score in text_scores(run, samples_path).items():
        if name not in state["texts"]:
            state["texts"][name] = distributed.on_first(score)
            save()
    held_out = {name: means(sums["totals"]) for name, sums in state["held_out"].items()}
    result = {**state, "held_out": held_out, **provenance.versions()}
    distributed.on_first(lambda: workdir.write_json(path, result))
    distributed.on_first(lambda: partial.unlink(missing_ok=True))


def held_out_sums(
    run: Run, finished: pipeline.Finished, name: str, texts: int, totals: Totals
) -> Iterator[tuple[int, Totals]]:
    """A stage's losses and accuracies on test texts as sums over the first ones, ever more.

    Goes on from the `totals` of as many `texts` as are given.
    """
    stage, settings = finished.stages[name], run.config.evaluate
    names = [part for part in PARAMETERS[name] if part in finished.weights]
    params = {part: finished.weights[part] for part in names}
    batches = run.ordered_batches(run.dataset.test, settings.batch_size, settings.num_texts, texts)
    for (_, count), more in zip(
        batches.batches, make_validation(stage, run, batches)(params), strict=True
    ):
        texts, totals = texts + count, add(totals, more)
        yield texts, totals


def text_scores(run: Run, samples_path: Path) -> dict[str, Callable[[], Any]]:
    """Scores of the generated texts, beside those of as many real ones; each when called."""
    samples = functools.cache(lambda: read_samples(samples_path))
    generated = functools.cache(lambda: [sample["text"] for sample in samples()])

    @functools.cache
    def real() -> list[str]:
        if run.dataset.conditional:
            return _normalise(run, [sample["reference"] for sample in samples()])
        return _normalise(run, _texts(run.dataset.test, len(samples())))

    def memorisation() -> float:
        training = _normalised_in_parts(run, _texts(run.dataset.train, MEMORISATION_TEXTS))
        return text_metrics.memorisation(generated(), training)

    scores: dict[str, Callable[[], Any]] = {
        "count": lambda: len(generated()),
        "empty": lambda: sum(not text for text in generated()),
        "generated": lambda: _unpaired(generated()),
        "real": lambda: _unpaired(real()),
        "memorisation": memorisation,
    }
    if run.dataset.conditional:
        scores["rouge"] = lambda: text_metrics.rouge(generated(), real())
        scores["bleu"] = lambda: text_metrics.bleu(generated(), real())
    return scores


def _hash(samples_path: Path) -> str:
    try:
        return hashlib.sha256(samples_path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(
            f"{samples_path} is missing: run --stage=generate first (or --stage=all)"
        ) from None


def _unpaired(texts: list[str]) -> dict[str, float]:
    return {
        "diversity": text_metrics.diversity(texts),
        "unigram_entropy": text_metrics.unigram_entropy(texts),
    }


def _texts(rows: Rows, limit: int) -> list[str]:
    return [rows[i].text for i in range(min(limit, len(rows)))]


def _normalise(run: Run, texts: list[str]) -> list[str]:
    return tokens.round_trip(run.encoder.tokenizer, texts, run.config.data.max_length)


def _normalised_in_parts(run: Run, texts: Iterable[str]) -> Iterable[str]:
    iterator = iter(texts)
    while part := list(itertools.islice(iterator, 1_024)):
        yield from _normalise(run, part)
