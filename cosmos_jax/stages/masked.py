"""Masked diffusion: learn to fill in texts of which a random share is masked.

At time t ~ U[0, 1] every token is masked with probability t (the log-linear schedule, alpha_t =
1 - t). Of n tokens the k masked ones are predicted, and in continuous time MDLM's bound is

    (1) -log p(x) <= E [ 1/t sum over masked of CE ]

The mask tells about t all that the sum depends on, so the weight may be its mean given the mask,

    (2) E[ 1/t | k of n masked ] = (n + 1) / k,

as t given k is Beta(k + 1, n - k + 1). (1) stays what it is; but while the variance of (1/t) times
a mask is infinite, which the authors' code avoids by a smallest t, the weight (2) is at most n + 1.

Times are plain uniform: to spread them over a batch they would have to depend on which texts are in
it, but the random numbers of a text are its own.

[CLS] is given. What follows [SEP] counts as [SEP] too, and is masked and predicted like all else:
so a generated text needs no length given, the model decides it. That costs few nats, for once one
[SEP] is seen all after it are known. The loss is per token of the text, its [SEP] included and its
[CLS] not, as that of an autoregressive model, so that the two compare.

Shape letters: B batch, L text positions, S source positions, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from cosmos_jax.models.masked import Masked
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
    config: ConfigDict, model: Masked, frozen: Frozen, statistics: dict[str, np.ndarray], data: str
) -> Stage:
    """The stage; `frozen` holds bert, end and the `statistics`: states_*, head_index."""
    length, width = config.data.max_length, config.encoder.hidden_size

    def init(key: jax.Array, frozen: Frozen) -> Params:
        del frozen
        inputs = [jnp.zeros((1, length), jnp.int32)]
        if model.conditional:
            source = (1, config.data.max_source_length)
            inputs += [jnp.zeros((*source, width)), jnp.ones(source, bool)]
        return {"masked_denoiser": model.denoiser.init(key, *inputs)["params"]}

    def bounds(
        params: Params, frozen: Frozen, batch: Batch, keys_B: jax.Array, train: bool
    ) -> jax.Array:
        """(1) with (2) for each text, in nats; [B]."""
        mask_keys, dropout_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
        rows_BxL = frozen["head_index"][jnp.where(batch["mask"], batch["ids"], frozen["end"])]
        masked_BxL, weight_B = corrupt(mask_keys, rows_BxL.shape[1])
        condition: tuple[jax.Array | None, ...] = (None, None)
        if model.conditional:
            states = batch["source_states"].astype(jnp.float32)
            condition = (model.condition(params, states), batch["source_mask"])
        hidden = model.hidden(
            params,
            jnp.where(masked_BxL, model.mask_row, rows_BxL),
            *condition,
            dropout_keys if train else None,
        )
        crossentropy_BxL = optax.softmax_cross_entropy_with_integer_labels(
            model.logits(params, hidden), rows_BxL
        )
        return weight_B * jnp.sum(jnp.where(masked_BxL, crossentropy_BxL, 0.0), axis=1)

    def losses(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        bound_B = bounds(params, frozen, batch, row_keys(key, batch["rows"]), train=True)
        return {"loss": (jnp.sum(bound_B), jnp.sum(_num_tokens(batch)))}

    def validation(params: Params, frozen: Frozen, batch: Batch, key: jax.Array) -> Sums:
        bound_B = bounds(params, frozen, batch, row_keys(key, batch["rows"]), train=False)
        total = jnp.sum(jnp.where(batch["real"], bound_B, 0.0))
        return {"loss": (total, jnp.sum(jnp.where(batch["real"], _num_tokens(batch), 0.0)))}

    return Stage(
        name="masked",
        settings=config.masked,
        init=init,
        features=functools.partial(with_source_states, model),
        losses=losses,
        validation=validation,
        frozen=frozen,
        statistics=statistics,
        provenance={"data": data},
    )


def corrupt(keys_B: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """Which positions to mask, [B, L], never the first one, and the weights (2), [B]."""

    def one_text(key: jax.Array) -> tuple[jax.Array, jax.Array]:
        time_key, mask_key = jax.random.split(key)
        t = jax.random.uniform(time_key)
        masked_L = (jax.random.uniform(mask_key, (length,)) < t).at[0].set(False)
        # With nothing masked the sum is 0, whatever its weight.
        return masked_L, length / jnp.maximum(jnp.sum(masked_L), 1)

    return jax.vmap(one_text)(keys_B)


def _num_tokens(batch: Batch) -> jax.Array:
    """Tokens of each text but for its [CLS]; [B] fp32."""
    return jnp.sum(batch["mask"], axis=1, dtype=jnp.float32) - 1
