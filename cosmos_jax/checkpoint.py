"""Checkpoints of a stage; the only place that knows Orbax.

A checkpoint has named items (trees of arrays: params, ema, optimizer, statistics), each of
which can be read alone, and `metadata`, a JSON object. Arrays are restored onto whatever
layout is asked for, so a run may go on with other devices than it began with.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from cosmos_jax.errors import UserError

logger = logging.getLogger(__name__)

Tree = Any
_METADATA = "metadata"


class Checkpoints:
    """The checkpoints in one folder; saving goes on in the background."""

    def __init__(self, directory: Path, *, keep: int = 1, read_only: bool = False) -> None:
        self._directory = directory.absolute()
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                max_to_keep=keep,
                create=not read_only,
                read_only=read_only,
                cleanup_tmp_directories=not read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Waits for the save under way."""
        self._manager.close()

    def wait(self) -> None:
        self._manager.wait_until_finished()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, newest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(self, step: int, items: Mapping[str, Tree], metadata: Mapping[str, Any]) -> None:
        """Starts to save; the arrays may be donated as soon as this returns."""
        self._manager.save(
            step,
            args=ocp.args.Composite(
                **{name: ocp.args.StandardSave(tree) for name, tree in items.items()},
                **{_METADATA: ocp.args.JsonSave(dict(metadata))},
            ),
            force=True,
        )

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
        self, shapes: Mapping[str, Tree]
    ) -> tuple[int, dict[str, Tree], dict[str, Any]] | None:
        """Step, items and metadata of the newest checkpoint that can be read, or None.

        A damaged one is passed over with a warning; UserError if all of them are.
        """
        steps = self.steps()
        for step in steps:
            try:
                return step, self.restore(step, shapes), self.metadata(step)
            except UserError:
                raise
            # Whatever a damaged file makes Orbax or the file system raise.
            except Exception as error:
                reason = str(error).splitlines()[0] if str(error) else type(error).__name__
                logger.warning("checkpoint %s/%d cannot be read: %s", self._directory, step, reason)
        if steps:
            raise UserError(
                f"{self._directory}: none of the checkpoints {steps} can be read; "
                "nothing was deleted: restore the folder from a copy or choose another --workdir"
            )
        return None


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
