"""A finished run's denoiser taught to do with a few steps, in a workdir of its own.

python -m cosmos_jax.main --config=configs/distill.py:runs/stories --workdir=runs/stories_fast

It costs about as much as the denoiser itself: --stage=describe says how much. A single step:
--config.diffusion.distilled_steps=1 --config.diffusion.num_sampling_steps=1
"""

from configs import workdir
from cosmos_jax.errors import UserError


def get_config(directory=""):
    config = workdir.get_config(directory)
    ae, df = config.autoencoder, config.diffusion
    if config.system != "cosmos" or df.distilled_steps:
        found = "already distilled" if df.distilled_steps else f"of config.system {config.system!r}"
        raise UserError(
            f"{directory}: is {found}; name the run of a denoiser that learned from texts"
        )
    ae.pretrained = ae.pretrained or directory
    df.pretrained = directory
    df.sampler = "ddim"
    df.distilled_steps = df.num_sampling_steps = 4
    df.teacher_steps = 24
    df.teacher_guidance, df.guidance = df.guidance, 1.0
    df.steps = max(1, df.steps // 10)
    df.optimizer.learning_rate *= 0.3
    df.optimizer.final_learning_rate = 0.05 * df.optimizer.learning_rate
    df.optimizer.warmup_steps = min(df.optimizer.warmup_steps, df.steps // 10)
    df.ema_decay = min(df.ema_decay, 0.99)
    df.best_metric = df.best_metric and "validation_loss"
    df.evaluate_every = df.checkpoint_every = max(1, df.steps // 4)
    return config
