"""From a run to its stages: what each is given of what the one before it left."""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import (
    config_checks,
    distributed,
    encoder,
    exported,
    feature_cache,
    measure,
    pretrained,
    sharding,
    trained,
    workdir,
)
from cosmos_jax.baselines import BASELINES
from cosmos_jax.data.batches import Batch
from cosmos_jax.data.sources import Dataset
from cosmos_jax.errors import UserError
from cosmos_jax.models import cosmos
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.run import Run
from cosmos_jax.stages import autoencoder, diffusion, distillation
from cosmos_jax.stages.base import Stage
from cosmos_jax.train import train

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False)
class Finished:
    """What a run has trained to write with.

    Attributes:
      model: `Cosmos`, or that of a baseline.
      stages: by name, those that the parameters in `weights` are of.
      weights: all that `model` takes.
      identity: what these weights are: the data, and the step of each stage.
    """

    model: Any
    stages: dict[str, Stage]
    weights: Weights
    identity: dict[str, Any]


def open_trained(
    directory: Path, *, dtype: str = "", unfinished: bool = False, distilled: bool = True
) -> Run:
    """A run that is only to be used, from its workdir or an exported directory: without its data.

    Args:
      dtype: of the matrix products; "": as it was trained.
      unfinished: be content with the steps that its stages have.
      distilled: False: the denoiser before it was distilled, if it was.

    Raises:
      UserError: there is no such run, or its text encoder cannot be read.
    """
    directory = directory.absolute()
    recorded = workdir.read_config(directory)
    if recorded is None or "encoder" not in recorded:
        raise UserError(f"{directory}: is neither a workdir nor an exported model of cosmos-jax")
    config = config_lib.recorded(recorded)
    config.mesh.update(data=-1, fsdp=1, tensor=1)
    config.dtype = dtype or config.dtype
    if not distilled:
        config.distillation.steps = 0
    for name in config_lib.training(config) if unfinished else ():
        step = trained.newest_step(directory / name)
        if step is None and name == "distillation":
            logger.warning("%s: is not distilled yet", directory)
            config.distillation.steps = 0
        if step is not None and step < config[name].steps:
            logger.warning("%s: %s is at step %d of %d", directory, name, step, config[name].steps)
            config[name].steps = step
    config_checks.validate(config)
    if (directory / config.encoder.name).is_dir():
        config.encoder.name = str(directory / config.encoder.name)
    mesh = sharding.make_mesh(config.mesh)
    nothing = Dataset("none", config.data.conditional, (), (), (), "")
    return Run(config, directory, mesh, encoder.load(config.encoder.name), nothing)


def autoencoder_directory(run: Run) -> Path:
    """Where the autoencoder's checkpoints are: this workdir, or the one it is taken from."""
    workdir = Path(run.config.autoencoder.pretrained or run.workdir)
    return workdir / "autoencoder"


def autoencoder_stage(run: Run) -> tuple[Cosmos, Stage]:
    """The model and stage one, with statistics from its folder or measured now."""
    directory = autoencoder_directory(run)
    statistics = trained.statistics(directory)
    frozen = trained.encoder_weights(run)
    if statistics is None:
        if run.config.autoencoder.pretrained:
            raise UserError(
                f"config.autoencoder.pretrained: {directory} holds no checkpoint; "
                "give the workdir of a run whose autoencoder is trained, or an exported directory"
            )
        vocabulary = measure.vocabulary(run)
        model = cosmos.build(run.config, len(vocabulary))
        statistics = {"vocabulary": vocabulary, **measure.states(run, model, frozen)}
        frozen |= trained.place_statistics(run, statistics)
        if run.config.autoencoder.head_init == "regression":
            frozen |= sharding.put_tree(measure.head(run, model, frozen), run.mesh)
    else:
        model = cosmos.build(run.config, len(statistics["vocabulary"]))
        frozen |= trained.place_statistics(run, statistics)
    stage = autoencoder.make(run.config, model, frozen, statistics, run.dataset.fingerprint)
    return model, stage


def trained_autoencoder(run: Run) -> tuple[Cosmos, Weights]:
    """The model, with the weights of stage one, which must be finished."""
    model, _, _, weights = _trained_autoencoder(run)
    return model, weights


def _trained_autoencoder(run: Run) -> tuple[Cosmos, Stage, int, Weights]:
    directory = autoencoder_directory(run)
    _require_finished(run, "autoencoder", directory)
    model, first = autoencoder_stage(run)
    step, params = _parameters(run, first, directory)
    return model, first, step, {**first.frozen, **params}


