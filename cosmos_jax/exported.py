"""Trained stages in one directory, without optimiser state, to be read without data or Orbax.

    config.json                    the run's
    model.safetensors              arrays STAGE/params/PATH and STAGE/statistics/NAME
    tokenizer.json and the like    the text encoder's
    encoder/                       the text encoder, if the run had it in a directory of its own;
                                   config.encoder.name is "encoder" then

`params` are the averaged ones where a stage keeps an average. In int8 a matrix is stored as

    (1) round(x / s),  s = max |x| / 127 for each column of the last axis

with s as STAGE/params/PATH:scale, and what has one axis as it is, fp32. The header of
model.safetensors has JSON under "cosmos_jax": the number of this format; of each stage its step,
its provenance and checksums; the fingerprint of the text encoder; versions of the packages that
wrote it.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import huggingface, provenance, workdir
from cosmos_jax.encoder import MINILM, TextEncoder
from cosmos_jax.errors import UserError

FORMAT = 1
WEIGHTS = "model.safetensors"
ENCODER = huggingface.ENCODER
DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "int8": np.dtype(np.int8),
}
SCALE = ":scale"

_KEY = "cosmos_jax"
_GROUPS = ("params", "statistics")


@dataclasses.dataclass(frozen=True)
class Exported:
    """What an exported directory holds of one stage.

    Attributes:
      step: of training.
      params: nested dictionaries of NumPy arrays, fp32.
      statistics: what was measured on the data, such as `vocabulary` or `latents_mean`.
      provenance: what training recorded with its checkpoints.
    """

    step: int
    params: dict[str, Any]
    statistics: dict[str, np.ndarray]
    provenance: dict[str, Any]


def is_exported(directory: Path) -> bool:
    """Whether a directory is one that `write` made; UserError if its weights are damaged."""
    path = directory / WEIGHTS
    if not path.is_file():
        return False
    with _opened(path) as file:
        return _KEY in (file.metadata() or {})


def header(directory: Path) -> dict[str, Any]:
    """What stands with the weights: format, stages, encoder, versions, dtype.

    Raises:
      UserError: the file is missing, damaged, no export, or of a later format.
    """
    path = directory / WEIGHTS
    with _opened(path) as file:
        text = (file.metadata() or {}).get(_KEY)
    if text is None:
        raise UserError(f"{path}: is not of an exported model of cosmos-jax")
    try:
        found = json.loads(text)
        number, stages = found["format"], found["stages"]
        whole = isinstance(number, int) and all(
            isinstance(stage["step"], int) and {*_GROUPS} <= stage["crc32"].keys()
            for stage in stages.values()
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: its header is damaged; fetch or export it again")
    if number > FORMAT:
        raise UserError(
            f"{path}: is in format {number}, and this version of cosmos-jax reads up to {FORMAT}: "
            "install a newer one"
        )
    return found


def read(directory: Path, stage: str) -> Exported:
    """All of one stage.

    Raises:
      UserError: a file is missing or damaged, or the model has no such stage.
    """
    entry = _entry(directory, stage)
    params = _restored(_arrays(directory, stage, "params", entry))
    return Exported(
        step=entry["step"],
        params=unflatten_dict(params, sep="/"),
        statistics=_arrays(directory, stage, "statistics", entry),
        provenance=entry["provenance"],
    )


def read_statistics(directory: Path, stage: str) -> dict[str, np.ndarray]:
    """The statistics of one stage without its parameters; raises as `read` does."""
    return _arrays(directory, stage, "statistics", _entry(directory, stage))


def write(
    directory: Path,
    config: ConfigDict,
    stages: Mapping[str, Exported],
    encoder: TextEncoder,
    *,
    dtype: str = "float32",
) -> None:
    """Fills an empty directory.

    Args:
      config: of the run, of which `portable` is recorded.
      stages: by name; their `params` are stored in `dtype`, of `DTYPES`, their statistics as
        they are.

    Raises:
      UserError: a file cannot be written or, of the text encoder, copied.
    """
    config = portable(config)
    if config.encoder.name == ENCODER:
        _copy_encoder(Path(encoder.name), directory / ENCODER)
    arrays: dict[str, np.ndarray] = {}
    entries = {}
    for name, stage in stages.items():
        groups = {
            "params": _stored(flatten_dict(stage.params, sep="/"), DTYPES[dtype]),
            "statistics": {k: _contiguous(v, v.dtype) for k, v in stage.statistics.items()},
        }
        entries[name] = {
            "step": stage.step,
            "provenance": stage.provenance,
            "crc32": {group: _crc32(found) for group, found in groups.items()},
        }
        for group, found in groups.items():
            arrays |= {f"{name}/{group}/{path}": value for path, value in found.items()}
    said = {
        "format": FORMAT,
        "dtype": dtype,
        "stages": entries,
        "encoder": {"name": config.encoder.name, "fingerprint": encoder.fingerprint},
        "versions": provenance.versions()["versions"],
    }
    workdir.write_text(directory / "config.json", config_lib.to_json(config))
    path = directory / WEIGHTS
    with workdir.writing(path):
        try:
            safetensors.numpy.save_file(arrays, path, metadata={_KEY: json.dumps(said)})
        except safetensors.SafetensorError as error:
            raise UserError(f"{path}: cannot be written: {error}") from error
        # Safetensors writes for the owner alone, and a directory is exported to be shared.
        shutil.copymode(directory / "config.json", path)
        encoder.tokenizer.save_pretrained(str(directory))


def portable(config: ConfigDict) -> ConfigDict:
    """A copy without names of what lies elsewhere on this machine.

    The models that training began with are left out, of the data only the name is kept, and a text
    encoder in a directory of its own is called `ENCODER`.
    """
    config = ConfigDict(config.to_dict())
    kind, colon, path = config.data.source.partition(":")
    config.data.source = f"{kind}{colon}{Path(path).name}"
    config.data.directory = ""
    for name in config_lib.TRAINED:
        if "pretrained" in config[name]:
            config[name].pretrained = ""
    if config.encoder.name != MINILM and os.path.isdir(config.encoder.name):
        config.encoder.name = ENCODER
    return config


def _copy_encoder(source: Path, target: Path) -> None:
    """As it is, so that its fingerprint stays what it was."""
    with workdir.writing(target):
        target.mkdir()
        for path in huggingface.files(source):
            shutil.copyfile(path, target / path.name)


def _stored(params: Mapping[str, Any], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Parameters by path in the type of the file; equation (1)."""
    found = {}
    for path, value in params.items():
        if dtype != np.int8:
            found[path] = _contiguous(value, dtype)
        elif np.ndim(value) < 2:
            found[path] = _contiguous(value, DTYPES["float32"])
        else:
            largest = np.max(np.abs(value), axis=tuple(range(np.ndim(value) - 1)))
            scale = np.where(largest > 0, largest, 1) / 127
            found[path] = _contiguous(np.rint(value / scale), dtype)
            found[path + SCALE] = _contiguous(scale, DTYPES["float32"])
    return found


