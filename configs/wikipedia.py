"""English Wikipedia in pieces of at most 128 words: 128 tokens in 16 latents.

python -m cosmos_jax.main --config=configs/wikipedia.py --workdir=runs/wikipedia

The autoencoder trained here is the one that the paper uses for its other data sets.
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "wikipedia"
    config.evaluate.protocols = "cosmos,offline"
    return config
