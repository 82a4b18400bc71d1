"""Opens what a config names and runs its stages, each from where it stopped."""

import contextlib
import dataclasses
from pathlib import Path

import jax
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import (
    config_checks,
    distributed,
    encoder,
    evaluation,
    examples,
    metrics,
    pipeline,
    results,
    samples,
    sharding,
    timing,
)
from cosmos_jax.data import sources
from cosmos_jax.errors import UserError
from cosmos_jax.run import Run
from cosmos_jax.scores import protocols
from cosmos_jax.workdir import claim, locked


def open_run(config: ConfigDict, workdir: Path) -> Run:
    """Loads what the config names, data first; UserError if any of it will not do."""
    mesh = sharding.make_mesh(config.mesh)
    dataset = sources.load(config.data.source, config.data.directory)
    if config.data.num_train_texts:
        train = sources.Spread(dataset.train, config.data.num_train_texts)
        dataset = dataclasses.replace(dataset, train=train)
    text_encoder = encoder.load(config.encoder.name)
    config = config_checks.resolve(config, text_encoder.config, dataset.conditional)
    return Run(config, workdir, mesh, text_encoder, dataset)


def run_stages(config: ConfigDict, workdir: Path, stage: str = "all") -> None:
    """Trains, generates and evaluates; `stage` is one of `config_lib.stages`, or "all".

    Raises:
      UserError: something the user can mend.
      distributed.Preempted: SIGTERM came; the same call goes on from there.
    """
    protocols.parse(config.evaluate.protocols)  # not only when there is something to score

    stages = config_lib.stages(config)
    wanted = stages if stage == "all" else (stage,)
    if not set(wanted) <= set(stages):
        off = stage in config_lib.SYSTEMS[config.system]
        hint = f" (config.{stage}.steps is 0)" if off else ""
        raise UserError(
            f"--stage={stage}: the stages of config.system {config.system!r} are "
            f"{', '.join(stages)}{hint}"
        )
    run = distributed.in_turn(lambda: open_run(config, workdir))
    with contextlib.ExitStack() as stack, jax.set_mesh(run.mesh):
        distributed.on_first(lambda: stack.enter_context(locked(workdir)))
        pipeline.require_as_learned(run)
        distributed.on_first(lambda: claim(workdir, run.config))
        for name in wanted:
            with contextlib.ExitStack() as around:
                if distributed.is_first():
                    around.callback(metrics.write_report, workdir)
                    around.enter_context(timing.recorded(workdir, name))
                if name in config_lib.TRAINED:
                    pipeline.train_stage(run, name)
                    examples.write(run)
                elif name == "generate":
                    samples.generate(run)
                else:
                    evaluation.evaluate(run)
        if "evaluate" in wanted and distributed.is_first():
            print(results.table(run))
