"""Quality and speed against the number of steps, for every sampler.

python -m cosmos_jax.study --config=configs/studies/steps.py

A part of it: --config.samplers=ddim,dpmpp_2m --config.steps="(8, 16)". What is measured is kept in
the run's folder, that of other settings (--config.base.diffusion.time_grid=logsnr) beside it.
"""

from configs.studies import runs
from cosmos_jax import config as config_lib


def get_config():
    config = runs.study("steps", "full")
    config.samplers = ",".join(config_lib.SAMPLERS)
    config.steps = (4, 6, 8, 12, 16, 25, 50, 100, 200)
    return config
