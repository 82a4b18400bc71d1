"""Runs the stages of one config; every stage goes on where it stopped.

python -m cosmos_jax.main --config=configs/summarize.py --workdir=runs/xsum
"""

import json
import logging
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_flags

from cosmos_jax import commands, config_checks, distributed
from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError

STAGES = ("all", *config_lib.TRAINED, "generate", "evaluate", "describe")

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


def main(argv: list[str]) -> None:
    config = _CONFIG.value
    commands.check(argv, config)
    config_checks.validate(config)
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
    from cosmos_jax.runner import run_stages  # takes seconds: not for a wrong flag

    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    try:
        run_stages(config, Path(workdir).absolute(), _STAGE.value)
    except distributed.Preempted as stopped:
        logger.info("stopped on request: %s; run the same command to continue", stopped)


if __name__ == "__main__":
    commands.run(main, required=("config",))
