"""What the library compiles: functions (weights, batch, key, dial) -> an array with a row a text.

Each is made of a config, the modules of its system and a guide, and takes of a batch what it
needs: `rows`, `ids` and `mask`, `source_ids` and `source_mask`, `latents`.
"""

from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from cosmos_jax import editing, guides
from cosmos_jax.baselines import make_generator
from cosmos_jax.sampling import make_sampler
from cosmos_jax.stages.base import Batch, row_keys, source_of


def _generate(config: ConfigDict, system: Any, guide: guides.Guide | None) -> Callable:
    if guide is None:
        generate = make_generator(config, system)
        return lambda weights, batch, key, _: generate(weights, key, batch)
    draw = make_sampler(config, system)

    def guided(weights: dict, batch: Batch, key: jax.Array, scale: jax.Array) -> jax.Array:
        refine = guides.guided(system, weights, guide, scale)
        keys_B = row_keys(key, batch["rows"])
        x_0 = draw(weights, keys_B, source_of(batch), refine=refine)
        return editing.decode(system, weights, x_0)

    return guided


def _trace(config: ConfigDict, system: Any, _: None) -> Callable:
    draw = make_sampler(config, system)

    def trace(weights: dict, batch: Batch, key: jax.Array) -> jax.Array:
        keys_B = row_keys(key, batch["rows"])
        _, x_0_TxBxNxD = draw(weights, keys_B, source_of(batch), trace=True)
        ids_TxBxL = jax.lax.map(lambda x_0: editing.decode(system, weights, x_0), x_0_TxBxNxD)
        return ids_TxBxL.swapaxes(0, 1)

    return trace


def _encode(config: ConfigDict, system: Any, _: None) -> Callable:
    return lambda weights, batch: editing.encode(system, weights, batch["ids"], batch["mask"])


def _decode(config: ConfigDict, system: Any, _: None) -> Callable:
    return lambda weights, batch, *_: editing.decode(system, weights, batch["latents"])


def _edit(config: ConfigDict, system: Any, _: None) -> Callable:
    edit = editing.make_editor(config, system)

    def edited(weights: dict, batch: Batch, key: jax.Array, strength: jax.Array) -> jax.Array:
        keys_B = row_keys(key, batch["rows"])
        x_0 = edit(weights, keys_B, batch["latents"], strength, source_of(batch))
        return editing.decode(system, weights, x_0)

    return edited


def _infill(config: ConfigDict, system: Any, _: None) -> Callable:
    infill = editing.make_infiller(config, system)
    return lambda weights, batch, key: infill(
        weights,
        row_keys(key, batch["rows"]),
        *(batch[name] for name in ("ids", "mask", "given")),
        source_of(batch),
    )


PROGRAMS: dict[str, Callable[..., Callable]] = {
    "generate": _generate,
    "trace": _trace,
    "encode": _encode,
    "decode": _decode,
    "edit": _edit,
    "infill": _infill,
}