def diffusion_stage(run: Run, name: str = "diffusion") -> Finished:
    """Stages one and two, with the weights of stage one, which must be finished.

    `name` is the stage whose folder tells the statistics of latents; an exported student has left
    that of its teacher behind.
    """
    model, first, step, weights = _trained_autoencoder(run)
    if model.conditional:
        weights |= trained.no_source(run, model, weights)
    statistics = trained.statistics(run.workdir / name)
    begins = statistics is None and bool(pretrained.directory(run, "diffusion"))
    if begins:
        statistics = pretrained.statistics(run, "diffusion")
        pretrained.require_same_autoencoder(run, first, autoencoder_directory(run), step, weights)
    if statistics is None:
        statistics = measure.latents(run, model, weights)
    weights |= trained.place_statistics(run, statistics)
    frozen = {name: value for name, value in weights.items() if name != "decompressor"}
    second = diffusion.make(run.config, model, frozen, statistics, run.dataset.fingerprint, step)
    if begins:
        second = pretrained.begin(run, second)
    return Finished(model, {"autoencoder": first, "diffusion": second}, weights, second.provenance)


def distillation_stage(run: Run) -> Stage:
    """Stage three, with the weights of stage two, its teacher, which must be finished."""
    directory = run.workdir / "diffusion"
    _require_finished(run, "diffusion", directory)
    found = diffusion_stage(run)
    stage = found.stages["diffusion"]
    step, teacher = _parameters(run, stage, directory)
    _require_same_autoencoder(run, stage, trained.provenance(directory, step))
    return distillation.make(run.config, found.model, stage, teacher, step)


def baseline_stage(run: Run) -> tuple[Any, Stage]:
    """The model of a baseline and its one stage."""
    name = run.config.system
    baseline, conditional = BASELINES[name], run.config.data.conditional
    frozen = trained.special_tokens(run)
    if conditional:
        frozen |= trained.encoder_weights(run)
    statistics = trained.statistics(run.workdir / name)
    begins = statistics is None and bool(pretrained.directory(run, name))
    if begins:
        statistics = pretrained.statistics(run, name)
    if statistics is None:
        statistics = {"vocabulary": measure.vocabulary(run)}
        if conditional:
            model = baseline.build(run.config, len(statistics["vocabulary"]))
            statistics |= measure.states(run, model, frozen, name)
    model = baseline.build(run.config, len(statistics["vocabulary"]))
    frozen |= trained.place_statistics(run, statistics)
    stage = baseline.stage(run.config, model, frozen, statistics, run.dataset.fingerprint)
    return model, pretrained.begin(run, stage) if begins else stage


def finished(run: Run) -> Finished:
    """The autoencoder and the denoiser that writes, or a baseline; UserError if not finished."""
    if run.config.system in BASELINES:
        return _finished_baseline(run)
    name = config_lib.training(run.config)[-1]
    directory = run.workdir / name
    _require_finished(run, "autoencoder", autoencoder_directory(run))
    _require_finished(run, name, directory)
    half = diffusion_stage(run, name)
    stage = half.stages["diffusion"]
    if name == "distillation":
        stage = distillation.student(run.config, stage)
    step, params = _parameters(run, stage, directory)
    recorded = trained.provenance(directory, step)
    _require_same_autoencoder(run, stage, recorded)
    if name == "distillation":
        _require_as_learned(run, recorded)
    return Finished(
        half.model,
        {"autoencoder": half.stages["autoencoder"], name: stage},
        {**half.weights, **params},
        {**recorded, **stage.provenance, f"{name}_step": step},
    )


def undistilled(run: Run) -> Run:
    """The same run with the denoiser of stage two."""
    config = ConfigDict(run.config.to_dict())
    config.distillation.steps = 0
    return dataclasses.replace(run, config=config)


def _finished_baseline(run: Run) -> Finished:
    name = run.config.system
    directory = run.workdir / name
    _require_finished(run, name, directory)
    model, stage = baseline_stage(run)
    step, params = _parameters(run, stage, directory)
    identity = {**stage.provenance, f"{name}_step": step}
    return Finished(model, {name: stage}, {**stage.frozen, **params}, identity)


def train_stage(run: Run, name: str) -> None:
    """Trains a stage, or goes on, or finds that it is done."""
    if distributed.on_first(lambda: exported.is_exported(run.workdir)):
        raise UserError(
            f"{run.workdir} is an exported model, which is not trained any further: choose another "
            "--workdir and name this one as `pretrained` of the stages in the config"
        )
    if name == "autoencoder" and run.config.autoencoder.pretrained:
        logger.info("autoencoder: taken from %s", run.config.autoencoder.pretrained)
        return
    settings = run.config[name]
    sharding.check_batch_size(
        settings.batch_size, run.mesh, f"{name}.batch_size", settings.accumulate
    )
    if name == "autoencoder":
        _, stage = autoencoder_stage(run)
    elif name == "diffusion":
        stage = diffusion_stage(run).stages["diffusion"]
    elif name == "distillation":
        stage = distillation_stage(run)
    else:
        _, stage = baseline_stage(run)
    step = trained.newest_step(run.workdir / name)
    if step is not None and step >= settings.steps:
        # Only if that checkpoint can be read; otherwise its steps are trained again.
        step, _ = trained.parameters(stage, run, run.workdir / name, newest=True)
        if step >= settings.steps:
            if name in ("diffusion", "distillation"):
                recorded = trained.provenance(run.workdir / name, step)
                _require_same_autoencoder(run, stage, recorded)
            if name == "distillation":
                _require_same_teacher(run, stage, recorded)
            _free_cache(run, name)
            logger.info("%s: finished, %d steps", name, step)
            return
    tokens = run.training_batches(settings.batch_size, name)
    load: Callable[[int], Batch] = tokens
    # Without sources a student reads no features.
    featureless = name == "distillation" and not run.config.data.conditional
    if run.config.data.cache_features and settings.steps and not featureless:
        before = {"diffusion": "autoencoder", "distillation": "diffusion"}.get(name, "")
        load = feature_cache.training_batches(stage, run, before)
    held_out = run.ordered_batches(
        run.dataset.valid, run.config.evaluate.batch_size, run.config.evaluate.num_texts
    )
    train(stage, run, load=load, held_out=held_out)
    tokens.log_cuts(name)
    _free_cache(run, name)


