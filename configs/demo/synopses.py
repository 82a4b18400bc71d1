"""The demo model of summarisation: a line for a Debian package, cut out of its description.

python -m cosmos_jax.main --config=configs/demo/synopses.py --workdir=runs/demo_synopses

`python demo/debian_synopses.py synopses` makes data from the package lists of any Debian, and
`python demo/extracts.py synopses extracts` makes of them what this is trained on.
"""

from configs.demo import sentences


def get_config():
    config = sentences.get_config()
    config.data.source = "jsonl:extracts"
    config.data.conditional = True
    config.data.max_length = 20
    config.data.max_source_length = 32
    config.autoencoder.num_latents = 8
    config.diffusion.condition_layers = 0
    config.diffusion.pointer = True
    config.autoencoder.steps = 3_000
    config.diffusion.batch_size = 32
    config.diffusion.steps = 18_000
    config.diffusion.guidance = 1.5
    config.diffusion.pointer_temperature = 0.5
    config.autoregressive.batch_size = 32
    config.autoregressive.steps = 2_400
    config.autoregressive.decoding = "beam"
    config.evaluate.protocols = "rouge,offline"
    return config
