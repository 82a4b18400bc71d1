"""The config that a workdir was made with, to go on with it or change how it generates.

python -m cosmos_jax.main --config=configs/workdir.py:runs/stories --workdir=runs/stories \
    --stage=generate --config.distillation.steps=0 --config.diffusion.num_sampling_steps=50
"""

from pathlib import Path

from cosmos_jax import config as config_lib
from cosmos_jax import workdir
from cosmos_jax.errors import UserError


def get_config(directory=""):
    recorded = workdir.read_config(Path(directory)) if directory else None
    if recorded is None:
        raise UserError(f"{directory or 'no folder given'}: no config.json; say CONFIG.py:FOLDER")
    return config_lib.recorded(recorded)
