"""The stage that writes `evaluation.json`: losses on held-out text and scores of the samples.

Generated and real texts are compared in one form: cut to `data.max_length` tokens of the
encoder and decoded back, so that neither letter case nor spacing tells them apart.
"""

import copy
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_jax import config as config_lib
from cosmos_jax import distributed, latents, pipeline, provenance, sharding, workdir
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import first_texts
from cosmos_jax.errors import UserError
from cosmos_jax.run import Run
from cosmos_jax.samples import Sample, read_samples
from cosmos_jax.scores import frechet, protocols
from cosmos_jax.scores.score import JACKKNIFE, jackknife
from cosmos_jax.train import Totals, add, make_validation, means

logger = logging.getLogger(__name__)

# The trained parameters of each stage.
PARAMETERS = {
    "autoencoder": ("compressor", "decompressor"),
    "diffusion": ("denoiser", "condition_encoder"),
    "autoregressive": ("decoder",),
    "masked": ("masked_denoiser",),
}


def evaluate(run: Run) -> None:
    """Scores the finished stages and `samples.jsonl`.

    What is done is kept in `evaluation.partial.json`, so that a run that is stopped or killed
    goes on after the last batch of held-out texts or the last score. A score that cannot be had,
    such as MAUVE of ten texts, is reported as a problem, and tried again by the next call.
    """
    path, partial = run.workdir / "evaluation.json", run.workdir / "evaluation.partial.json"
    samples_path = run.workdir / "samples.jsonl"
    samples_hash = distributed.on_first(lambda: _hash(samples_path))
    finished = pipeline.finished(run)
    identity = {
        **finished.identity,
        "samples_sha256": samples_hash,
        **{name: value for name, value in run.config.evaluate.items() if name != "batch_size"},
    }
    recorded, state = distributed.on_first(
        lambda: tuple(_of_identity(file, identity) for file in (path, partial))
    )
    if recorded is not None and not recorded["problems"]:
        logger.info("evaluate: finished")
        distributed.on_first(lambda: partial.unlink(missing_ok=True))
        return
    state = state or copy.deepcopy(recorded)
    state = state or {
        "identity": identity,
        "held_out": {},
        "scores": {},
        "done": [],
        "problems": {},
    }

    def save() -> None:
        distributed.on_first(lambda: workdir.write_json(partial, state))
        if distributed.preempted():
            raise distributed.Preempted("evaluate: what is done is saved")

    for name in config_lib.training(pipeline.undistilled(run).config):
        if name in state["held_out"]:
            continue
        of = finished if name in finished.stages else _teacher(run, finished)
        if of is not None:
            sums = state.setdefault("sums", {"texts": 0, "totals": {}})
            for count, totals in held_out_sums(run, of, name, **sums):
                sums.update(texts=count, totals=totals)
                save()
            state["held_out"][name] = means(state.pop("sums")["totals"])
    texts = texts_of(run, distributed.on_first(lambda: read_samples(samples_path)))
    for name, piece in protocols.pieces(texts).items():
        if name not in state["done"]:
            logger.info("evaluate: %s", name)
            compute = functools.partial(protocols.compute, state, name, piece)
            state = distributed.on_first(functools.partial(sharding.on_one_device, compute))
            save()
    if run.config.system == "cosmos" and "latent_frechet" not in state["done"]:
        piece = functools.partial(latent_frechet, run, finished, texts)
        state = protocols.compute(state, "latent_frechet", piece)
        save()
    for name, problem in state["problems"].items():
        logger.warning("evaluate: no %s: %s", name, problem)
    state |= {"texts": protocols.summary(texts), **provenance.versions()}

    def finish() -> None:
        if state != recorded:
            workdir.write_json(path, state)
        partial.unlink(missing_ok=True)

    distributed.on_first(finish)


def _teacher(run: Run, student: pipeline.Finished) -> pipeline.Finished | None:
    """What a student learned from, whose loss is that of the run; None if it is not there."""
    try:
        found = pipeline.finished(pipeline.undistilled(run))
    except UserError as error:
        logger.info("evaluate: no loss of the denoiser before it was distilled: %s", error)
        return None
    same = found.identity["diffusion_step"] == student.identity["diffusion_step"]
    return found if same else None


def _of_identity(path: Path, identity: dict[str, Any]) -> Any:
    """What an earlier evaluation of the same left in a file, or None."""
    state = workdir.read_json(path)
    return state if state is not None and state.get("identity") == identity else None


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


def texts_of(run: Run, samples: Sequence[Sample]) -> protocols.Texts:
    """The generated texts, and for each its reference or as many real ones."""
    paired, rows = run.dataset.conditional, run.dataset.train

    def normalise(texts: Sequence[str]) -> list[str]:
        return tokens.round_trip(run.encoder.tokenizer, texts, run.config.data.max_length)

    return protocols.Texts(
        generated=[sample["text"] for sample in samples],
        references=[sample["reference"] for sample in samples]
        if paired
        else first_texts(run.dataset.test, len(samples)),
        sources=[sample["source"] for sample in samples] if paired else [],
        paired=paired,
        training=lambda: (row.text for row in map(rows.__getitem__, range(len(rows)))),
        normalise=normalise,
        form=f"{run.config.data.max_length} tokens of {run.encoder.name}",
        encoder=run.encoder,
        settings=run.config.evaluate,
    )


def latent_frechet(
    run: Run,
    finished: pipeline.Finished,
    texts: protocols.Texts,
    real_nxD: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """The distance of generated from real texts in the latent space, slots averaged.

    `real` is that of held-out texts of the other split, as many, from the same real ones.
    `real_nxD` are the `latents_of_real`, where they are known.
    """
    real, valid = real_nxD or latents_of_real(run, finished, texts)
    generated = _mean_latents(run, finished, texts.kept)
    score = frechet.frechet_distance(generated, real)
    score = dataclasses.replace(
        score,
        spread=jackknife(
            lambda some: frechet.frechet_distance(generated[some], real).value, len(generated)
        ),
        spread_over=JACKKNIFE,
        real=frechet.frechet_distance(valid, real).value,
        flags={
            "features": "mean of the standardised latents",
            **score.flags,
            "n_real": len(valid),
            "form": texts.form,
        },
    )
    return {"latent_frechet": {**score.to_json(), "protocol": "latents"}}


def latents_of_real(
    run: Run, finished: pipeline.Finished, texts: protocols.Texts
) -> tuple[np.ndarray, np.ndarray]:
    """Mean latents of the real texts, and of as many of the other split."""
    other = texts.normalise(first_texts(run.dataset.valid, len(texts.real)))
    return _mean_latents(run, finished, texts.real), _mean_latents(run, finished, other)


def _mean_latents(run: Run, finished: pipeline.Finished, texts: Sequence[str]) -> np.ndarray:
    """The mean over slots of each text's standardised latents, [n, D]."""
    model, weights = finished.model, finished.weights
    latents_nxNxD = latents.encode(run, model, weights, texts)
    return np.asarray(model.standardise(weights, latents_nxNxD)).mean(axis=1)


def _hash(samples_path: Path) -> str:
    try:
        return hashlib.sha256(samples_path.read_bytes()).hexdigest()
    except FileNotFoundError:
        raise UserError(
            f"{samples_path} is missing: run --stage=generate first (or --stage=all)"
        ) from None
