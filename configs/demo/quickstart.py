"""A denoiser of a few minutes in the latent space of demo/sentences: bash launch/quickstart.sh"""

from configs.demo import sentences


def get_config():
    config = sentences.get_config()
    config.autoencoder.pretrained = "demo/sentences"
    df = config.diffusion
    df.steps = 1_500
    df.ema_decay = 0.99
    df.statistics_texts = 2_000
    df.evaluate_every = 750
    df.checkpoint_every = 500
    config.distillation.steps = 150
    config.generate.num_texts = 200
    config.generate.batch_size = 100
    return config
