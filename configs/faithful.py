"""A task as in the paper, where the defaults are not: how texts are sampled and decoded.

python -m cosmos_jax.main --config=configs/faithful.py:summarize --workdir=runs/xsum

The decompressor is as deep as the compressor, the denoiser is not distilled, and it is sampled in
200 steps of Euler-Maruyama.
"""

import importlib
from pathlib import Path

from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError


def get_config(task="rocstories"):
    if not (Path(__file__).parent / f"{task}.py").exists():
        raise UserError(f"--config=configs/faithful.py:{task}: there is no configs/{task}.py")
    config = importlib.import_module(f"configs.{task}").get_config()
    config.update_from_flattened_dict(config_lib.FAITHFUL)
    return config
