"""Features of all training texts on disk, for small data that training reads many times.

The frozen part of the forward pass costs as much as training where the trained part is
small; computed once and kept as fp16 it costs nothing from the second epoch on. Files are
memory-mapped, so the data need not fit into memory. The first of several processes writes
them, all read them.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from cosmos_jax import distributed, metrics, sharding, workdir
from cosmos_jax.data.batches import Batch, prefetch, row_indices
from cosmos_jax.errors import UserError
from cosmos_jax.run import Run
from cosmos_jax.stages.base import Stage


def training_batches(stage: Stage, run: Run, before: str = "") -> Callable[[int], Batch]:
    """step -> batch with features, as `stage.features` makes them, from the cache.

    `before` is the stage whose cached features, if they are there, are features of this one.
    """
    directory = _directory(run, stage.name)
    identity = {**stage.provenance, "layout": 1}
    path = directory / "identity.json"
    if distributed.on_first(lambda: workdir.read_json(path)) != identity:
        _fill(stage, run, _directory(run, before) if before else None)
        distributed.on_first(lambda: workdir.write_json(path, identity))
    arrays = _open(directory)
    num_rows, seed = len(run.dataset.train), run.data_seed(stage.name)
    local = sharding.local_rows(stage.settings.batch_size, run.mesh)

    def load(step: int) -> Batch:
        rows = row_indices(seed, step, stage.settings.batch_size, num_rows)[local]
        return {"rows": rows, **{name: array[rows] for name, array in arrays.items()}}

    return load


def remove(run: Run) -> None:
    """Frees the disk."""
    distributed.on_first(lambda: shutil.rmtree(run.workdir / "cache", ignore_errors=True))


def _directory(run: Run, stage_name: str) -> Path:
    return run.workdir / "cache" / stage_name


def _open(directory: Path) -> dict[str, np.ndarray]:
    """The arrays of a cache that is complete; empty if it is not."""
    complete = directory / "identity.json"
    names = distributed.on_first(
        lambda: [p.name for p in sorted(directory.glob("*.npy"))] if complete.exists() else []
    )
    return {Path(name).stem: np.load(directory / name, mmap_mode="r") for name in names}


def _fill(stage: Stage, run: Run, before: Path | None) -> None:
    directory, first = _directory(run, stage.name), distributed.is_first()
    distributed.on_first(lambda: _empty(directory))
    num_rows = len(run.dataset.train)
    load = run.ordered_batches(run.dataset.train, stage.settings.batch_size, num_rows)
    cached = _open(before) if before else {}
    compiled = jax.jit(stage.features)
    arrays: dict[str, np.memmap] = {}
    bar = metrics.progress(len(load), f"{stage.name}: features", unit="batch", active=first)
    for _, batch in metrics.counted(prefetch(load, range(len(load))), bar):
        batch |= {name: array[batch["rows"]] for name, array in cached.items()}
        features = compiled(stage.frozen, sharding.put_batch(batch, run.mesh))
        features = distributed.gather(features)
        real, rows = features.pop("real"), features.pop("rows")
        with distributed.together():
            for name, value in features.items() if first else ():
                if name not in arrays:
                    dtype = np.float16 if value.dtype.kind == "f" else value.dtype
                    shape = (num_rows, *value.shape[1:])
                    arrays[name] = _create(directory / f"{name}.npy", dtype, shape)
                arrays[name][rows[real]] = value[real]
        if distributed.preempted():
            raise distributed.Preempted(f"{stage.name}: features will be computed again")
    load.log_cuts(stage.name)
    for array in arrays.values():
        array.flush()


def _create(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    # Where a mapped file has holes, a full disk would end the process without a word.
    if hasattr(os, "posix_fallocate"):
        try:
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as error:
            raise UserError(
                f"{path}: its {array.nbytes:,} bytes cannot be written: {error.strerror}; free "
                "that much or set --config.data.cache_features=False"
            ) from error
    return array


def _empty(directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