def _free_cache(run: Run, name: str) -> None:
    """Once the last stage is trained no one asks for features any more."""
    if name == config_lib.training(run.config)[-1]:
        feature_cache.remove(run)


def _parameters(run: Run, stage: Stage, directory: Path) -> tuple[int, Weights]:
    """The step and parameters of a finished stage; UserError if those of its end are damaged."""
    step, params = trained.parameters(stage, run, directory)
    at_its_end = step >= stage.settings.steps or _elsewhere(run, directory)
    if not (at_its_end or stage.settings.best_metric):
        raise UserError(
            f"{directory}: the checkpoint of step {stage.settings.steps} cannot be read: "
            f"--stage={stage.name} trains it again from step {step}"
        )
    return step, params


def _elsewhere(run: Run, directory: Path) -> bool:
    """Whether a stage is taken as it is: not from a folder that this run trains in."""
    return directory.parent != run.workdir or trained.is_exported(directory)


def _require_same_autoencoder(run: Run, stage: Stage, recorded: dict[str, Any]) -> None:
    """UserError if a denoiser learned the latents of another step of the autoencoder."""
    directory, now = run.workdir / stage.name, stage.provenance["autoencoder_step"]
    learned = recorded.get("autoencoder_step")
    if learned not in (None, now):  # a converted checkpoint records none
        raise UserError(
            f"{directory} learned the latents of the autoencoder at step {learned}, but "
            f"{autoencoder_directory(run)} gives those of step {now}: give it that step back, or "
            f"delete {directory} to train it again"
        )


def _require_same_teacher(run: Run, stage: Stage, recorded: dict[str, Any]) -> None:
    """UserError if a student learned from another step of the denoiser."""
    directory, now = run.workdir / stage.name, stage.provenance["diffusion_step"]
    learned = recorded.get("diffusion_step")
    if learned != now:
        raise UserError(
            f"{directory} learned from the denoiser at step {learned}, and that of "
            f"{run.workdir / 'diffusion'} is at step {now}: delete {directory} to distil again, or "
            "keep it and ask for --stage=generate and --stage=evaluate alone"
        )


def require_as_learned(run: Run) -> None:
    """UserError if a student that is there learned to go in another way than the config asks for.

    To be called before the config is recorded, which would then be of no use.
    """
    if "distillation" in config_lib.training(run.config):
        recorded = trained.newest_provenance(run.workdir / "distillation")
        if recorded is not None:
            _require_as_learned(run, recorded)


def _require_as_learned(run: Run, recorded: dict[str, Any]) -> None:
    """UserError if a student is to be sampled in another way than it learned."""
    for name, value in distillation.learned(run.config).items():
        if recorded.get(name) != value:
            field = f"diffusion.{name.removeprefix('teacher_')}"
            if name in run.config.distillation:
                field = f"distillation.{name}"
            raise UserError(
                f"config.{field} is {value!r}, but {run.workdir / 'distillation'} learned with "
                f"{recorded.get(name)!r}: give that value, delete the folder to distil again, or "
                "sample its teacher by --config.distillation.steps=0"
            )


def _require_finished(run: Run, name: str, directory: Path) -> None:
    """UserError if a stage is not done."""
    if name == "autoencoder" and run.config.autoencoder.pretrained:
        return  # whatever was trained there will do
    if trained.is_exported(directory):
        return  # only what is finished is exported
    step = trained.newest_step(directory)
    if step is None and distributed.on_first(lambda: exported.is_exported(directory.parent)):
        raise UserError(f"{directory.parent}: this export has its denoiser distilled only")
    if step is None:
        raise UserError(
            f"{directory} holds no checkpoint: run --stage={name} first (or --stage=all)"
        )
    steps = run.config[name].steps
    if step < steps:
        raise UserError(
            f"{directory} is at step {step} of {steps}: finish it with --stage={name} (or "
            f"--stage=all), or be content with it by --config.{name}.steps={step}"
        )
