"""The stage that writes `evaluation.json`: losses on held-out text and scores of the samples.

Generated and real texts are compared in one form: cut to `data.max_length` tokens of the
encoder and decoded back, so that neither letter case nor spacing tells them apart.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cosmos_jax import distributed, pipeline, provenance, text_metrics, trained, workdir
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import Rows
from cosmos_jax.errors import UserError
from cosmos_jax.generate import read_samples
from cosmos_jax.run import Run
from cosmos_jax.train import make_validation

logger = logging.getLogger(__name__)

# Memorisation looks for generated n-grams in this many training texts, as the paper does.
MEMORISATION_TEXTS = 100_000


def evaluate(run: Run) -> None:
    """Scores the finished stages and `samples.jsonl`."""
    path = run.workdir / "evaluation.json"
    samples_path = run.workdir / "samples.jsonl"
    if not samples_path.exists():
        raise UserError(f"{samples_path} is missing: run --stage=generate first (or --stage=all)")
    identity = {
        "samples_sha256": hashlib.sha256(samples_path.read_bytes()).hexdigest(),
        "data": run.dataset.fingerprint,
        "num_texts": run.config.evaluate.num_texts,
        "autoencoder_step": trained.finished_step(pipeline.autoencoder_directory(run)),
        "diffusion_step": trained.finished_step(run.workdir / "diffusion"),
    }
    recorded = workdir.read_json(path)
    if recorded is not None and recorded["identity"] == identity:
        logger.info("evaluate: finished")
        return
    held_out = held_out_losses(run)
    if distributed.is_first():
        result = {
            "identity": identity,
            "held_out": held_out,
            "texts": score_texts(run, samples_path),
            **provenance.versions(),
        }
        workdir.write_json(path, result)


def held_out_losses(run: Run) -> dict[str, dict[str, float]]:
    """Each stage's losses and accuracies on test texts."""
    _, diffusion, weights = pipeline.all_weights(run)
    _, autoencoder = pipeline.autoencoder_stage(run)
    results = {}
    for stage, names in (
        (autoencoder, ("compressor", "decompressor")),
        (diffusion, ("denoiser", "condition_encoder")),
    ):
        params = {name: weights[name] for name in names if name in weights}
        batches = run.ordered_batches(
            run.dataset.test, stage.settings.batch_size, run.config.evaluate.num_texts
        )
        values = make_validation(stage, run, batches)(params, stage.frozen)
        results[stage.name] = {name.removeprefix("validation_"): v for name, v in values.items()}
    return results


def score_texts(run: Run, samples_path: Path) -> dict[str, Any]:
    """Scores of the generated texts, beside those of as many real ones."""
    samples = read_samples(samples_path)
    generated = [sample["text"] for sample in samples]
    if run.dataset.conditional:
        real = _normalise(run, [sample["reference"] for sample in samples])
    else:
        real = _normalise(run, _texts(run.dataset.test, len(samples)))
    training = _normalised_in_parts(run, _texts(run.dataset.train, MEMORISATION_TEXTS))
    scores: dict[str, Any] = {
        "count": len(generated),
        "empty": sum(not text for text in generated),
        "generated": _unpaired(generated),
        "real": _unpaired(real),
        "memorisation": text_metrics.memorisation(generated, training),
    }
    if run.dataset.conditional:
        scores["rouge"] = text_metrics.rouge(generated, real)
        scores["bleu"] = text_metrics.bleu(generated, real)
    return scores


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
