"""Rows of JSON lines: objects with `text`, or with `source` and `target`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cosmos_jax.data import files
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError

SUFFIXES = (".jsonl", ".jsonl.gz")


def rows(path: Path) -> Iterator[Row]:
    """The rows of one file, in order; `text` makes a row unconditional whatever else it has.

    Lines of white space alone are skipped.

    Raises:
      UserError: with file and line, a row that is not as it should be, or that has a source
        where the first has none or the other way round; a file without rows.
    """
    first = None
    for number, line in files.lines(path):
        if not line.strip():
            continue
        row = _row(line, f"{path}:{number}")
        if first is None:
            first = row
        elif (row.source is None) != (first.source is None):
            raise UserError(
                f"{path}:{number}: this row has {_fields(row)}, the first has {_fields(first)}:"
                " a file holds one kind of rows"
            )
        yield row
    if first is None:
        raise UserError(f"{path}: holds no rows")


def _fields(row: Row) -> str:
    return "'text'" if row.source is None else "'source' and 'target'"


def _row(line: str, where: str) -> Row:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{where}: a row must be a JSON object, this is {line.strip()[:40]}")
    if "text" in values:
        return Row(_field(values, "text", where))
    if "source" in values and "target" in values:
        return Row(_field(values, "target", where), _field(values, "source", where))
    found = ", ".join(map(repr, values)) or "none"
    raise UserError(f"{where}: a row needs 'text', or 'source' and 'target'; fields found: {found}")


def _field(values: dict[str, Any], name: str, where: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise UserError(f"{where}: '{name}' must be a string, not {json.dumps(value)[:40]}")
    if not files.has_text(value):
        raise UserError(f"{where}: '{name}' has no text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: '{name}' has half of a surrogate pair") from error
    return value
