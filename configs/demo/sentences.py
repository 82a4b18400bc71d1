"""The demo model of short sentences: 16 tokens of public-domain prose in 4 latents.

python -m cosmos_jax.main --config=configs/demo/sentences.py --workdir=runs/demo_sentences
"""

from configs import quickstart


def get_config():
    config = quickstart.get_config()
    config.data.source = "sentences"
    config.data.max_length = 16
    config.data.num_train_texts = 0

    ae = config.autoencoder
    ae.num_latents = 4
    ae.batch_size = 64
    ae.steps = 2_000
    ae.optimizer.warmup_steps = 200
    ae.statistics_texts = 20_000
    ae.evaluate_every = 1_000
    ae.checkpoint_every = 500

    df = config.diffusion
    df.batch_size = 64
    df.steps = 10_000
    df.optimizer.warmup_steps = 200
    df.optimizer.final_learning_rate = 2e-5
    df.ema_decay = 0.999
    df.statistics_texts = 20_000
    df.evaluate_every = 2_000
    df.checkpoint_every = 1_000

    config.distillation.steps = 0  # this small it gains little

    # The baseline, --config.system=autoregressive: two layers as well.
    ar = config.autoregressive
    ar.num_layers = 2
    ar.num_heads = 6
    ar.batch_size = 64
    ar.steps = 1_200
    ar.optimizer.learning_rate = 1e-3
    ar.optimizer.final_learning_rate = 1e-4
    ar.optimizer.warmup_steps = 100
    ar.ema_decay = 0.99
    ar.statistics_texts = 20_000
    ar.evaluate_every = 600
    ar.checkpoint_every = 500

    config.generate.num_texts = 1_000
    config.generate.batch_size = 250
    config.evaluate.num_texts = 1_000
    return config
