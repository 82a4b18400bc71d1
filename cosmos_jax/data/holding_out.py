"""Rows held out of a data set that comes without splits, chosen by what they say.

Rows are grouped by a hash of their source, or of their text, so that equal ones never end up
on both sides; the groups with the smallest hashes are held out.
"""

from __future__ import annotations

import bisect
import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


class HoldOut:
    """Assigns rows to `splits` or to "train": `add` every row, then `decide`, then `split`.

    Each split gets the `fraction` of the groups, at least one.
    """

    def __init__(self, splits: Sequence[str], fraction: float):
        self._splits = (*splits, "train")
        self._fraction = fraction
        self._texts = array("Q")
        self._sources = array("Q")
        self._by_source = False
        self._limits: list[int] = []  # split i has hashes below limit i

    def add(self, row: Row) -> None:
        self._texts.append(_hash(row.text))
        if row.source is not None:
            self._sources.append(_hash(row.source))

    def decide(self, where: str) -> dict[str, int]:
        """Number of rows in each split.

        Raises:
          UserError: naming `where`, there are fewer different texts than splits.
        """
        sources = np.unique(np.array(self._sources, np.uint64))
        # A fraction of a few sources (labels, say) would be none or far too much.
        self._by_source = len(sources) * self._fraction >= 1
        hashes = np.array(self._sources if self._by_source else self._texts, np.uint64)
        groups = sources if self._by_source else np.unique(hashes)
        if len(groups) < len(self._splits):
            raise UserError(
                f"{where}: {len(groups)} different texts, but at least {len(self._splits)} are"
                f" needed to hold some out for {' and '.join(self._splits[:-1])}"
            )
        size = max(1, int(len(groups) * self._fraction))
        self._limits = [int(groups[size * (i + 1)]) for i in range(len(self._splits) - 1)]
        part = np.searchsorted(np.array(self._limits, np.uint64), hashes, side="right")
        counts = np.bincount(part, minlength=len(self._splits)).tolist()
        self._texts, self._sources = array("Q"), array("Q")
        return dict(zip(self._splits, counts, strict=True))

    def split(self, row: Row) -> str:
        key = row.source if self._by_source and row.source is not None else row.text
        return self._splits[bisect.bisect_right(self._limits, _hash(key))]
