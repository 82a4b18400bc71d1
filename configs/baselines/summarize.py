"""Summarisation of news by a system that Cosmos is compared with.

python -m cosmos_jax.main --config=configs/baselines/summarize.py:autoregressive \
    --workdir=runs/summarize_autoregressive

Also :masked and :token_level.
"""

from configs import summarize
from configs.baselines import systems


def get_config(system="autoregressive"):
    return systems.change(summarize.get_config(), system)
