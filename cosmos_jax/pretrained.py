"""What `config.STAGE.pretrained` names: weights of another run for training to begin with."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import distributed, sharding, trained, workdir
from cosmos_jax.errors import UserError
from cosmos_jax.models.cosmos import Weights
from cosmos_jax.run import Run
from cosmos_jax.stages.base import Params, Stage


def directory(run: Run, name: str) -> Path | None:
    """Where the stage `name` begins from, WORKDIR/STAGE, or None if it begins anew.

    Not for the autoencoder, which is taken as it is, see `pipeline`.
    """
    # A workdir of before there was this field has a config without it.
    named = run.config[name].get("pretrained")
    return Path(named) / name if named else None


def statistics(run: Run, name: str) -> dict[str, np.ndarray]:
    """What that stage measured before it began, of which this one takes over all.

    UserError if it is not trained, or has latents of another shape.
    """
    source = _directory(run, name)
    found = trained.statistics(source)
    if found is None:
        raise UserError(
            f"config.{name}.pretrained: {source} holds no checkpoint; give a workdir or an "
            "exported directory that has this stage trained"
        )
    if name == "diffusion":
        asked = (run.config.autoencoder.num_latents, run.config.encoder.hidden_size)
        given = found["latents_mean"].shape
        if given != asked:
            raise UserError(
                f"config.diffusion.pretrained: {source} learned {given[0]} latents of width "
                f"{given[1]}, but here they are {asked[0]} of width {asked[1]}"
            )
    return found


def begin(run: Run, stage: Stage) -> Stage:
    """The stage, with those weights to begin with; UserError if they are of other shapes."""
    # Now, to say what will not do before anything is computed; again when training begins, so
    # that they do not lie beside the weights in training.
    parameters(run, stage)
    return dataclasses.replace(stage, begin=lambda: parameters(run, stage)[1])


def parameters(run: Run, stage: Stage) -> tuple[int, Params]:
    """Step and weights of that stage; UserError if it has none, or of other shapes."""
    source = _directory(run, stage.name)
    try:
        return trained.parameters(_as_there(stage, source.parent), run, source)
    except UserError as error:
        raise UserError(f"config.{stage.name}.pretrained: {error}") from error


def require_same_autoencoder(
    run: Run, autoencoder: Stage, autoencoder_directory: Path, step: int, weights: Weights
) -> None:
    """UserError if the denoiser to begin with learned the latents of another autoencoder.

    That is one at another step than `step`, or, where the one that it learned from is still
    there, one with another compressor or statistics than are in `weights`. Weights that differ
    by no more than rounding to bfloat16 are the same, as an export may round.
    """
    source = _directory(run, "diffusion")
    learned = (trained.newest_provenance(source) or {}).get("autoencoder_step")
    if learned not in (None, step):  # a converted checkpoint records none
        raise UserError(
            f"config.diffusion.pretrained: {source} learned the latents of an autoencoder at step "
            f"{learned}, but that of {autoencoder_directory} is at step {step}; name the one it "
            "learned from as config.autoencoder.pretrained"
        )
    there = _autoencoder_of(source.parent)
    statistics = trained.statistics(there)
    if statistics is None:  # it has been moved or deleted
        return
    differing = [
        name
        for name in ("states_mean", "states_std")
        if not np.array_equal(statistics[name], autoencoder.statistics[name])
    ]
    if not differing and there.resolve() != autoencoder_directory.resolve():
        _, params = trained.parameters(_as_there(autoencoder, there.parent), run, there)
        # Without compression there is no compressor, and latents are states.
        compressors = (x.get("compressor", {}) for x in (params, weights))
        differing = _differing(run, *compressors)
    if differing:
        raise UserError(
            f"config.diffusion.pretrained: {source} learned the latents of {there}, and that of "
            f"{autoencoder_directory} is another autoencoder (in {differing[0]}); name the one it "
            "learned from as config.autoencoder.pretrained"
        )


def _directory(run: Run, name: str) -> Path:
    found = directory(run, name)
    assert found is not None
    return found


def _as_there(stage: Stage, source: Path) -> Stage:
    """The stage as the workdir `source` has saved it: whether averaged, and which is the best."""
    settings, theirs = ConfigDict(stage.settings.to_dict()), _config(source)[stage.name]
    for name in ("ema_decay", "best_metric"):
        settings[name] = theirs.get(name, settings[name])
    return dataclasses.replace(stage, settings=settings)


def _autoencoder_of(source: Path) -> Path:
    """Where the autoencoder of the workdir `source` is."""
    return Path(_config(source).autoencoder.get("pretrained") or source) / "autoencoder"


def _config(source: Path) -> ConfigDict:
    recorded = distributed.on_first(lambda: workdir.read_json(source / "config.json"))
    if recorded is None:
        raise UserError(f"{source}: no config.json; give a workdir or an exported directory")
    return ConfigDict(recorded)


def _differing(run: Run, left: Params, right: Params) -> list[str]:
    """Paths of the arrays that are not the same once they are rounded to bfloat16."""

    def same(left: Params, right: Params) -> Any:
        def rounded(x: jax.Array) -> jax.Array:
            return x.astype(jnp.bfloat16)

        return jax.tree.map(lambda a, b: jnp.array_equal(rounded(a), rounded(b)), left, right)

    found = jax.jit(same, out_shardings=sharding.replicated(run.mesh))(left, right)
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, equal in jax.tree_util.tree_leaves_with_path(found)
        if not bool(equal)
    ]
