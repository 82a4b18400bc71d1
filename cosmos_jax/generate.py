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
from jax.experimental import multihost_utils

from cosmos_jax import distributed, metrics, pipeline, provenance, sharding, trained, workdir
from cosmos_jax.data import tokens
from cosmos_jax.run import Run
from cosmos_jax.sampling import make_generator

logger = logging.getLogger(__name__)


def generate(run: Run) -> None:
    """Generates `config.generate.num_texts` texts, for conditional tasks one per test source."""
    settings = run.config.generate
    sharding.check_batch_size(settings.batch_size, run.mesh, "generate.batch_size")
    model, stage, weights = pipeline.all_weights(run)
    num_texts = settings.num_texts
    if model.conditional and num_texts > len(run.dataset.test):
        num_texts = len(run.dataset.test)
        logger.info("generate: one text for each of the %d test sources", num_texts)
    identity = {
        **stage.provenance,
        "diffusion_step": trained.finished_step(run.workdir / "diffusion"),
        **{
            name: run.config.diffusion[name]
            for name in ("sampler", "num_sampling_steps", "min_time", "answer", "guidance")
        },
        "batch_size": settings.batch_size,
    }
    done = _resume(run.workdir, identity, num_texts) if distributed.is_first() else 0
    done = int(multihost_utils.broadcast_one_to_all(np.int32(done)))
    if done >= num_texts:
        logger.info("generate: finished, %d texts", num_texts)
        return

    generator = jax.jit(make_generator(run.config, model))
    key = run.key("generate")
    sources = run.ordered_batches(run.dataset.test, settings.batch_size, num_texts)
    first = distributed.is_first()
    partial = run.workdir / "samples.partial.jsonl"
    bar = metrics.progress(num_texts, "generate", start=done, unit="text", active=first)

    def write(start: int, ids: jax.Array) -> None:
        ids_BxL = distributed.gather(ids)[: num_texts - start]
        if first:
            texts = tokens.decode(run.encoder.tokenizer, ids_BxL)
            with open(partial, "a", encoding="utf-8") as file:
                for i, text in enumerate(texts, start):
                    file.write(json.dumps(_sample(run, i, text), ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        bar.update(len(ids_BxL))

    with bar:
        pending: tuple[int, jax.Array] | None = None
        for start in range(done, num_texts, settings.batch_size):
            rows = np.arange(start, start + settings.batch_size)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(key, rows)
            keys = jax.device_put(keys, sharding.batch_layout(run.mesh))
            source = None
            if model.conditional:
                batch = sharding.put_batch(sources(start // settings.batch_size), run.mesh)
                source = (batch["source_ids"], batch["source_mask"])
            ids = generator(weights, keys, source)
            # Decoding and writing the batch before goes on while the device computes this one.
            if pending is not None:
                write(*pending)
            pending = (start, ids)
            stopping = distributed.preempted()
            if stopping or start + len(rows) >= num_texts:
                write(*pending)
            if stopping:
                raise distributed.Preempted(f"generate: {start + len(rows)} texts are saved")
    sources.log_cuts("generate")
    if first:
        os.replace(partial, run.workdir / "samples.jsonl")


def _sample(run: Run, i: int, text: str) -> dict[str, str]:
    if not run.dataset.conditional:
        return {"text": text}
    row = run.dataset.test[i]
    return {"text": text, "source": row.source or "", "reference": row.text}


def read_samples(path: Path) -> list[dict[str, str]]:
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


def _resume(directory: Path, identity: dict[str, Any], num_texts: int) -> int:
    """How many texts of this identity there are already; clears away those of another."""
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
        samples = samples[: len(samples) - len(samples) % identity["batch_size"]]
    lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
    workdir.write_text(partial, "".join(lines))
    if len(samples) == num_texts:
        os.replace(partial, final)
    return len(samples)
