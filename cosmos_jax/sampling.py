"""Latents by diffusion, and from keys and sources to token ids: pure functions, to be compiled.

A run may begin at a text instead of at noise, at the time t whose noise has a given share of the
variance, its strength s (SDEdit, arXiv 2108.01073):

    (1) x_t = alpha_t x_0 + sigma_t eps,  sigma_t^2 = s,  lambda_t = log((1 - s) / s) / 2

It ends at the run's usual last time, or, where it begins near that or below, at half its own.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax.diffusion import process, samplers
from cosmos_jax.diffusion.loss import Denoise
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.models.denoiser import Condition as Read
from cosmos_jax.sharding import split_batch
from cosmos_jax.stages.base import Source

Condition = tuple[Read, jax.Array]
"""What the denoiser reads of the sources, and the mask of their positions."""

Refine = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_0 [B, N, D], sigma_t) -> x_0: changes each estimate of the clean latents; see `guides.py`."""


class Start(NamedTuple):
    """Where a run begins: standardised latents [B, N, D] and a strength between 0 and 1."""

    x_0_BxNxD: jax.Array
    strength: jax.Array | float


def make_generator(
    config: ConfigDict, model: Cosmos
) -> Callable[[Weights, jax.Array, Source | None], jax.Array]:
    """(weights, keys [B], source) -> token ids [B, L] int32.

    A text is a function of its own key and source, not of the batch around it.
    """
    draw = make_sampler(config, model)

    def generate(weights: Weights, keys_B: jax.Array, source: Source | None) -> jax.Array:
        x_0 = draw(weights, keys_B, source)
        return model.decode(weights, model.unstandardise(weights, x_0))

    return generate


def make_sampler(config: ConfigDict, model: Cosmos) -> Callable[..., Any]:
    """(weights, keys [B], source, *, start, refine, trace) -> standardised latents [B, N, D] fp32.

    What is returned is a function of these arguments:
      keys [B]: noise of each text.
      source: token ids and mask [B, S], or None.
      start: a `Start`; None: noise alone.
      refine: a `Refine`; None: estimates stay as they are.
      trace: also return the estimate of x_0 in each step, [steps, B, N, D].
    """
    settings = ConfigDict(config_lib.sampling(config))
    model = model.at_pointer_temperature(settings.pointer_temperature)
    schedule = TanSchedule(config.diffusion.schedule_d)
    make_times = samplers.TIME_GRIDS[settings.time_grid]
    rescale = process.RESCALE[settings.rescale]
    shape = (config.autoencoder.num_latents, config.encoder.hidden_size)
    steps = settings.num_sampling_steps

    def draw(
        weights: Weights,
        keys_B: jax.Array,
        source: Source | None = None,
        *,
        start: Start | None = None,
        refine: Refine | None = None,
        trace: bool = False,
    ) -> Any:
        weights = model.for_sampling(weights)
        condition: Condition | tuple[()] = ()
        if source is not None:
            states_BxSxD = model.text_states(weights, *source)
            guided = settings.guidance != 1
            condition = read_condition(model, weights, states_BxSxD, source[1], guided)
        denoise = make_denoise(model, weights, condition, settings.guidance)

        def estimate(x: jax.Array, t_B: jax.Array, self_condition: jax.Array) -> jax.Array:
            x_0 = rescale(denoise(x, t_B, self_condition))
            return x_0 if refine is None else refine(x_0, schedule.sigma(t_B[0]))

        def noise(step: jax.Array) -> jax.Array:
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, step)
            return split_batch(jax.vmap(lambda key: jax.random.normal(key, shape))(keys))

        x = noise(jnp.int32(steps + 1))  # no step has this number
        times = make_times(schedule, steps, settings.min_time)
        if start is not None:
            odds = (1 - start.strength) / start.strength
            first = schedule.time(jnp.log(odds) / 2)  # equation (1)
            times = make_times(schedule, steps, jnp.minimum(settings.min_time, first / 2), first)
            x = process.add_noise(schedule, start.x_0_BxNxD, first, x)
        return samplers.sample(
            estimate,
            schedule,
            settings.sampler,
            x,
            times,
            noise,
            answer=settings.answer,
            trace=trace,
        )

    return draw


def read_condition(
    model: Cosmos,
    weights: Weights,
    states_BxSxD: jax.Array,
    mask_BxS: jax.Array,
    guided: bool,
) -> Condition:
    """What the denoiser reads of the sources, and if guided of as many empty ones after them.

    Computed once for a text, not in each step.
    """
    read = model.read_condition(weights, model.encode_condition(weights, states_BxSxD, mask_BxS))
    if guided:
        states, mask = weights["no_source_states"][None], weights["no_source_mask"][None]
        empty = model.read_condition(weights, model.encode_condition(weights, states, mask))

        def both(with_source: jax.Array, without: jax.Array) -> jax.Array:
            return jnp.concatenate([with_source, jnp.broadcast_to(without, with_source.shape)])

        read, mask_BxS = jax.tree.map(both, (read, mask_BxS), (empty, mask))
    return read, mask_BxS


def make_denoise(model: Cosmos, weights: Weights, condition: tuple, guidance: float) -> Denoise:
    """x_0 estimates, from what was read of the sources, or () where there are none.

    With guidance x_0u + w (x_0c - x_0u), both in one pass of 2 B texts.
    """

    def denoise(x, t, self_condition):
        return model.denoise(weights, x, t, self_condition, *condition)

    def guided(x, t, self_condition):
        twice = [jnp.concatenate([a, a]) for a in (x, t, self_condition)]
        with_source, without = jnp.split(denoise(*twice), 2)
        return without + guidance * (with_source - without)

    return guided if condition and guidance != 1 else denoise
