"""Rows of the tables in which ROCStories and ParaDetox are published."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path

from cosmos_jax.data import files
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError

_SENTENCES = tuple(f"sentence{i}" for i in range(1, 6))
_NEUTRAL = tuple(f"neutral{i}" for i in range(1, 4))


def rocstories(path: Path) -> Iterator[Row]:
    """The five sentences of each story as one text; the title is left out."""
    for where, record in _records(path, ",", [_SENTENCES]):
        yield Row(" ".join(_cell(record, name, where) for name in _SENTENCES))


def paradetox(path: Path) -> Iterator[Row]:
    """A toxic sentence as source of each of its neutral versions, of which it has 1 to 3."""
    for where, record in _records(
        path, "\t", [("toxic", "neutral1"), ("en_toxic_comment", "en_neutral_comment")]
    ):
        if "toxic" in record:
            toxic, neutral = "toxic", tuple(name for name in _NEUTRAL if record.get(name))
        else:
            toxic, neutral = "en_toxic_comment", ("en_neutral_comment",)
        if not neutral:
            raise UserError(f"{where}: no column from 'neutral1' on has text")
        source = _cell(record, toxic, where)
        for name in neutral:
            yield Row(_cell(record, name, where), source)


def _cell(record: dict[str, str], name: str, where: str) -> str:
    value = " ".join(record[name].split())
    if not files.has_text(value):
        raise UserError(f"{where}: column '{name}' has no text")
    return value


def _records(
    path: Path, delimiter: str, choices: list[tuple[str, ...]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yields (file:line, values by column) if the table has all columns of some choice."""
    reader = csv.reader((line for _, line in files.lines(path)), delimiter=delimiter, strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if not any(set(choice) <= set(header) for choice in choices):
            wanted = ", or ".join(", ".join(choice) for choice in choices)
            found = ", ".join(header) or "none"
            raise UserError(f"{path}: needs the columns {wanted}; columns found: {found}")
        empty = True
        for record in reader:
            where = f"{path}:{reader.line_num}"
            if not record:
                continue
            if len(record) != len(header):
                raise UserError(f"{where}: {len(record)} fields, the header has {len(header)}")
            empty = False
            yield where, dict(zip(header, record, strict=True))
        if empty:
            raise UserError(f"{path}: holds no rows")
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: {error}") from error
