"""What the generation of a system consists of, piece by piece, for `benchmark.py` to time."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import decoding, unmasking
from cosmos_jax.stages.base import row_keys, source_of
from cosmos_jax.systems import SEED, Model


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """A piece of a generation, which makes `calls` calls of it.

    Attributes:
      function: (constants, state) -> answer.
      loops: the answer is the next state and takes its place in memory.
      counted: what to count FLOPs and bytes of instead, where the function has a loop within, of
        which XLA counts one turn.
    """

    name: str
    calls: int
    function: Callable[[Any, Any], Any]
    constants: Any
    state: Any
    loops: bool = False
    counted: Callable[[Any, Any], Any] | None = None


def parts_of(found: Model, key: jax.Array, batch: dict[str, jax.Array]) -> list[Part]:
    """The pieces that the generation from `key` and `batch` consists of, but for small ones."""
    keys_B, source = row_keys(key, batch["rows"]), source_of(batch)
    return PARTS[found.config.system](found, keys_B, source)


def _normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(SEED), shape)


def _cosmos_parts(found: Model, keys_B: jax.Array, source: Any) -> list[Part]:
    model, settings = found.model, config_lib.sampling(found.config)
    weights = model.for_sampling(found.weights)
    num_texts = num_passes = len(keys_B)
    latents = (found.config.autoencoder.num_latents, found.config.encoder.hidden_size)
    several: list[Part] = []
    condition: tuple[Any, ...] = ()
    if source is not None:

        def read_source(weights, source):
            states = model.text_states(weights, *source)
            encoded = model.encode_condition(weights, states, source[1])
            return model.read_condition(weights, encoded), source[1]

        several.append(Part("source", 1, read_source, weights, source))
        condition = jax.jit(read_source)(weights, source)
        if settings["guidance"] != 1:  # once with the source and once without it
            num_passes = 2 * num_texts
            condition = jax.tree.map(lambda a: jnp.concatenate([a, a]), condition)

    def denoise(constants, x):
        weights, t, condition = constants
        return model.denoise(weights, x, t, x, *condition)

    # Heun's method asks twice.
    calls = settings["num_sampling_steps"] * (2 if settings["sampler"] == "heun" else 1)
    constants = (weights, jnp.full(num_passes, 0.5), condition)
    return [
        *several,
        Part("denoiser", calls, denoise, constants, _normal(num_passes, *latents)),
        Part(
            "decoder",
            1,
            model.decode,
            weights,
            _normal(num_texts, *latents),
            counted=model.decode_at_once,
        ),
    ]


def _autoregressive_parts(found: Model, keys_B: jax.Array, source: Any) -> list[Part]:
    model, settings = found.model, found.config.autoregressive
    num_texts, length = len(keys_B), found.config.data.max_length
    beams = settings.num_beams if settings.decoding == "beam" else 1
    params = model.for_decoding(found.weights)
    several: list[Part] = []
    read = None
    if source is not None:

        def read_source(constants, source):
            weights, params = constants
            return model.read_source(params, model.text_states(weights, *source), source[1])

        several.append(Part("source", 1, read_source, (found.weights, params), source))
        read = jax.jit(read_source)((found.weights, params), source)

    def step(constants, state):
        params, rows, position, visible, read = constants
        return model.step(params, rows, position, visible, state[1], read)

    # In the middle of a text, where the cache is as large as it is on average.
    places = beams * (length // 2)
    cache = jax.tree.map(
        lambda entry: jnp.pad(entry, ((0, 0), (0, 0), (0, places), (0, 0))),
        model.empty_cache(num_texts),
    )
    constants = (
        params,
        jnp.zeros((num_texts, beams), jnp.int32),
        jnp.int32(length // 2 - 1),
        jnp.ones((1, 1, places), bool),
        read,
    )
    logits = _normal(num_texts, beams, len(found.weights["vocabulary"]))
    several.append(Part("token", length - 1, step, constants, (logits, cache), loops=True))
    if settings.decoding == "nucleus":

        def draw(keys_B, logits_BxV):
            return decoding.draw_from_nucleus(keys_B, logits_BxV, settings.top_p)

        # A copy: the step before takes its state.
        several.append(Part("draw", length - 1, draw, keys_B, jnp.copy(logits[:, 0])))
    return several


def _masked_parts(found: Model, keys_B: jax.Array, source: Any) -> list[Part]:
    model, weights, config = found.model, found.weights, found.config
    num_texts, length, width = len(keys_B), config.data.max_length, config.encoder.hidden_size
    several: list[Part] = []
    condition: tuple[Any, ...] = ()
    if source is not None:

        def encode(weights, source):
            return model.condition(weights, model.text_states(weights, *source))

        several.append(Part("source", 1, encode, weights, source))
        condition = (jax.jit(encode)(weights, source), source[1])

    def hidden(constants, rows_BxL):
        weights, condition = constants
        return model.hidden(weights, rows_BxL, *condition)

    chunk = -(-(length - 1) // config.masked.num_sampling_steps)
    passes, heads = masked_calls(config, keys_B, chunk)
    rows = jnp.full((num_texts, length), model.mask_row)
    return [
        *several,
        Part("pass", passes, hidden, (weights, condition), rows),
        Part("head", heads, model.logits, weights, _normal(num_texts, chunk, width)),
    ]


def masked_calls(config: ConfigDict, keys_B: jax.Array, chunk: int) -> tuple[int, int]:
    """Calls of network and head for the texts of these keys; see `unmasking.py`."""
    step_keys = jax.vmap(jax.random.split)(keys_B)[:, 0]
    steps_BxM = unmasking.unmasking_steps(
        step_keys, config.data.max_length - 1, config.masked.num_sampling_steps
    )
    counts = [np.unique(steps_M, return_counts=True)[1] for steps_M in np.asarray(steps_BxM)]
    passes = max(map(len, counts))
    at_once_BxP = np.array([np.pad(count, (0, passes - len(count))) for count in counts])
    return passes, int(np.sum(-(-at_once_BxP.max(axis=0) // chunk)))


PARTS = {
    "cosmos": _cosmos_parts,
    "autoregressive": _autoregressive_parts,
    "masked": _masked_parts,
}
