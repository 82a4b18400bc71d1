"""From keys, and sources where there are any, to token ids: one compiled function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax.diffusion import samplers
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.sharding import split_batch

Source = tuple[jax.Array, jax.Array]
"""Token ids [B, S] and mask [B, S] of the sources."""


def make_generator(
    config: ConfigDict, model: Cosmos
) -> Callable[[Weights, jax.Array, Source | None], jax.Array]:
    """(weights, keys [B], source) -> token ids [B, L] int32.

    A text is a function of its own key and source, not of the batch around it.
    """
    settings = config.diffusion
    schedule = TanSchedule(settings.schedule_d)
    times = samplers.uniform_times(settings.num_sampling_steps, settings.min_time)
    shape = (config.autoencoder.num_latents, config.encoder.hidden_size)

    def generate(weights: Weights, keys_B: jax.Array, source: Source | None) -> jax.Array:
        condition: tuple[jax.Array, ...] = ()
        if source is not None:
            condition = _condition(model, weights, source, settings.guidance != 1)

        def noise(step: jax.Array) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            return split_batch(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

        x_0 = samplers.sample(
            _denoise(model, weights, condition, settings.guidance),
            schedule,
            settings.sampler,
            noise(jnp.int32(len(times))),  # no step has this number
            times,
            noise,
            answer=settings.answer,
        )
        return model.decode(weights, model.unstandardise(weights, x_0))

    return generate


def _condition(
    model: Cosmos, weights: Weights, source: Source, guided: bool
) -> tuple[jax.Array, jax.Array]:
    """Condition and mask of the sources, and with guidance of as many empty ones after them."""
    ids_BxS, mask_BxS = source
    states_BxSxD = model.text_states(weights, ids_BxS, mask_BxS)
    condition = model.encode_condition(weights, states_BxSxD, mask_BxS)
    if guided:
        empty = model.encode_condition(
            weights, weights["no_source_states"][None], weights["no_source_mask"][None]
        )
        condition = jnp.concatenate([condition, jnp.broadcast_to(empty, condition.shape)])
        empty_mask = jnp.broadcast_to(weights["no_source_mask"], mask_BxS.shape)
        mask_BxS = jnp.concatenate([mask_BxS, empty_mask])
    return condition, mask_BxS


def _denoise(model: Cosmos, weights: Weights, condition: tuple, guidance: float) -> Callable:
    """x_0 estimates; with guidance x_0u + w (x_0c - x_0u), both in one pass of 2 B texts."""

    def denoise(x, t, self_condition):
        return model.denoise(weights, x, t, self_condition, *condition)

    def guided(x, t, self_condition):
        twice = [jnp.concatenate([a, a]) for a in (x, t, self_condition)]
        with_source, without = jnp.split(denoise(*twice), 2)
        return without + guidance * (with_source - without)

    return guided if condition and guidance != 1 else denoise
