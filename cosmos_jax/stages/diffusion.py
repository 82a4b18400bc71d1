"""Stage two: learn to denoise the latents of the frozen autoencoder.

The loss and its self-conditioning are in `diffusion/loss.py`. Conditional tasks train the
condition encoder along; for a share of the texts the source is replaced by the empty text,
so that sampling can be guided away from what the model says without a source. A denoiser with a
pointer learns from the texts' tokens where to point; see `models/pointer.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cosmos_jax.diffusion.loss import denoising_errors
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.models import pointer
from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.stages.base import Batch, Frozen, Params, Stage, Sums, row_keys


def make(
    config: ConfigDict,
    model: Cosmos,
    frozen: Frozen,
    statistics: dict[str, np.ndarray],
    data: str,
    autoencoder_step: int,
) -> Stage:
    """The stage; `frozen` holds bert, states_*, compressor, the `statistics`, no_source_*."""
    settings = config.diffusion
    width, num_latents = config.encoder.hidden_size, config.autoencoder.num_latents
    schedule = TanSchedule(settings.schedule_d)

    def init(key: jax.Array, frozen: Frozen) -> Params:
        del frozen
        denoiser_key, condition_key = jax.random.split(key)
        latents = jnp.zeros((1, num_latents, width))
        condition: tuple[jax.Array, ...] = ()
        params = {}
        if model.conditional:
            length = config.data.max_source_length
            condition = (jnp.zeros((1, length, width)), jnp.ones((1, length), bool))
            params["condition_encoder"] = model.condition_encoder.init(condition_key, *condition)[
                "params"
            ]
        inputs = (latents, jnp.zeros(1), latents, *condition)
        params["denoiser"] = model.denoiser.init(denoiser_key, *inputs)["params"]
        return params

    def features(frozen: Frozen, tokens: Batch) -> Batch:
        if "latents" in tokens:
            return tokens
        batch = dict(tokens)
        # A batch from the autoencoder's cache has the states already.
        states = batch.pop("states", None)
        if states is None:
            states = model.text_states(frozen, tokens["ids"], tokens["mask"])
        latents = model.compress(frozen, states.astype(jnp.float32), tokens["mask"])
        batch["latents"] = model.standardise(frozen, latents)
        if model.conditional:
            batch["source_states"] = model.text_states(
                frozen, tokens["source_ids"], tokens["source_mask"]
            )
        return batch

    def errors(
        params: Params,
        frozen: Frozen,
        batch: Batch,
        keys_B: jax.Array,
        self_condition: bool | jax.Array,
        source_dropout_rate: float,
    ) -> dict[str, jax.Array]:
        """[B] each: the error of the latents, and with a pointer also its loss."""
        source_keys, noise_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
        condition: tuple[jax.Array, ...] = ()
        if model.conditional:
            dropped_B = jax.vmap(lambda k: jax.random.bernoulli(k, source_dropout_rate))(
                source_keys
            )
            states = jnp.where(
                dropped_B[:, None, None],
                frozen["no_source_states"],
                batch["source_states"].astype(jnp.float32),
            )
            mask = jnp.where(dropped_B[:, None], frozen["no_source_mask"], batch["source_mask"])
            condition = (model.encode_condition(params, states, mask), mask)
        error_B, inputs = denoising_errors(
            lambda *inputs: model.denoise(params, *inputs, *condition),
            schedule,
            batch["latents"].astype(jnp.float32),
            noise_keys,
            self_condition=self_condition,
        )
        found = {"error": error_B}
        if settings.pointer:
            texts = (batch[name] for name in ("ids", "mask", "source_ids", "source_mask"))
            wanted_BxS = jnp.where(dropped_B[:, None], 0, pointer.targets(*texts))
            found["pointer"] = pointer.loss(model.point(params, *inputs, *condition), wanted_BxS)
        return found

    def losses(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        coin_key, row_key = jax.random.split(key)
        found = errors(
            params,
            frozen,
            batch,
            row_keys(row_key, batch["rows"]),
            jax.random.bernoulli(coin_key, settings.self_condition_rate),
            settings.source_dropout_rate,
        )
        weight = jnp.float32(batch["rows"].shape[0])
        loss_B = jnp.sum(jnp.stack(list(found.values())), axis=0)
        parts = found if settings.pointer else {}
        return {
            name: (jnp.sum(value_B), weight) for name, value_B in {"loss": loss_B, **parts}.items()
        }

    def validation(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        keys_B = row_keys(key, batch["rows"])
        weight = jnp.sum(batch["real"], dtype=jnp.float32)

        def total(value_B: jax.Array) -> tuple[jax.Array, jax.Array]:
            return jnp.sum(jnp.where(batch["real"], value_B, 0.0)), weight

        found = errors(params, frozen, batch, keys_B, False, 0.0)
        again = errors(params, frozen, batch, keys_B, True, 0.0)
        sums = {"loss": total(found["error"]), "self_conditioned_loss": total(again["error"])}
        if settings.pointer:
            sums["pointer"] = total(found["pointer"])
        return sums

    return Stage(
        name="diffusion",
        settings=settings,
        init=init,
        features=features,
        losses=losses,
        validation=validation,
        frozen=frozen,
        statistics=statistics,
        provenance={"data": data, "autoencoder_step": autoencoder_step},
    )
