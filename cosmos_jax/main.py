"""Runs the stages of Cosmos on one config; every stage goes on where it stopped.

python -m cosmos_jax.main --config=configs/summarize.py --workdir=runs/xsum
"""

import contextlib
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from cosmos_jax import commands, distributed
from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError

STAGES = ("all", "autoencoder", "diffusion", "generate", "evaluate", "describe")

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file in configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; default runs/NAME of the config."
)
_STAGE = flags.DEFINE_enum("stage", "all", STAGES, "What to do; all: every stage in order.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", "", "host:port of the first of several processes, where it is not detected."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 1, "Processes, with --coordinator.")
_PROCESS_ID = flags.DEFINE_integer("process_id", 0, "Number of this process, with --coordinator.")


logger = logging.getLogger("cosmos_jax")


def open_run(config: ConfigDict, workdir: Path):
    """Loads what the config names, data first; UserError if any of it will not do."""
    from cosmos_jax import encoder, sharding
    from cosmos_jax.data import sources
    from cosmos_jax.run import Run

    mesh = sharding.make_mesh(config.mesh)
    dataset = sources.load(config.data.source, config.data.directory)
    if config.data.num_train_texts:
        train = sources.Spread(dataset.train, config.data.num_train_texts)
        dataset = dataclasses.replace(dataset, train=train)
    text_encoder = encoder.load(config.encoder.name)
    config = config_lib.resolve(config, text_encoder.config, dataset.conditional)
    return Run(config, workdir, mesh, text_encoder, dataset)


def run_stages(config: ConfigDict, workdir: Path, stage: str = "all") -> None:
    """Trains, generates and evaluates; `stage` is one of STAGES but describe.

    Raises:
      UserError: something the user can mend.
      distributed.Preempted: SIGTERM came; the same call goes on from there.
    """
    from cosmos_jax import evaluate, generate, pipeline, results
    from cosmos_jax.workdir import claim, locked

    run = distributed.in_turn(lambda: open_run(config, workdir))
    wanted = STAGES[1:-1] if stage == "all" else (stage,)
    with contextlib.ExitStack() as stack, jax.set_mesh(run.mesh):
        distributed.on_first(lambda: stack.enter_context(locked(workdir)))
        distributed.on_first(lambda: claim(workdir, run.config))
        for name in wanted:
            if name in pipeline.STAGES:
                pipeline.train_stage(run, name)
            elif name == "generate":
                generate.generate(run)
            else:
                evaluate.evaluate(run)
        if "evaluate" in wanted and distributed.is_first():
            print(results.table(run))


def main(argv: list[str]) -> None:
    config = _CONFIG.value
    commands.check(argv, config)
    config_lib.validate(config)
    if _STAGE.value == "describe":
        from cosmos_jax.describe import describe

        print(json.dumps(describe(config)))
        return
    config_flag: Any = flags.FLAGS["config"]
    name = Path(config_flag.config_filename).stem
    workdir = _WORKDIR.value or f"runs/{name}"
    if "://" in workdir:
        raise UserError(
            f"--workdir={workdir} is not a folder: mount that storage, a bucket with gcsfuse for "
            "example, and name the folder"
        )
    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        run_stages(config, Path(workdir).absolute(), _STAGE.value)
    except distributed.Preempted as stopped:
        logger.info("stopped on request: %s; run the same command to continue", stopped)


if __name__ == "__main__":
    commands.run(main, required=("config",))
