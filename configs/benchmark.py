"""Speed of all systems at the paper's size, 128 tokens, Cosmos in 16 latents, without sources.

python -m cosmos_jax.benchmark --config=configs/benchmark.py --out=benchmark.json
python -m cosmos_jax.benchmark --config=configs/benchmark.py:small --out=benchmark.json

"small" is for two CPU cores and some minutes. The paper's size goes there too with
--config.base.dtype=float32 and an hour. Trained weights: --config.workdirs.default=runs/stories.
"""

from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError


def get_config(size="paper"):
    config = ConfigDict()
    # What the systems share; each changes what makes it one, see `systems.py`.
    base = config.base = config_lib.base()
    # Of the encoder only the tokenizer is read; with "" texts are of stand-in words, and training
    # is measured on random tokens alone.
    base.encoder.name = "minilm"
    base.encoder.vocab_size = config_lib.MINILM["vocab_size"]
    base.data.source = "embedded"

    config.systems = (
        "default,undistilled,faithful,autoregressive,token_level,masked,torch_autoregressive"
    )
    config.batch_sizes = (1, 8, 64)
    config.accelerator_batch_sizes = (256,)  # these too where there is one
    config.rounds = 10
    # Of one system at one batch size: it is timed fewer times if this would be too long, but once
    # at least, and not at all if once takes longer than `skip_seconds`.
    config.max_seconds = 60.0
    config.skip_seconds = 900.0
    # Workdirs whose trained weights to take; empty: random ones.
    config.workdirs = ConfigDict(
        dict(default="", undistilled="", faithful="", autoregressive="", token_level="", masked="")
    )

    config.training = ConfigDict()
    config.training.stages = "autoencoder,diffusion,autoregressive,masked"  # "" for none
    config.training.batch_size = 64
    config.training.steps = 10  # timed together

    if size == "small":
        base.dtype = "float32"
        base.encoder.update(config_lib.MINILM)
        for stage in config_lib.TRAINED:
            if stage != "distillation":
                base[stage].num_layers = 6
                base[stage].num_heads = 6
        config.rounds = 5
        config.max_seconds = 10.0
        config.skip_seconds = 60.0
        config.training.batch_size = 8
        config.training.steps = 3
    elif size != "paper":
        raise UserError(f"configs/benchmark.py:{size}: the sizes are paper and small")
    return config
