"""What a stage of training is: the functions and arrays that the loop in `train.py` needs.

A new stage (a baseline, a distilled student) is a function that returns a `Stage`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

Params = Any
Frozen = dict[str, Any]
Batch = dict[str, jax.Array]
Source = tuple[jax.Array, jax.Array]
"""Token ids [B, S] and mask [B, S] of the sources."""
Sums = dict[str, tuple[jax.Array, jax.Array]]
"""name -> (sum, weight), both scalars; the value is sum / weight. Sums of the parts of a batch
add up to those of the batch, whatever the parts."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A model to train and how.

    Attributes:
      name: of its folder in the workdir and of its lines in metrics.jsonl.
      settings: steps, batch_size, optimizer, ema_decay, intervals; see `config.py`.
      init: (key, frozen) -> params.
      features: (frozen, tokens) -> batch. Adds the part of the forward pass that no trained
        parameter and no random number enters; a batch that has it already is left alone, so
        features may be computed once and kept (`feature_cache.py`).
      losses: (params, frozen, batch, key) -> sums, of which "loss" is minimised. Weights must
        not depend on params. Random numbers of a text come from `row_keys`.
      validation: (params, frozen, batch, key) -> sums on held-out texts, of which "real"
        [B] bool says which rows are no padding.
      frozen: arrays on the mesh, an argument of every function so that none is compiled in.
      statistics: arrays to save beside the parameters: what was measured on the data.
      provenance: what to record with every checkpoint; a resumed run must find the same.
      begin: () -> params on the mesh to begin training with; None: those of `init`.
    """

    name: str
    settings: ConfigDict
    init: Callable[[jax.Array, Frozen], Params]
    features: Callable[[Frozen, Batch], Batch]
    losses: Callable[[Params, Frozen, Batch, jax.Array], Sums]
    validation: Callable[[Params, Frozen, Batch, jax.Array], Sums]
    frozen: Frozen
    statistics: dict[str, Any]
    provenance: dict[str, Any]
    begin: Callable[[], Params] | None = None


def row_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
    """A key for each text from its row number, whichever part of a batch is at hand; [B]."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, rows_B)


def source_of(batch: Batch) -> Source | None:
    """What a batch has of sources."""
    return (batch["source_ids"], batch["source_mask"]) if "source_ids" in batch else None


def with_source_states(model: Any, frozen: Frozen, tokens: Batch) -> Batch:
    """The `features` of a stage that takes nothing but the source from the frozen encoder."""
    source = source_of(tokens)
    if source is None or "source_states" in tokens:
        return tokens
    return {**tokens, "source_states": model.text_states(frozen, *source)}
