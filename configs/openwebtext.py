"""Long web texts: 512 tokens in 512 latents, the paper's largest experiment.

python -m cosmos_jax.main --config=configs/openwebtext.py \
    --config.data.source=openwebtext:PATH_TO_FOLDER --workdir=runs/openwebtext

Needs several devices: --stage=describe shows the bytes on each for a mesh.
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "openwebtext:PATH"
    config.data.max_length = 512
    config.autoencoder.num_latents = 512
    config.autoencoder.steps = 200_000
    config.diffusion.steps = 500_000
    config.evaluate.protocols = "cosmos,offline"
    return config
