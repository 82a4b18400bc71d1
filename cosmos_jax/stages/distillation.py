"""Stage three: the denoiser learns to do in a few steps what takes many.

The student begins with the weights of its teacher, the denoiser of stage two, and is called as that
is, so all that comes after takes it for any other. The teacher may be guided: the student learns
where guidance leads and pays for no second pass. Of the data it reads the sources only.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax.diffusion import samplers
from cosmos_jax.diffusion.distillation import distillation_errors
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.sampling import make_denoise, read_condition
from cosmos_jax.stages.base import (
    Batch,
    Frozen,
    Params,
    Stage,
    Sums,
    row_keys,
    with_source_states,
)


def learned(config: ConfigDict) -> dict[str, Any]:
    """What a student learns and is good for alone, to be recorded with it."""
    settings, teacher = config.distillation, config.diffusion
    return {
        "num_sampling_steps": settings.num_sampling_steps,
        "teacher_steps": settings.teacher_steps,
        **{f"teacher_{name}": teacher[name] for name in config_lib.LEARNED},
    }


def student(config: ConfigDict, diffusion: Stage) -> Stage:
    """The stage to take trained parameters for; to train it, `make`."""
    return dataclasses.replace(diffusion, name="distillation", settings=config.distillation)


def make(
    config: ConfigDict, model: Cosmos, diffusion: Stage, teacher: Params, teacher_step: int
) -> Stage:
    """A student of the stage `diffusion`, whose parameters at `teacher_step` are `teacher`."""
    settings, taught_as = config.distillation, config.diffusion
    model = model.at_pointer_temperature(taught_as.pointer_temperature)
    schedule = TanSchedule(taught_as.schedule_d)
    shape = (config.autoencoder.num_latents, config.encoder.hidden_size)
    guidance = taught_as.guidance if model.conditional else 1.0

    def errors(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> jax.Array:
        keys_B = row_keys(key, batch["rows"])
        x_T = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
        teacher = model.for_sampling({**frozen, **frozen["teacher"]})
        taught: tuple = ()
        learned: tuple = ()
        if model.conditional:
            source = batch["source_states"].astype(jnp.float32), batch["source_mask"]
            taught = read_condition(model, teacher, *source, guidance != 1)
            learned = model.encode_condition(params, *source), source[1]
        times = samplers.TIME_GRIDS[taught_as.time_grid](
            schedule, settings.num_sampling_steps, taught_as.min_time
        )
        return distillation_errors(
            lambda *inputs: model.denoise(params, *inputs, *learned),
            make_denoise(model, teacher, taught, guidance),
            schedule,
            x_T,
            times,
            settings.teacher_steps // settings.num_sampling_steps,
        )

    def losses(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        error_B = errors(params, frozen, batch, key)
        return {"loss": (jnp.sum(error_B), jnp.float32(len(error_B)))}

    def validation(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        error_B = jnp.where(batch["real"], errors(params, frozen, batch, key), 0.0)
        return {"loss": (jnp.sum(error_B), jnp.sum(batch["real"], dtype=jnp.float32))}

    return dataclasses.replace(
        student(config, diffusion),
        features=functools.partial(with_source_states, model),
        losses=losses,
        validation=validation,
        frozen={**diffusion.frozen, "teacher": teacher},
        begin=lambda: teacher,
        provenance={
            **diffusion.provenance,
            "diffusion_step": teacher_step,
            **learned(config),
        },
    )
