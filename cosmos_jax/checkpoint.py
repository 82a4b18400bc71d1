"""Checkpoints of a stage; the only place that knows Orbax.

A checkpoint has named items (trees of arrays: params, ema, optimizer, statistics), each of
which can be read alone, and what was recorded with it, a JSON object. Arrays are restored onto
whatever layout is asked for, so a run may go on with other devices than it began with.

Orbax notices files that are cut off or missing, but not every byte that has changed: arrays
and records therefore carry checksums.
"""

import contextlib
import json
import logging
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from cosmos_jax import distributed
from cosmos_jax.errors import UserError

logger = logging.getLogger(__name__)

Tree = Any
_METADATA = "metadata"


class _Damaged(Exception):
    """What is read is not what was saved."""


class _Manager(ocp.CheckpointManager):
    """Orbax's, which asks JAX with the number of the step whether it is time to stop.

    JAX remembers one number, that of `distributed.preempted`: another would lose the signal.
    """

    def reached_preemption(self, step: int) -> bool:
        del step
        return False


class Checkpoints:
    """The checkpoints in one folder; saving goes on in the background.

    With `best` the best checkpoint by that metric is kept beside the last `keep` ones.
    """

    def __init__(
        self, directory: Path, *, keep: int = 1, best: str = "", read_only: bool = False
    ) -> None:
        self._directory = directory.absolute()
        retention = _Retention(keep, best)
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=retention,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )
        self._metrics = retention.metrics
        for step in self.steps() if best and not read_only else ():
            self._metrics[step] = self._read_metrics(step)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # otherwise that one says more
                raise

    def close(self) -> None:
        """Waits for the save under way."""
        with self._saving():
            self._manager.close()

    def wait(self) -> None:
        with self._saving():
            self._manager.wait_until_finished()

    def check(self) -> None:
        """UserError if a save has failed, as soon as that is known."""
        # Not Orbax's `check_for_errors`: while a save is failing that takes its error away and
        # an older checkpoint is deleted for it. Several processes must wait together: they
        # learn of it at the next save.
        if jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, newest first."""
        # Asked of one process: a network's file system may tell others later.
        return distributed.on_first(lambda: sorted(self._manager.all_steps(), reverse=True))

    def save(
        self,
        step: int,
        items: Mapping[str, Tree],
        metadata: Mapping[str, Any],
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save; the arrays may be donated as soon as this returns.

        Raises:
          UserError: this save or the one before failed, for want of space for example.
        """
        record = {
            "metadata": dict(metadata),
            "metrics": dict(metrics or {}),
            "checksums": {name: int(_checksum(tree)) for name, tree in items.items()},
        }
        self._metrics[step] = record["metrics"]
        with self._saving():
            if step in self.steps():
                # It could not be read, or training would have gone on from there.
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    **{_METADATA: ocp.args.JsonSave({**record, "crc32": _crc32(record)})},
                ),
                force=True,
            )

    @contextlib.contextmanager
    def _saving(self) -> Iterator[None]:
        """Turns whatever Orbax or the file system raise about a save into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            self._manager.reload()  # what is on the disk, without the one that failed
            complete = sorted(self._manager.all_steps())
            raise UserError(
                f"{self._directory}: the checkpoint cannot be saved: {_reason(error)}; the "
                f"complete ones are those of steps {complete or 'none'}: see to that and run the "
                "same command again"
            ) from error

    def metadata(self, step: int) -> dict[str, Any]:
        return self._record(step)["metadata"]

    def _record(self, step: int) -> dict[str, Any]:
        record = self._manager.restore(
            step, args=ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()})
        )[_METADATA]
        if record.pop("crc32", None) != _crc32(record):
            raise _Damaged("its metadata has changed since it was saved")
        return record

    def _read_metrics(self, step: int) -> dict[str, float]:
        """Empty if the checkpoint is damaged."""
        try:
            return self._record(step)["metrics"]
        # Whatever a damaged file makes Orbax or the file system raise.
        except Exception:
            return {}

    def _restore(
        self, step: int, shapes: Mapping[str, Tree], checksums: Mapping[str, int]
    ) -> dict[str, Tree]:
        for name, tree in shapes.items():
            if name not in checksums:
                raise UserError(f"{self._directory}/{step} has no {name}: it is of another model")
            if tree is not None:
                self._check_shapes(step, name, tree)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
            ),
        )
        items = {name: restored[name] for name in shapes}
        for name, tree in items.items():
            if int(_checksum(tree)) != checksums[name]:
                raise _Damaged(f"its {name} have changed since they were saved")
        return items

    def _check_shapes(self, step: int, item: str, tree: Tree) -> None:
        with ocp.StandardCheckpointer() as checkpointer:
            saved: Any = checkpointer.metadata(self._directory / str(step) / item)
        if saved.item_metadata is None:
            raise _Damaged(f"the description of its {item} is damaged or missing")
        asked, found = _shapes_by_path(tree), _shapes_by_path(saved.item_metadata.tree)
        for path in sorted(asked.keys() | found.keys()):
            if asked.get(path) != found.get(path):
                raise UserError(
                    f"{self._directory}/{step} is of another model: {item}/{path} has shape "
                    f"{found.get(path)} there and {asked.get(path)} here; choose another --workdir"
                )

    def newest(
        self, shapes: Mapping[str, Tree], *, best: str = ""
    ) -> tuple[int, dict[str, Tree], dict[str, Any]] | None:
        """Step, items and metadata of the newest checkpoint that can be read, or None.

        Items come as `shapes` describes them: a leaf is a `jax.ShapeDtypeStruct`, with the
        sharding to restore onto; an item whose description is None is read as it was saved.
        With `best` those that have that metric come first, the best one before the others.
        Damaged ones are passed over with a warning.

        Raises:
          UserError: all are damaged, or one has other arrays than described: it is of another
            model.
        """
        steps = self.steps()
        if best:
            scores = {step: _goodness(self._read_metrics(step), best) for step in steps}
            steps.sort(key=lambda step: (scores[step], step), reverse=True)
        for step in steps:
            try:
                record = self._record(step)
                return step, self._restore(step, shapes, record["checksums"]), record["metadata"]
            except UserError:
                raise
            # Whatever a damaged file makes Orbax or the file system raise.
            except Exception as error:
                logger.warning(
                    "checkpoint %s/%d cannot be read: %s", self._directory, step, _reason(error)
                )
        if steps:
            raise UserError(
                f"{self._directory}: none of the checkpoints {steps} can be read; "
                "nothing was deleted: restore the folder from a copy or choose another --workdir"
            )
        return None


class _Retention(managers.PreservationPolicy):
    """Keeps the last checkpoints and the best one by `metrics`, of those that have the metric."""

    def __init__(self, keep: int, best: str) -> None:
        self.metrics: dict[int, Mapping[str, float]] = {}
        self._keep, self._best = keep, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        # In the order of saving. A later step than the last one saved could not be read.
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = set([step for step in steps if step <= steps[-1]][-self._keep :])
        scores = {step: _goodness(self.metrics.get(step, {}), self._best) for step in steps}
        best = max(steps, key=lambda step: (scores[step], step), default=None)
        if best is not None and scores[best] > -math.inf:
            kept.add(best)
        return [step in kept for step in steps]


def _goodness(metrics: Mapping[str, float], name: str) -> float:
    """Larger is better: of losses the negative, of accuracies and matches the value."""
    if name not in metrics or not math.isfinite(metrics[name]):
        return -math.inf
    return metrics[name] if name.endswith(("accuracy", "match")) else -metrics[name]


@jax.jit
def _checksum(tree: Tree) -> jax.Array:
    """A number that no change of a single element leaves as it is, on any layout; uint32.

    The sum of all elements' bits, each times an odd number that is its own.
    """
    total = jnp.uint32(0)
    for leaf in jax.tree.leaves(tree):
        if leaf.dtype != bool:
            leaf = jax.lax.bitcast_convert_type(leaf, f"uint{8 * min(4, leaf.dtype.itemsize)}")
        position = jnp.uint32(0)
        for axis, length in enumerate(leaf.shape):
            index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
            position = position * jnp.uint32(length) + index
        bits = leaf.astype(jnp.uint32) * (2 * position + 1)
        total = total * jnp.uint32(31) + jnp.sum(bits, dtype=jnp.uint32)
    return total


def _crc32(record: Mapping[str, Any]) -> int:
    return zlib.crc32(json.dumps(record, sort_keys=True).encode())


def _reason(error: Exception) -> str:
    """What a library said, in one line and without its own details in brackets."""
    line = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return line.partition(" [")[0]


def _shapes_by_path(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes_on(tree: Tree, layout: Tree) -> Tree:
    """Descriptions for `newest`: the tree's shapes and types with the layout's shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        layout,
    )
