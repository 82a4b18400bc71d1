"""What `config.data.source` can name, and the data set it stands for."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Protocol

from cosmos_jax.errors import UserError


@dataclass(frozen=True)
class Row:
    """One text, and the source it is conditioned on, if any."""

    text: str
    source: str | None = None


class Rows(Protocol):
    """Rows with random access, read from disk when asked for."""

    def __len__(self) -> int: ...

    def __getitem__(self, i: int, /) -> Row: ...


def first_texts(rows: Rows, count: int) -> list[str]:
    """The texts of the first `count` rows, or of all if there are fewer."""
    return [rows[i].text for i in range(min(count, len(rows)))]


@dataclass(frozen=True)
class Dataset:
    """Three splits of rows that all have a source (`conditional`) or all have none.

    fingerprint: hex SHA-256 that changes when the content does.
    """

    name: str
    conditional: bool
    train: Rows
    valid: Rows
    test: Rows
    fingerprint: str


@dataclass(frozen=True)
class Spread:
    """`count` of the rows, at equal distances."""

    rows: Rows
    count: int

    def __len__(self) -> int:
        return min(self.count, len(self.rows))

    def __getitem__(self, i: int, /) -> Row:
        return self.rows[i * len(self.rows) // len(self)]


# Whether a source's name is followed by `:PATH`.
SOURCES = {
    "embedded": False,
    "sentences": False,
    "jsonl": True,
    "rocstories": True,
    "paradetox": True,
    "openwebtext": True,
    "squad": False,
    "xsum": False,
    "wikipedia": False,
}


def load(source: str, directory: str = "") -> Dataset:
    """The data set that `source` names, prepared on first use.

    source: a name of `SOURCES`, those that want one followed by `:PATH`.
    directory: where TFDS keeps prepared data; empty for TFDS's own choice, which the
      environment variable TFDS_DATA_DIR changes.

    Raises:
      UserError: an unknown name, files that are missing or not as they should be (with file
        and line), a data set that cannot be obtained here.
    """
    name, colon, path = source.partition(":")
    if name not in SOURCES:
        near = difflib.get_close_matches(name, SOURCES, n=1)
        hint = f", did you mean {near[0]}?" if near else ""
        choices = ", ".join(n + ":PATH" * wants_path for n, wants_path in SOURCES.items())
        raise UserError(f"no data source {name!r}{hint} (config.data.source is one of {choices})")
    if SOURCES[name] and not path:
        raise UserError(f"data source {name} needs a path: config.data.source={name}:PATH")
    if not SOURCES[name] and colon:
        raise UserError(f"data source {name} takes no path: config.data.source={name}")
    # TFDS takes a second to import.
    from cosmos_jax.data import builders

    return builders.load(name, path, directory)
