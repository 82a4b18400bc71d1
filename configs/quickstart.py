"""Everything once, small enough for two CPU cores: 32 tokens of public-domain prose in 8 latents.

bash launch/quickstart.sh runs/mine --config.data.source=jsonl:PATH
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.dtype = "float32"
    config.encoder.update(config_lib.MINILM)
    config.data.source = "embedded"
    config.data.max_length = 32
    config.data.max_source_length = 64
    config.data.num_train_texts = 6_000
    config.data.cache_features = True

    ae = config.autoencoder
    ae.num_latents = 8
    ae.num_layers = ae.decompressor_layers = 1
    ae.num_heads = 6  # heads of 64, as in the paper
    # A third of the cost is the head: it leaves out the rarest tokens.
    ae.vocabulary = "corpus"
    ae.vocabulary_min_count = 3
    # These two take training past its slow beginning.
    ae.head_init = "regression"
    ae.position_std = 8.0
    ae.dropout = 0.0
    # The paper's perturbations in half their dose: there are minutes to learn, not days.
    ae.masked_share = 0.25
    ae.noised_share = 0.25
    ae.latent_dropout = 0.2
    ae.batch_size = 16
    ae.steps = 800
    ae.optimizer.learning_rate = 1e-3
    ae.optimizer.warmup_steps = 100
    ae.optimizer.clip_norm = 1.0
    ae.statistics_texts = 640
    ae.evaluate_every = 400
    ae.checkpoint_every = 200

    df = config.diffusion
    df.num_layers = 2
    df.condition_layers = 2
    df.num_heads = 6
    # Not the paper's: a small denoiser learns in a fraction of the steps with these.
    df.latent_positions = True
    df.time_gains = True
    df.batch_size = 32
    df.steps = 1_400
    df.optimizer.learning_rate = 1e-3
    df.optimizer.final_learning_rate = 1e-4
    df.optimizer.warmup_steps = 50
    df.ema_decay = 0.99
    df.statistics_texts = 640
    df.evaluate_every = 700
    df.checkpoint_every = 350

    ds = config.distillation
    ds.batch_size = 32
    ds.steps = 150
    ds.optimizer.learning_rate = 3e-4
    ds.optimizer.final_learning_rate = 1.5e-5
    ds.optimizer.warmup_steps = 15
    ds.ema_decay = 0.99
    ds.evaluate_every = 75
    ds.checkpoint_every = 50

    config.generate.num_texts = 200
    config.generate.batch_size = 100
    config.evaluate.num_texts = 256
    return config
