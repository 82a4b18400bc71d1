"""What the stages left in their folders, as weights on the mesh; see `models/cosmos.py`.

A stage's folder is WORKDIR/STAGE. Where WORKDIR is an exported directory there is none, and what
the folder would hold comes from there.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from cosmos_jax import distributed, exported, sharding
from cosmos_jax.checkpoint import Checkpoints, shapes_on
from cosmos_jax.errors import UserError
from cosmos_jax.models.cosmos import Cosmos, Weights, inverse_vocabulary
from cosmos_jax.run import Run
from cosmos_jax.stages.base import Stage

logger = logging.getLogger(__name__)


def encoder_weights(run: Run) -> Weights:
    """bert and mask_embedding."""
    host = {"bert": run.encoder.params, "mask_embedding": run.encoder.mask_embedding_D}
    return sharding.put_tree(host, run.mesh)


def place_statistics(run: Run, statistics: dict[str, np.ndarray]) -> Weights:
    """A stage's statistics on the mesh, with what follows from them."""
    host: dict[str, Any] = dict(statistics)
    if "vocabulary" in host:
        host["head_index"] = inverse_vocabulary(
            host["vocabulary"],
            run.config.encoder.vocab_size,
            run.encoder.tokenizer.unk_token_id,
        )
    return sharding.put_tree(host, run.mesh)


def special_tokens(run: Run) -> Weights:
    """Ids of the tokens that a text starts and ends with: start and end, int32."""
    tokenizer = run.encoder.tokenizer
    host = {"start": np.int32(tokenizer.cls_token_id), "end": np.int32(tokenizer.sep_token_id)}
    return sharding.put_tree(host, run.mesh)


def statistics(directory: Path) -> dict[str, np.ndarray] | None:
    """What a stage measured before it began, or None if it has no checkpoint yet."""
    if is_exported(directory):
        with distributed.together():
            return exported.read_statistics(directory.parent, directory.name)
    found = _measured(directory)
    return None if found is None else jax.tree.map(np.asarray, found[1]["statistics"])


def newest_provenance(directory: Path) -> dict[str, Any] | None:
    """What a stage recorded with the newest checkpoint that can be read, or None."""
    if is_exported(directory):
        return distributed.on_first(lambda: _entry(directory)["provenance"])
    found = _measured(directory)
    return None if found is None else found[2]


def _measured(directory: Path) -> tuple[int, dict[str, Any], dict[str, Any]] | None:
    """The newest checkpoint with nothing of it but the statistics; see `Checkpoints.newest`."""
    if not _exists(directory):
        return None
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.newest({"statistics": None})


def newest_step(directory: Path) -> int | None:
    """The newest step that a stage has saved, or None."""
    if is_exported(directory):
        return distributed.on_first(lambda: _entry(directory)["step"])
    if not _exists(directory):
        return None
    with Checkpoints(directory, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    return steps[0] if steps else None


def provenance(directory: Path, step: int) -> dict[str, Any]:
    """What a stage recorded with its checkpoint of a step."""
    if is_exported(directory):
        return distributed.on_first(lambda: _entry(directory)["provenance"])
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.metadata(step)


def parameters(
    stage: Stage, run: Run, directory: Path, *, newest: bool = False
) -> tuple[int, Weights]:
    """The step and the trained parameters, averaged ones where the stage keeps an average.

    They are of the newest checkpoint that can be read, or of the best one where
    `stage.settings.best_metric` says by what, unless `newest` is asked for.
    """
    shapes = jax.eval_shape(stage.init, run.key("shapes"), stage.frozen)
    if is_exported(directory):
        return _exported_parameters(run, directory, shapes)
    item = "ema" if stage.settings.ema_decay else "params"
    layout = sharding.layout(shapes, run.mesh)
    with Checkpoints(directory, read_only=True) as checkpoints:
        best = "" if newest else stage.settings.best_metric
        found = checkpoints.newest({item: shapes_on(shapes, layout)}, best=best)
    if found is None:
        raise UserError(
            f"{directory} holds no checkpoint: run --stage={stage.name} first (or --stage=all)"
        )
    return found[0], found[1][item]


def is_exported(directory: Path) -> bool:
    """Whether WORKDIR/STAGE is a stage of an exported directory.

    UserError if WORKDIR is one, but damaged.
    """

    def found() -> bool:
        return (
            not directory.exists()
            and exported.is_exported(directory.parent)
            and directory.name in exported.header(directory.parent)["stages"]
        )

    return distributed.on_first(found)


def _entry(directory: Path) -> dict[str, Any]:
    return exported.header(directory.parent)["stages"][directory.name]


def _exported_parameters(run: Run, directory: Path, shapes: Any) -> tuple[int, Weights]:
    """Step and parameters of an exported stage; UserError if they have other shapes."""
    with distributed.together():
        there = exported.header(directory.parent)["encoder"]
        if there["fingerprint"] != run.encoder.fingerprint:
            logger.warning(
                "%s was trained with the text encoder %s and other weights of it than those of %s",
                directory.parent,
                there["name"],
                run.encoder.name,
            )
        found = exported.read(directory.parent, directory.name)
        asked, given = _shapes(shapes), _shapes(found.params)
        for path in sorted(asked.keys() | given.keys()):
            if asked.get(path) != given.get(path):
                raise UserError(
                    f"{directory.parent} is of another model: {directory.name}/params/{path} has "
                    f"shape {given.get(path)} there and {asked.get(path)} here; take the sizes "
                    "from its config.json or name another directory"
                )
    return found.step, sharding.put_tree(found.params, run.mesh)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {path: tuple(leaf.shape) for path, leaf in flatten_dict(tree, sep="/").items()}


def _exists(directory: Path) -> bool:
    """As the first process sees it: a network's file system may tell others later."""
    return distributed.on_first(directory.exists)


def no_source(run: Run, model: Cosmos, weights: Weights) -> Weights:
    """States and mask of the empty source, which stands for "no source" in guidance."""
    tokenizer = run.encoder.tokenizer
    length = run.config.data.max_source_length
    ids_S = np.full(length, tokenizer.pad_token_id, np.int32)
    ids_S[:2] = tokenizer.cls_token_id, tokenizer.sep_token_id
    mask_S = np.arange(length) < 2
    compiled = jax.jit(model.text_states, out_shardings=sharding.replicated(run.mesh))
    states_1xSxD = compiled(weights, ids_S[None], mask_S[None])
    host = {"no_source_states": np.asarray(states_1xSxD[0]), "no_source_mask": mask_S}
    return sharding.put_tree(host, run.mesh)
