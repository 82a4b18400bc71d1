"""Five-sentence stories by a system that Cosmos is compared with.

python -m cosmos_jax.main --config=configs/baselines/rocstories.py:autoregressive \
    --config.data.source=rocstories:PATH_TO_CSV --workdir=runs/rocstories_autoregressive

Also :masked and :token_level.
"""

from configs import rocstories
from configs.baselines import systems


def get_config(system="autoregressive"):
    return systems.change(rocstories.get_config(), system)
