"""The demo model of summarisation: the one-line synopsis of a Debian package from its description.

python -m cosmos_jax.main --config=configs/demo/synopses.py --workdir=runs/demo_synopses \
    --config.data.source=jsonl:synopses

`python demo/debian_synopses.py synopses` makes the data from the package lists of any Debian.
"""

from configs.demo import passages


def get_config():
    config = passages.get_config()
    config.data.source = "jsonl:synopses"
    config.data.conditional = True
    config.data.max_length = 24
    config.data.max_source_length = 48
    config.autoencoder.steps = 2_400
    config.autoencoder.evaluate_every = 1_200
    config.diffusion.condition_layers = 1
    config.diffusion.steps = 4_000
    config.diffusion.evaluate_every = 1_000
    config.evaluate.protocols = "rouge,offline"
    return config
