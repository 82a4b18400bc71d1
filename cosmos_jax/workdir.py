"""The files of a run: who may use the folder, and writing so that nothing is half-written."""

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import config_checks
from cosmos_jax.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Writes a file whole or not at all, also when the machine stops in between."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with writing(path):
            with open(partial, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except UserError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns what the system says about writing a file, such as a full disk, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The value, or None if there is no file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error


def read_config(workdir: Path) -> ConfigDict | None:
    """The config a workdir was made with, or None if it has none."""
    recorded = read_json(workdir / "config.json")
    return None if recorded is None else ConfigDict(recorded)


def claim(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json`; UserError if the folder belongs to a run this one cannot continue."""
    recorded = read_config(workdir)
    if recorded is not None:
        distilled = (workdir / "distillation").exists()
        conflict = config_checks.conflict(recorded, config, distilled=distilled)
        if conflict:
            raise UserError(
                f"{workdir} belongs to another config: {conflict}; "
                "give that value or choose another --workdir"
            )
    elif any((workdir / name).exists() for name in config_lib.TRAINED):
        raise UserError(f"{workdir} holds checkpoints but no config.json; choose another --workdir")
    write_text(workdir / "config.json", config_lib.to_json(config))


@contextlib.contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Creates the folder and keeps other runs out of it; the lock dies with the process."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file: TextIO = open(workdir / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"{workdir}: cannot be used as --workdir: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{workdir} is in use by {file.read().strip() or 'another run'}; "
                "wait for it, stop it, or choose another --workdir"
            ) from None
        except OSError as error:
            raise UserError(
                f"{workdir}: cannot be locked: {error.strerror}; mount its file system with locks "
                "or choose another --workdir"
            ) from error
        with writing(workdir / ".lock"):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            file.flush()
        yield
