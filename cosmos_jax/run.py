"""What every part of a run needs to know, and the batches it reads."""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cosmos_jax import sharding
from cosmos_jax.data import batches
from cosmos_jax.data.sources import Dataset, Rows
from cosmos_jax.encoder import TextEncoder


@dataclasses.dataclass(frozen=True, eq=False)
class Run:
    """A validated config and what it names, opened."""

    config: ConfigDict
    workdir: Path
    mesh: Mesh
    encoder: TextEncoder
    dataset: Dataset

    def key(self, purpose: str) -> jax.Array:
        """The random key of one purpose, such as "autoencoder/init"."""
        return jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(purpose.encode()))

    def data_seed(self, purpose: str) -> int:
        """The seed of the order in which one purpose goes through the training texts."""
        return self.config.seed * 2**32 + zlib.crc32(purpose.encode())

    def training_batches(self, batch_size: int, purpose: str) -> batches.TokenBatches:
        """step -> this process's part of a batch of tokens of the training texts."""
        return batches.TokenBatches(
            self.dataset.train,
            self.encoder.tokenizer,
            seed=self.data_seed(purpose),
            **self._batch_settings(batch_size),
        )

    def ordered_batches(
        self, rows: Rows, batch_size: int, limit: int, start: int = 0
    ) -> batches.OrderedBatches:
        """index -> this process's part of a batch of rows `start` to `limit`, in order.

        Batches are made larger where the mesh needs that, and no larger than the rows need.
        """
        return batches.OrderedBatches(
            rows,
            self.encoder.tokenizer,
            limit=limit,
            start=start,
            **self._batch_settings(self.even_batch_size(min(batch_size, limit, len(rows)))),
        )

    def even_batch_size(self, batch_size: int) -> int:
        """The next size that splits evenly over the mesh."""
        parts = sharding.batch_parts(self.mesh)
        return max(1, -(-batch_size // parts)) * parts

    def _batch_settings(self, batch_size: int) -> dict[str, Any]:
        return {
            "max_length": self.config.data.max_length,
            "max_source_length": self.config.data.max_source_length,
            "batch_size": batch_size,
            "local": sharding.local_rows(batch_size, self.mesh),
        }
