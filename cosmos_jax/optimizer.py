"""AdamW with global-norm clipping and the learning-rate schedules of all stages."""

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict


def learning_rate(config: ConfigDict, steps: int) -> optax.Schedule:
    """Linear warm-up, then a cosine from `learning_rate` to `final_learning_rate`.

    Equal rates make it constant, as the diffusion stage has it.
    """
    warmup = min(config.warmup_steps, steps)
    decay = optax.cosine_decay_schedule(
        config.learning_rate,
        max(1, steps - warmup),
        alpha=config.final_learning_rate / config.learning_rate,
    )
    if not warmup:
        return decay
    rise = optax.linear_schedule(config.warmup_from, config.learning_rate, warmup)
    return optax.join_schedules([rise, decay], [warmup])


def make(config: ConfigDict, steps: int) -> optax.GradientTransformation:
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
        ),
    )


def ema_update(ema, params, step: jax.Array, decay: float):
    """ema <- m ema + (1 - m) params with m = min(decay, (1 + step) / (10 + step)).

    The ramp lets short runs forget their initialisation. `step` counts updates from 1.
    """
    momentum = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda e, p: e + (1 - momentum) * (p - e), ema, params)
