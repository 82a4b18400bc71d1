"""Five-sentence stories: the paper's first experiment.

python -m cosmos_jax.main --config=configs/rocstories.py \
    --config.data.source=rocstories:PATH_TO_CSV --workdir=runs/rocstories
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "rocstories:PATH"
    config.data.max_length = 80
    return config
