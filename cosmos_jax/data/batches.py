"""The batch of a step, as a pure function of (seed, step), made ahead of the device.

Position p of the endless stream of rows is row perm_e(p mod n) in epoch e = p // n, with a
permutation perm_e of the n rows that depends on the seed and e alone. Step s reads positions
s * batch_size to (s + 1) * batch_size - 1. So the step is all the state the data has, on any
number of processes.
"""

from __future__ import annotations

import functools
import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cosmos_jax.data import tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from cosmos_jax.data.sources import Row, Rows

logger = logging.getLogger(__name__)

T = TypeVar("T")
Batch = dict[str, np.ndarray]


@functools.lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num_rows: int) -> np.ndarray:
    # NumPy promises the stream of a bit generator for all versions, that of `permutation` for
    # none; a run must be able to go on after an upgrade.
    key = [seed % 2**64, epoch]
    order = np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable")
    order.setflags(write=False)
    return order


def row_indices(seed: int, step: int, batch_size: int, num_rows: int) -> np.ndarray:
    """Rows of the batch of `step`, int64 of shape [batch_size]; each row once per epoch."""
    epoch_B, offset_B = np.divmod(step * batch_size + np.arange(batch_size), num_rows)
    row_B = np.empty(batch_size, np.int64)
    for epoch in np.unique(epoch_B).tolist():
        here_B = epoch_B == epoch
        row_B[here_B] = _permutation(seed, epoch, num_rows)[offset_B[here_B]]
    return row_B


def prefetch(
    load: Callable[[int], T], steps: Iterable[int], depth: int = 4
) -> Generator[tuple[int, T], None, None]:
    """Yields (step, load(step)) in order, with up to `depth` loads done ahead in a thread.

    An exception of `load` is raised where its step is due. Closing the generator waits for the
    load in progress and drops the others: `with contextlib.closing(prefetch(...)) as batches`.
    """
    remaining = iter(steps)
    pending: deque[tuple[int, Future[T]]] = deque()
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    try:
        while True:
            for step in itertools.islice(remaining, depth + 1 - len(pending)):
                pending.append((step, pool.submit(load, step)))
            if not pending:
                return
            step, future = pending.popleft()
            yield step, future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@dataclass(eq=False)
class _Tokenized:
    """Rows of a data set as token ids, counting the texts and sources that had to be cut.

    `local` selects this process's part of every batch of `batch_size` rows.
    """

    rows: Rows
    tokenizer: PreTrainedTokenizerBase
    _: KW_ONLY
    max_length: int
    max_source_length: int
    batch_size: int
    local: slice | np.ndarray = field(default_factory=lambda: slice(None))
    read_texts: int = field(default=0, init=False)  # so far, every reading of a row anew
    cut_texts: int = field(default=0, init=False)
    cut_sources: int = field(default=0, init=False)

    def read(self, row_B: np.ndarray) -> Batch:
        rows = _read(self.rows, row_B.tolist())
        texts = tokens.encode(self.tokenizer, [row.text for row in rows], self.max_length)
        self.cut_texts += int(texts.cut_B.sum())
        self.read_texts += len(rows)
        batch = {"ids": texts.ids_BxL, "mask": texts.mask_BxL, "rows": row_B}
        given = [row.source for row in rows if row.source is not None]
        if given:
            sources = tokens.encode(self.tokenizer, given, self.max_source_length)
            self.cut_sources += int(sources.cut_B.sum())
            batch |= {"source_ids": sources.ids_BxL, "source_mask": sources.mask_BxL}
        return batch

    def log_cuts(self, name: str) -> None:
        """Says in the log how many texts and sources were cut, if any were."""
        for what, number, limit in (
            ("texts", self.cut_texts, self.max_length),
            ("sources", self.cut_sources, self.max_source_length),
        ):
            if number:
                logger.info(
                    "%s: %d of the %d %s read were cut to %d tokens",
                    *(name, number, self.read_texts, what, limit),
                )


@dataclass(eq=False)
class TokenBatches(_Tokenized):
    """The training batches of this process: call with a step.

    A batch holds, for the b rows that `local` selects of the global batch,
      ids [b, L] int32, mask [b, L] bool: the text, see `tokens.Encoded`
      source_ids [b, S] int32, source_mask [b, S] bool: its source, if rows have one
      rows [b] int64: the rows' numbers
    """

    _: KW_ONLY
    seed: int

    def __call__(self, step: int) -> Batch:
        row_B = row_indices(self.seed, step, self.batch_size, len(self.rows))
        return self.read(row_B[self.local])


def padded_batches(num_rows: int, batch_size: int, start: int = 0) -> list[tuple[int, int]]:
    """(first row, number of rows) of the batches that cover rows `start` to `num_rows` in order.

    All but the last are full; the last is to be padded to `batch_size`.
    """
    return [
        (first, min(batch_size, num_rows - first)) for first in range(start, num_rows, batch_size)
    ]


@dataclass(eq=False)
class OrderedBatches(_Tokenized):
    """Rows in order in batches of one shape, for evaluation: call with 0 .. len - 1.

    Batches as of `TokenBatches`, and
      real [b] bool: False on rows that repeat the last one to fill the last batch

    Only the first `limit` rows are read where it is given, and those before `start` are not.
    """

    _: KW_ONLY
    limit: int | None = None
    start: int = 0

    def __post_init__(self) -> None:
        num_rows = len(self.rows) if self.limit is None else min(self.limit, len(self.rows))
        self.batches = padded_batches(num_rows, self.batch_size, self.start)

    def __len__(self) -> int:
        return len(self.batches)

    def __call__(self, index: int) -> Batch:
        start, count = self.batches[index]
        offset_B = np.arange(self.batch_size)[self.local]
        batch = self.read(start + np.minimum(offset_B, count - 1))
        return batch | {"real": offset_B < count}


def _read(rows: Rows, indices: Sequence[int]) -> list[Row]:
    """The rows at `indices`, in one call where the rows can do that (4 times as fast)."""
    if many := getattr(rows, "__getitems__", None):
        return many(indices)
    return [rows[i] for i in indices]
