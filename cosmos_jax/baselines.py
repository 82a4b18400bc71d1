"""The systems that Cosmos is compared with, each trained in one stage of its own name."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from cosmos_jax import decoding, sampling, unmasking
from cosmos_jax.models import autoregressive, masked
from cosmos_jax.stages import autoregressive as autoregressive_stage
from cosmos_jax.stages import masked as masked_stage
from cosmos_jax.stages.base import Batch, Stage, row_keys, source_of


@dataclasses.dataclass(frozen=True)
class Baseline:
    """How a system is made.

    Attributes:
      build: (config, size of the vocabulary) -> model.
      stage: (config, model, frozen, statistics, data) -> its stage of training.
    """

    build: Callable[..., Any]
    stage: Callable[..., Stage]


BASELINES = {
    "autoregressive": Baseline(autoregressive.build, autoregressive_stage.make),
    "masked": Baseline(masked.build, masked_stage.make),
}

# (config, model) -> what generates: (weights, keys [B], source) -> token ids [B, L].
MAKE_GENERATOR: dict[str, Callable[..., Callable[..., Any]]] = {
    "cosmos": sampling.make_generator,
    "autoregressive": decoding.make_generator,
    "masked": unmasking.make_generator,
}


def make_generator(config: ConfigDict, model: Any) -> Callable[[Any, jax.Array, Batch], jax.Array]:
    """(weights, key, batch of rows and sources) -> token ids [B, L] int32, for `jax.jit`.

    A text is a function of `key`, its row and its source.
    """
    generator = MAKE_GENERATOR[config.system](config, model)

    def generate(weights: Any, key: jax.Array, batch: Batch) -> jax.Array:
        return generator(weights, row_keys(key, batch["rows"]), source_of(batch))

    return generate
