"""Five-sentence stories, the paper's first experiment: 80 tokens in 16 latents.

python -m cosmos_jax.main --config=configs/rocstories.py \
    --config.data.source=rocstories:PATH_TO_CSV --workdir=runs/rocstories

The paper reports MAUVE .836 and a GPT-2-large perplexity of 30.2 with 16 latents, .940 and 26.3
with 128 (then also set diffusion.schedule_d: 7 from 64 latents on). The paper's autoencoder is
that of configs/wikipedia.py; name its workdir with --config.autoencoder.pretrained to use it.
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "rocstories:PATH"
    config.data.max_length = 80
    config.evaluate.protocols = "cosmos,offline"
    return config
