"""Text files as users have them: found, hashed, and read line by line with clear errors."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import unicodedata
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from cosmos_jax.errors import UserError

# Base names under which a directory may hold each split.
SPLIT_NAMES = {"train": ("train",), "valid": ("valid", "validation", "dev"), "test": ("test",)}
_GZIP = b"\x1f\x8b"
_INVISIBLE = {"Cc", "Cf", "Zs", "Zl", "Zp"}  # Unicode categories: control, format, space


def has_text(text: str) -> bool:
    """Whether any character is visible; the replacement character does not count."""
    return any(c != "\ufffd" and unicodedata.category(c) not in _INVISIBLE for c in text)


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yields (number from 1, line with its end) of UTF-8 text, compressed by gzip or not.

    A byte order mark at the start is dropped.

    Raises:
      UserError: the file is missing, unreadable, a damaged gzip file, or not UTF-8.
    """
    number = 0
    try:
        with _open(path) as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}:{number}: not UTF-8 (byte {error.start + 1} of the line: {error.reason})"
        ) from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"{path}: damaged gzip file after line {number}: {error}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


@contextlib.contextmanager
def _open(path: Path) -> Iterator[Iterable[bytes]]:
    with open(path, "rb") as file:
        if file.peek(len(_GZIP)).startswith(_GZIP):
            with gzip.open(file) as unpacked:
                yield unpacked
        else:
            yield file


def existing(path: str) -> Path:
    """The path, `~` expanded; UserError if nothing is there."""
    found = Path(path).expanduser()
    if not found.exists():
        raise UserError(f"{path}: no such file or directory")
    return found


def split_files(path: Path, suffixes: Sequence[str]) -> dict[str, list[Path]]:
    """The file of each split: of a directory by their names, a file alone is all of "train".

    Raises:
      UserError: a directory without a train file, or with two files for one split.
    """
    if not path.is_dir():
        return {"train": [path]}
    splits = {}
    for split, names in SPLIT_NAMES.items():
        found = [
            file
            for name in names
            for suffix in suffixes
            if (file := path / f"{name}{suffix}").is_file()
        ]
        if len(found) > 1:
            raise UserError(
                f"{path}: {found[0].name} and {found[1].name} are both {split}: remove one"
            )
        if found:
            splits[split] = found
    if "train" not in splits:
        wanted = " or ".join(f"train{suffix}" for suffix in suffixes)
        raise UserError(f"{path}: the directory has no {wanted}")
    return splits


def found_files(path: Path, suffixes: Sequence[str]) -> list[Path]:
    """The file itself, or all files of a directory and below with these suffixes, sorted."""
    if not path.is_dir():
        return [path]
    found = sorted(
        file for file in path.rglob("*") if file.name.endswith(tuple(suffixes)) and file.is_file()
    )
    if not found:
        raise UserError(f"{path}: the directory has no {' or '.join('*' + s for s in suffixes)}")
    return found


def fingerprint(labels: Iterable[str], files: Iterable[tuple[str, Path]] = ()) -> str:
    """Hex SHA-256 of some labels and of the (split, content) of files, whatever their names."""
    digest = hashlib.sha256()
    for label in labels:
        digest.update(f"{label}\n".encode())
    for split, path in files:
        try:
            with open(path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        digest.update(f"{split} {content}\n".encode())
    return digest.hexdigest()
