"""The demo model of public-domain prose: 32 tokens in 8 latents, all of the texts in the package.

python -m cosmos_jax.main --config=configs/demo/passages.py --workdir=runs/demo_passages
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.num_train_texts = 0

    ae = config.autoencoder
    ae.batch_size = 32
    ae.steps = 1_600
    ae.optimizer.warmup_steps = 200
    ae.statistics_texts = 10_000
    ae.evaluate_every = 800
    ae.checkpoint_every = 500

    df = config.diffusion
    df.steps = 16_000
    df.optimizer.final_learning_rate = 2e-5
    df.optimizer.warmup_steps = 200
    df.ema_decay = 0.999
    df.statistics_texts = 10_000
    df.evaluate_every = 2_000
    df.checkpoint_every = 500

    config.generate.num_texts = 1_000
    config.generate.batch_size = 250
    config.evaluate.num_texts = 1_000
    return config
