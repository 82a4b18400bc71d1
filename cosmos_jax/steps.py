"""Quality and speed of one trained denoiser with every sampler and number of steps.

Nothing of the run's own texts is touched. Each row is kept in `steps.json` in the run's folder as
soon as it is known, so a study that was stopped goes on there, and one that asks for more finds
what there is.
"""

import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import config_checks, distributed, evaluation, pipeline, sharding, workdir
from cosmos_jax.baselines import make_generator
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import first_texts
from cosmos_jax.run import Run
from cosmos_jax.samples import sample
from cosmos_jax.scores import protocols

logger = logging.getLogger(__name__)

Row = dict[str, Any]

# Calls that are timed, at least: their median leaves out what else the machine did meanwhile.
TIMED_CALLS = 3
PARTS = {"": "value", "_spread": "spread", "_real": "real"}


def configs(base: ConfigDict, samplers: str, steps: Sequence[int]) -> list[ConfigDict]:
    """The config of each sampler, named with commas between, and number of steps.

    UserError if there is no such sampler or number.
    """
    found = []
    for sampler in samplers.split(","):
        for num_steps in steps:
            config = ConfigDict(base.to_dict())
            config.distillation.steps = 0  # it is the denoiser that can take other steps
            config.diffusion.sampler = sampler.strip()
            config.diffusion.num_sampling_steps = num_steps
            config_checks.validate(config)
            found.append(config)
    return found


def measure(run: Run, samplers: str, steps: Sequence[int]) -> list[Row]:
    """A row for each: how it was sampled, the seconds a text took, and the scores by name.

    It is the denoiser that is sampled, also where it was distilled.

    Raises:
      UserError: the run is not trained, or another process uses its folder.
      distributed.Preempted: SIGTERM came; the rows that were finished are saved.
    """
    asked = configs(run.config, samplers, steps)
    with workdir.locked(run.workdir):
        finished = pipeline.finished(pipeline.undistilled(run))
        scorer = Scorer(run, finished)
        path, common = run.workdir / "steps.json", _identity(run, finished)
        recorded = workdir.read_json(path) or []
        rows = []
        for config in asked:
            how = _how(config)
            identity = {**common, **how}
            row = next((old["row"] for old in recorded if old["identity"] == identity), None)
            if row is None:
                logger.info("steps: %s in %d", how["sampler"], how["num_sampling_steps"])
                texts, seconds = generate(run, finished, config)
                row = {**how, "seconds_per_text": seconds, **scorer.score(texts)}
                recorded.append({"identity": identity, "row": row})
                workdir.write_json(path, recorded)
                _stop_if_told()
            rows.append(row)
    return rows


def _how(config: ConfigDict) -> Row:
    return {name: config.diffusion[name] for name in config_lib.SAMPLING["diffusion"]}


def _identity(run: Run, finished: pipeline.Finished) -> dict[str, Any]:
    """What rows must have in common to be compared: the weights, the texts, the device."""
    scores = dict(run.config.evaluate.items())
    del scores["batch_size"], scores["num_texts"]  # of the losses on held-out texts
    return {
        **finished.identity,
        **scores,
        **{name: run.config.generate[name] for name in ("num_texts", "batch_size")},
        "device": jax.devices()[0].device_kind,
    }


def _stop_if_told() -> None:
    if distributed.preempted():
        raise distributed.Preempted("steps: every finished row is saved")


def generate(run: Run, finished: pipeline.Finished, config: ConfigDict) -> tuple[list[str], float]:
    """The texts that the stage would write, and the median seconds a text takes, compiled."""
    model, settings = finished.model, config.generate
    num_texts = settings.num_texts
    if model.conditional:
        num_texts = min(num_texts, len(run.dataset.test))
    batch_size = run.even_batch_size(min(settings.batch_size, num_texts))
    sources = run.ordered_batches(run.dataset.test, settings.batch_size, num_texts)
    local = sharding.local_rows(batch_size, run.mesh)

    def inputs(index: int) -> tuple[Any, ...]:
        rows = {"rows": index * batch_size + local}
        batch = sources(index) if model.conditional else rows
        return finished.weights, run.key("generate"), sharding.put_batch(batch, run.mesh)

    compiled = jax.jit(make_generator(config, model)).lower(*inputs(0)).compile()
    num_batches = -(-num_texts // batch_size)
    ids, seconds = [], []
    for call in range(max(num_batches, TIMED_CALLS)):
        given = jax.block_until_ready(inputs(call % num_batches))
        begun = time.perf_counter()
        answer = jax.block_until_ready(compiled(*given))
        seconds.append(time.perf_counter() - begun)
        if call < num_batches:
            ids.append(np.asarray(answer))
        _stop_if_told()
    texts = tokens.decode(run.encoder.tokenizer, np.concatenate(ids)[:num_texts])
    return texts, statistics.median(seconds) / batch_size


class Scorer:
    """Scores of texts, as the stage `evaluate` gives them; real texts are gone through once."""

    def __init__(self, run: Run, finished: pipeline.Finished) -> None:
        self.run, self.finished = run, finished
        self.known: dict[str, str] = {}

    def score(self, generated: list[str]) -> Row:
        """Value, spread and value of real texts of each score that can be had, by name."""
        texts = self._texts(generated)
        pieces = {
            name: functools.partial(sharding.on_one_device, piece)
            for name, piece in protocols.pieces(texts).items()
        }
        pieces["latent_frechet"] = functools.partial(
            evaluation.latent_frechet, self.run, self.finished, texts, self._latents_of_real
        )
        state: dict[str, Any] = {"scores": {}, "done": [], "problems": {}}
        for name, piece in pieces.items():
            state = protocols.compute(state, name, piece)
            _stop_if_told()
        for name, problem in state["problems"].items():
            logger.warning("steps: no %s: %s", name, problem)
        row: Row = {}
        for name, score in state["scores"].items():
            row |= {name + end: score[part] for end, part in PARTS.items() if part in score}
        return row

    def _texts(self, generated: list[str]) -> protocols.Texts:
        samples = [sample(self.run, i, text) for i, text in enumerate(generated)]
        texts = evaluation.texts_of(self.run, samples)
        return dataclasses.replace(
            texts, training=lambda: self._training, normalise=self._normalise
        )

    @functools.cached_property
    def _training(self) -> list[str]:
        return first_texts(self.run.dataset.train, len(self.run.dataset.train))

    @functools.cached_property
    def _latents_of_real(self) -> tuple[np.ndarray, np.ndarray]:
        any_texts = self._texts([""] * self.run.config.generate.num_texts)
        return evaluation.latents_of_real(self.run, self.finished, any_texts)

    def _normalise(self, texts: Sequence[str]) -> list[str]:
        """`tokens.round_trip` with a memory: training texts are compared with every time."""
        new = [text for text in dict.fromkeys(texts) if text not in self.known]
        length = self.run.config.data.max_length
        found = tokens.round_trip(self.run.encoder.tokenizer, new, length)
        self.known.update(zip(new, found, strict=True))
        return [self.known[text] for text in texts]
