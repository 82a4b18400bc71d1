"""Draft."""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.dtype = "float32"
    config.encoder.update(config_lib.MINILM)
    config.data.source = "embedded"
    config.data.max_length = 32
    config.data.cache_features = True
    config.autoencoder.num_latents = 8
    config.autoencoder.num_layers = 2
    config.autoencoder.vocabulary = "corpus"
    config.autoencoder.batch_size = 32
    config.autoencoder.steps = 2000
    config.autoencoder.optimizer.warmup_steps = 100
    config.diffusion.num_layers = 2
    config.diffusion.batch_size = 64
    config.diffusion.steps = 200
    config.diffusion.optimizer.warmup_steps = 50
    config.diffusion.num_sampling_steps = 50
    config.generate.num_texts = 100
    config.generate.batch_size = 50
    return config
