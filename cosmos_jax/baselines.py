"""The systems that Cosmos is compared with, each trained in one stage of its own name."""

import dataclasses
from collections.abc import Callable
from typing import Any

from cosmos_jax import decoding, sampling, unmasking
from cosmos_jax.models import autoregressive, masked
from cosmos_jax.stages import autoregressive as autoregressive_stage
from cosmos_jax.stages import masked as masked_stage
from cosmos_jax.stages.base import Stage


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
