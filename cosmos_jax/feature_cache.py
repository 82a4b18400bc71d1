"""Features of all training texts on disk, for small data that training reads many times.

The frozen part of the forward pass costs as much as training where the trained part is
small; computed once and kept as fp16 it costs nothing from the second epoch on. Files are
memory-mapped, so the data need not fit into memory. One process only.
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from cosmos_jax import distributed, metrics, sharding, workdir
from cosmos_jax.data.batches import Batch, prefetch, row_indices
from cosmos_jax.run import Run
from cosmos_jax.stages.base import Stage


def training_batches(stage: Stage, run: Run, before: str = "") -> Callable[[int], Batch]:
    """step -> batch with features, as `stage.features` makes them, from the cache.

    `before` is the stage whose cached features, if they are there, are features of this one.
    """
    directory = _directory(run, stage.name)
    identity = {**stage.provenance, "layout": 1}
    if workdir.read_json(directory / "identity.json") != identity:
        _fill(stage, run, _directory(run, before) if before else None)
        workdir.write_json(directory / "identity.json", identity)
    arrays = _open(directory)
    num_rows, seed = len(run.dataset.train), run.data_seed(stage.name)

    def load(step: int) -> Batch:
        rows = row_indices(seed, step, stage.settings.batch_size, num_rows)
        return {"rows": rows, **{name: array[rows] for name, array in arrays.items()}}

    return load


def remove(run: Run) -> None:
    """Frees the disk."""
    shutil.rmtree(run.workdir / "cache", ignore_errors=True)


def _directory(run: Run, stage_name: str) -> Path:
    return run.workdir / "cache" / stage_name


def _open(directory: Path) -> dict[str, np.ndarray]:
    return {path.stem: np.load(path, mmap_mode="r") for path in directory.glob("*.npy")}


def _fill(stage: Stage, run: Run, before: Path | None) -> None:
    directory = _directory(run, stage.name)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    num_rows = len(run.dataset.train)
    load = run.ordered_batches(run.dataset.train, stage.settings.batch_size, num_rows)
    cached = _open(before) if before and (before / "identity.json").exists() else {}
    compiled = jax.jit(stage.features)
    arrays: dict[str, np.memmap] = {}
    bar = metrics.progress(len(load), f"{stage.name}: features", unit="batch")
    for index, batch in metrics.counted(prefetch(load, range(len(load))), bar):
        real, rows = batch.pop("real"), batch["rows"]
        batch |= {name: array[rows] for name, array in cached.items()}
        features = jax.device_get(compiled(stage.frozen, sharding.put_batch(batch, run.mesh)))
        del features["rows"]
        start = index * len(real)
        for name, value in features.items():
            value = value[real]
            if name not in arrays:
                arrays[name] = np.lib.format.open_memmap(
                    directory / f"{name}.npy",
                    mode="w+",
                    dtype=np.float16 if value.dtype.kind == "f" else value.dtype,
                    shape=(num_rows, *value.shape[1:]),
                )
            arrays[name][start : start + len(value)] = value
        if distributed.preempted():
            raise distributed.Preempted(f"{stage.name}: features will be computed again")
    load.log_cuts(stage.name)
    for array in arrays.values():
        array.flush()
