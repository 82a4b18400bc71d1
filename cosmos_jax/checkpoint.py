"""Checkpoints of a stage; the only place that knows Orbax.

A checkpoint has named items (trees of arrays: params, ema, optimizer, statistics), each of
which can be read alone, and `metadata`, a JSON object. Arrays are restored onto whatever
layout is asked for, so a run may go on with other devices than it began with.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as managers

from cosmos_jax import distributed
from cosmos_jax.errors import UserError

logger = logging.getLogger(__name__)

Tree = Any
_METADATA = "metadata"


class Checkpoints:
    """The checkpoints in one folder; saving goes on in the background.

    With `best` the best checkpoint by that metric is kept beside the last `keep` ones.
    """

    def __init__(
        self, directory: Path, *, keep: int = 1, best: str = "", read_only: bool = False
    ) -> None:
        self._directory = directory.absolute()
        policies: list[Any] = [managers.LatestN(keep)]
        if best:
            policies.append(
                managers.BestN(
                    get_metric_fn=functools.partial(_goodness, best),
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=managers.AnyPreservationPolicy(policies),
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

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
        """UserError if the save under way has failed."""
        with self._saving():
            self._manager.check_for_errors()

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
        with self._saving():
            if step in self.steps():
                # It could not be read, or training would have gone on from there.
                self._manager.delete(step)
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                    **{_METADATA: ocp.args.JsonSave(dict(metadata))},
                ),
                metrics=metrics and dict(metrics),
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
            complete = sorted(self._manager.all_steps())
            raise UserError(
                f"{self._directory}: the checkpoint cannot be saved: {_reason(error)}; the "
                f"complete ones are those of steps {complete or 'none'}: see to that and run the "
                "same command again"
            ) from error

    def metadata(self, step: int) -> dict[str, Any]:
        return self._manager.restore(
            step, args=ocp.args.Composite(**{_METADATA: ocp.args.JsonRestore()})
        )[_METADATA]

    def restore(self, step: int, shapes: Mapping[str, Tree]) -> dict[str, Tree]:
        """Reads items as `shapes` describes them.

        A leaf is a `jax.ShapeDtypeStruct`, with the sharding to restore onto; without one the
        array comes as NumPy's. An item whose description is None is read as it was saved.

        Raises:
          UserError: the checkpoint has other arrays than described: it is of another model.
        """
        for name, tree in shapes.items():
            if tree is not None:
                self._check_shapes(step, name, tree)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardRestore(tree) for name, tree in shapes.items()}
            ),
        )
        return {name: restored[name] for name in shapes}

    def _check_shapes(self, step: int, item: str, tree: Tree) -> None:
        directory = self._directory / str(step) / item
        if not directory.exists():
            raise UserError(f"{self._directory}/{step} has no {item}: it is of another model")
        with ocp.StandardCheckpointer() as checkpointer:
            saved: Any = checkpointer.metadata(directory)
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

        With `best` that of the best value of this metric comes first, if any has one. A damaged
        one is passed over with a warning; UserError if all of them are.
        """
        steps = self.steps()
        if best:
            metrics = {step: self._manager.metrics(step) for step in steps}
            scored = [step for step in steps if metrics[step] and best in metrics[step]]
            # Of equal ones the newest.
            scored.sort(key=lambda step: _goodness(best, metrics[step]), reverse=True)
            steps = scored[:1] + [step for step in steps if step not in scored[:1]]
        for step in steps:
            try:
                return step, self.restore(step, shapes), self.metadata(step)
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


def _goodness(metric: str, metrics: Mapping[str, float]) -> float:
    """Larger is better: of losses the negative, of accuracies and matches the value."""
    if metric not in metrics:
        return -math.inf
    return metrics[metric] if metric.endswith(("accuracy", "match")) else -metrics[metric]


def _reason(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shapes_by_path(tree: Tree) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def shapes_on(tree: Tree, layout: Tree) -> Tree:
    """Descriptions for `restore`: the tree's shapes and types with the layout's shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        layout,
    )