def _restored(stored: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The parameters of `_stored`, fp32."""
    return {
        path: value.astype(np.float32) * stored.get(path + SCALE, np.float32(1))
        for path, value in stored.items()
        if not path.endswith(SCALE)
    }


def _contiguous(value: Any, dtype: np.dtype) -> np.ndarray:
    return np.asarray(value, order="C").astype(dtype, copy=False)


def _crc32(arrays: Mapping[str, np.ndarray]) -> int:
    """Of names, shapes and bytes; safetensors notices a file that was cut, but no changed byte."""
    total = 0
    for name in sorted(arrays):
        value = arrays[name]
        total = zlib.crc32(f"{name} {value.dtype.name} {value.shape}".encode(), total)
        total = zlib.crc32(np.ascontiguousarray(value).tobytes(), total)
    return total


def _entry(directory: Path, stage: str) -> dict[str, Any]:
    stages = header(directory)["stages"]
    if stage not in stages:
        raise UserError(
            f"{directory}: this exported model has no stage {stage!r}, only {', '.join(stages)}"
        )
    return stages[stage]


def _arrays(
    directory: Path, stage: str, group: str, entry: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The arrays of a group, without what stands before their names, as they were saved."""
    path, prefix = directory / WEIGHTS, f"{stage}/{group}/"
    with _opened(path) as file:
        found = {
            name.removeprefix(prefix): file.get_tensor(name)
            for name in file.keys()  # noqa: SIM118 (not a dictionary)
            if name.startswith(prefix)
        }
    if _crc32(found) != entry["crc32"][group]:
        raise UserError(f"{path}: is damaged: {prefix[:-1]} is not what was saved; fetch it again")
    return found


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, with whatever is wrong about it as a UserError."""
    try:
        with safetensors.safe_open(path, "np") as file:
            yield file
    except FileNotFoundError as error:
        raise UserError(f"{path}: is missing") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except safetensors.SafetensorError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: is damaged ({reason}); fetch it again") from error
