"""Texts as they come out of a file, a pipe or a terminal, whatever is in them."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import json
import re
import select
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos_jax.errors import UserError

STANDARD = "-"
_CHUNK = 2**20  # bytes that are read at once
_GZIP = b"\x1f\x8b"
_OBJECT = re.compile(r'\s*\{\s*"')

Texts = tuple[str, ...]


@dataclass
class Incoming:
    """The lines of one file, each of which is a text or a JSON object with a text.

    file: of bytes, with a buffer: a BufferedReader or GzipFile.
    name: for error messages.
    objects: whether lines are objects; None: they are if the first that says something begins
      as an object with a field.
    number, replaced: lines so far, and those of them in which bytes that are not UTF-8 were
      replaced by U+FFFD.
    """

    file: Any
    name: str
    objects: bool | None = None
    number: int = 0
    replaced: int = 0

    def batches(self, size: int, *fields: Sequence[str]) -> Iterator[list[Texts]]:
        """For each line, in order, one text for each of the `fields`.

        A batch has up to `size` lines: those that are there, for this never waits while it has a
        whole line. Ends of lines are LF or CRLF, and the last one may be missing.

        Args:
          fields: names of a text, of which the first that an object has is taken. Lines that are
            no objects have one text.

        Raises:
          UserError: with file and line, what is not an object with these texts, after the lines
            before it; what the system says about reading.
        """
        for lines in self._lines(size):
            batch = []
            try:
                for line in lines:
                    batch.append(self._texts(line, fields))
            except UserError:
                if batch:
                    yield batch
                raise
            yield batch

    def _lines(self, size: int) -> Iterator[list[bytes]]:
        lines: list[bytes] = []
        pieces: list[bytes] = []  # of a line that has not ended
        while chunk := self._read():
            *whole, last = chunk.split(b"\n")
            if whole:
                lines += [b"".join([*pieces, whole[0]]), *whole[1:]]
                pieces = []
            pieces.append(last)
            start = 0
            while len(lines) - start >= size:
                yield lines[start : start + size]
                start += size
            del lines[:start]
            if lines and not self._more():
                yield lines
                lines = []
        if rest := b"".join(pieces):
            lines.append(rest)
        if lines:
            yield lines

    def _read(self) -> bytes:
        """What is there, waiting only for the first byte; b"" at the end."""
        try:
            # The one method of a buffered file, packed or not, that does not wait for the rest.
            return self.file.read1(_CHUNK)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(
                f"{self.name}: damaged gzip file after line {self.number}: {error}"
            ) from error
        except OSError as error:
            raise UserError(f"{self.name}: cannot be read: {error.strerror or error}") from error

    def _more(self) -> bool:
        """Whether reading on would not wait; so it is at the end, too."""
        return bool(select.select([self.file], [], [], 0)[0])

    def _texts(self, raw: bytes, fields: Sequence[Sequence[str]]) -> Texts:
        self.number += 1
        if self.number == 1:
            raw = raw.removeprefix(codecs.BOM_UTF8)
        raw = raw.removesuffix(b"\r")
        try:
            line, whole = raw.decode(), True
        except UnicodeDecodeError:
            line, whole = raw.decode(errors="replace"), False
        if not line.strip():
            return ("",) * len(fields)
        if self.objects is None:
            self.objects = is_object(line)
        texts = self._of_object(line, fields) if self.objects else (line,)
        if len(texts) < len(fields):
            raise self._error(fields)
        # JSON can spell half of a surrogate pair, which is no character.
        paired = tuple(
            t.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for t in texts
        )
        self.replaced += not whole or paired != texts
        return paired

    def _of_object(self, line: str, fields: Sequence[Sequence[str]]) -> Texts:
        try:
            value = json.loads(line, strict=False)  # control characters are let through
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name}:{self.number}: not valid JSON: {error}") from error
        texts = []
        for names in fields:
            found = [value[name] for name in names if isinstance(value, dict) and name in value]
            if not found or not isinstance(found[0], str):
                raise self._error(fields)
            texts.append(found[0])
        return tuple(texts)

    def _error(self, fields: Sequence[Sequence[str]]) -> UserError:
        wanted = " and ".join(" or ".join(map(repr, names)) for names in fields)
        return UserError(f"{self.name}:{self.number}: needs a JSON object with the text {wanted}")


def kind_of(path: str) -> bool | None:
    """Whether the lines of a file are objects, from its name; None: that does not tell."""
    return {".jsonl": True, ".txt": False}.get(Path(path.removesuffix(".gz")).suffix)


def is_object(line: str) -> bool:
    """Whether a line begins as an object with a field."""
    return bool(_OBJECT.match(line))


@contextlib.contextmanager
def opened(path: str) -> Iterator[Incoming]:
    """The lines of a file, compressed by gzip or not, or of standard input if the path is "-".

    Lines of a file that ends in .jsonl are objects, of one in .txt texts; elsewhere the first
    line tells.

    Raises:
      UserError: what the system says about opening it.
    """
    with contextlib.ExitStack() as stack:
        if path == STANDARD:
            if sys.stdin is None:
                raise UserError("standard input is closed")
            yield Incoming(sys.stdin.buffer, "standard input")
            return
        try:
            packed = stack.enter_context(open(Path(path).expanduser(), "rb"))
            file: Any = packed
            if packed.peek(len(_GZIP)).startswith(_GZIP):
                file = stack.enter_context(gzip.open(packed))
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        yield Incoming(file, path, kind_of(path))
