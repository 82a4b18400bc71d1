"""Stage two with a teacher: a trained denoiser learns to do the same in a few steps.

It begins with the teacher's weights and is called as the teacher is, so all that comes after it
takes it for any other denoiser. The teacher may be guided: the student learns where guidance leads
and pays for no second pass. Of the data it reads the sources only.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

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


def make(
    config: ConfigDict, model: Cosmos, diffusion: Stage, teacher: Params, teacher_step: int
) -> Stage:
    """The stage `diffusion` with another loss; `teacher` are the parameters to learn from."""
    settings = config.diffusion
    model = model.at_pointer_temperature(settings.pointer_temperature)
    schedule = TanSchedule(settings.schedule_d)
    shape = (config.autoencoder.num_latents, config.encoder.hidden_size)
    guidance = settings.teacher_guidance if model.conditional else 1.0

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
        times = samplers.TIME_GRIDS[settings.time_grid](
            schedule, settings.distilled_steps, settings.min_time
        )
        return distillation_errors(
            lambda *inputs: model.denoise(params, *inputs, *learned),
            make_denoise(model, teacher, taught, guidance),
            schedule,
            x_T,
            times,
            settings.teacher_steps // settings.distilled_steps,
        )

    def losses(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        error_B = errors(params, frozen, batch, key)
        return {"loss": (jnp.sum(error_B), jnp.float32(len(error_B)))}

    def validation(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        error_B = jnp.where(batch["real"], errors(params, frozen, batch, key), 0.0)
        return {"loss": (jnp.sum(error_B), jnp.sum(batch["real"], dtype=jnp.float32))}

    return dataclasses.replace(
        diffusion,
        features=functools.partial(with_source_states, model),
        losses=losses,
        validation=validation,
        frozen={**diffusion.frozen, "teacher": teacher},
        begin=diffusion.begin and (lambda: teacher),  # which is what it would read once more
        provenance={**diffusion.provenance, "teacher_step": teacher_step},
    )
