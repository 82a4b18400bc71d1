"""From keys, and sources where there are any, to token ids: one compiled function."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax.diffusion import process, samplers
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.models.denoiser import KeysValues
from cosmos_jax.sharding import split_batch
from cosmos_jax.stages.base import Source

Condition = tuple[tuple[KeysValues, ...], jax.Array]
"""Keys and values of each block of the denoiser, and the mask of their positions."""


def make_generator(
    config: ConfigDict, model: Cosmos
) -> Callable[[Weights, jax.Array, Source | None], jax.Array]:
    """(weights, keys [B], source) -> token ids [B, L] int32.

    A text is a function of its own key and source, not of the batch around it.
    """
    settings = config.diffusion
    schedule = TanSchedule(settings.schedule_d)
    times = samplers.TIME_GRIDS[settings.time_grid](
        schedule, settings.num_sampling_steps, settings.min_time
    )
    rescale = process.RESCALE[settings.rescale]
    shape = (config.autoencoder.num_latents, config.encoder.hidden_size)

    def generate(weights: Weights, keys_B: jax.Array, source: Source | None) -> jax.Array:
        weights = model.for_sampling(weights)
        condition: Condition | tuple[()] = ()
        if source is not None:
            condition = _condition(model, weights, source, settings.guidance != 1)
        denoise = _denoise(model, weights, condition, settings.guidance)

        def noise(step: jax.Array) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            return split_batch(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

        x_0 = samplers.sample(
            lambda *inputs: rescale(denoise(*inputs)),
            schedule,
            settings.sampler,
            noise(jnp.int32(len(times))),  # no step has this number
            times,
            noise,
            answer=settings.answer,
        )
        return model.decode(weights, model.unstandardise(weights, x_0))

    return generate


def _condition(model: Cosmos, weights: Weights, source: Source, guided: bool) -> Condition:
    """What the denoiser reads of the sources, and with guidance of as many empty ones after them.

    Computed once for a text, not in each step.
    """
    ids_BxS, mask_BxS = source
    states_BxSxD = model.text_states(weights, ids_BxS, mask_BxS)
    read = model.read_condition(weights, model.encode_condition(weights, states_BxSxD, mask_BxS))
    if guided:
        states, mask = weights["no_source_states"][None], weights["no_source_mask"][None]
        empty = model.read_condition(weights, model.encode_condition(weights, states, mask))

        def both(with_source: jax.Array, without: jax.Array) -> jax.Array:
            return jnp.concatenate([with_source, jnp.broadcast_to(without, with_source.shape)])

        read, mask_BxS = jax.tree.map(both, (read, mask_BxS), (empty, mask))
    return read, mask_BxS


def _denoise(model: Cosmos, weights: Weights, condition: tuple, guidance: float) -> Callable:
    """x_0 estimates; with guidance x_0u + w (x_0c - x_0u), both in one pass of 2 B texts."""

    def denoise(x, t, self_condition):
        return model.denoise(weights, x, t, self_condition, *condition)

    def guided(x, t, self_condition):
        twice = [jnp.concatenate([a, a]) for a in (x, t, self_condition)]
        with_source, without = jnp.split(denoise(*twice), 2)
        return without + guidance * (with_source - without)

    return guided if condition and guidance != 1 else denoise
