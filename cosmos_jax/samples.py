"""The stage that writes `samples.jsonl`.

Text i is a function of (seed, i) and its source, so generation that was stopped goes on at
the batch it had reached.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cosmos_jax import config as config_lib
from cosmos_jax import distributed, metrics, pipeline, provenance, sharding, workdir
from cosmos_jax.baselines import make_generator
from cosmos_jax.data import tokens
from cosmos_jax.run import Run

logger = logging.getLogger(__name__)

Sample = dict[str, str]
"""A line of `samples.jsonl`: text, and for conditional tasks source and reference."""


def generate(run: Run) -> None:
    """Generates `config.generate.num_texts` texts, for conditional tasks one per test source."""
    settings = run.config.generate
    finished = pipeline.finished(run)
    model, first = finished.model, distributed.is_first()
    num_texts = settings.num_texts
    if model.conditional and num_texts > len(run.dataset.test):
        num_texts = len(run.dataset.test)
        logger.info("generate: one text for each of the %d test sources", num_texts)
    how = config_lib.sampling(run.config)
    logger.info("generate: %s", " ".join(f"{name}={value}" for name, value in how.items()))
    identity = {**finished.identity, **how}
    batch_size = run.even_batch_size(min(settings.batch_size, num_texts))
    done = distributed.on_first(lambda: _resume(run.workdir, identity, num_texts, batch_size))
    if done >= num_texts:
        logger.info("generate: finished, %d texts", num_texts)
        return

    compiled = jax.jit(make_generator(run.config, model))
    key = run.key("generate")
    sources = run.ordered_batches(run.dataset.test, settings.batch_size, num_texts, done)
    local = sharding.local_rows(batch_size, run.mesh)
    partial = run.workdir / "samples.partial.jsonl"
    bar = metrics.progress(num_texts, "generate", start=done, unit="text", active=first)

    def write(start: int, ids: jax.Array) -> None:
        ids_BxL = distributed.gather(ids)[: num_texts - start]
        distributed.on_first(lambda: _append(run, partial, start, ids_BxL))
        bar.update(len(ids_BxL))

    with bar:
        pending: tuple[int, jax.Array] | None = None
        for index, start in enumerate(range(done, num_texts, batch_size)):
            batch = sources(index) if model.conditional else {"rows": start + local}
            ids = compiled(finished.weights, key, sharding.put_batch(batch, run.mesh))
            # Decoding and writing the batch before goes on while the device computes this one.
            if pending is not None:
                write(*pending)
            pending = (start, ids)
            stopping, end = distributed.preempted(), min(num_texts, start + batch_size)
            if stopping or end == num_texts:
                write(*pending)
            if stopping and end < num_texts:
                raise distributed.Preempted(f"generate: {end} texts are saved")
    sources.log_cuts("generate")
    distributed.on_first(lambda: os.replace(partial, run.workdir / "samples.jsonl"))


def _append(run: Run, path: Path, start: int, ids_BxL: np.ndarray) -> None:
    """Writes texts, the first of which has the number `start`, to the end of a file."""
    texts = tokens.decode(run.encoder.tokenizer, ids_BxL)
    samples = [sample(run, i, text) for i, text in enumerate(texts, start)]
    with workdir.writing(path), open(path, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        file.flush()
        os.fsync(file.fileno())


def sample(run: Run, i: int, text: str) -> Sample:
    """A generated text with what it was generated for."""
    if not run.dataset.conditional:
        return {"text": text}
    row = run.dataset.test[i]
    return {"text": text, "source": row.source or "", "reference": row.text}


def read_samples(path: Path) -> list[Sample]:
    """The objects of a samples file; a line that a kill cut off is left out."""
    samples = []
    if path.exists():
        with open(path, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                try:
                    samples.append(json.loads(line))
                except json.JSONDecodeError:
                    break
    return samples


def _resume(directory: Path, identity: dict[str, Any], num_texts: int, batch_size: int) -> int:
    """How many texts of this identity there are already, in whole batches unless all are.

    Clears away those of another identity.
    """
    record, final = directory / "generation.json", directory / "samples.jsonl"
    partial = directory / "samples.partial.jsonl"
    recorded = workdir.read_json(record)
    if recorded is None or recorded["identity"] != identity:
        final.unlink(missing_ok=True)
        partial.unlink(missing_ok=True)
        workdir.write_json(record, {"identity": identity, **provenance.versions()})
        return 0
    if final.exists():
        samples = read_samples(final)
        if len(samples) == num_texts:
            return num_texts
        os.replace(final, partial)
    samples = read_samples(partial)[:num_texts]
    if len(samples) < num_texts:
        samples = samples[: len(samples) - len(samples) % batch_size]
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    workdir.write_text(partial, "".join(lines))
    if len(samples) == num_texts:
        os.replace(partial, final)
    return len(samples)
