"""Reads checkpoints written by `torch.save`, without PyTorch and without running their code.

Such a file is a zip archive: `NAME/data.pkl` is a pickle in which every tensor refers to a
storage, and `NAME/data/KEY` holds the bytes of storage KEY. A pickle can call any function
it names, so the reader knows a short list of names and refuses the rest.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import zipfile
from collections import OrderedDict
from typing import Any, ClassVar

import ml_dtypes
import numpy as np

from cosmos_jax.errors import UserError


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """Returns the object in a `.pth`, `.pt` or `.bin` file, tensors as NumPy arrays.

    Arrays are read-only and keep dtype, shape and strides; those that shared memory in
    PyTorch share it here. bfloat16 and float8 arrays have the dtypes of `ml_dtypes`.
    Parameters become arrays, `torch.Size` a tuple, `torch.device` a string.

    Raises:
      UserError: the file is missing, damaged, in another format, big-endian, or names
        something that is not on the list of what may be rebuilt.
    """
    try:
        with open(path, "rb") as file:
            return _load(file, os.fspath(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _load(file: io.BufferedReader, path: str) -> Any:
    start = file.read(4)
    file.seek(0)
    if start[:1] == b"\x80":
        raise UserError(
            f"{path}: is in PyTorch's format before version 1.6;"
            " load it in PyTorch and save it again with torch.save"
        )
    if start != b"PK\x03\x04":
        raise UserError(f"{path}: is not a checkpoint written by torch.save")
    try:
        with zipfile.ZipFile(file) as archive:
            pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
            if len(pickles) != 1:
                raise UserError(f"{path}: is a zip archive, but not one written by torch.save")
            folder = pickles[0].removesuffix("data.pkl")
            if f"{folder}byteorder" in archive.namelist():
                order = archive.read(f"{folder}byteorder").strip()
                if order != b"little":
                    raise UserError(
                        f"{path}: was written on a big-endian machine; load it in PyTorch"
                        " on a little-endian one and save it again"
                    )
            return _Unpickler(archive, folder, path).load()
    except (UserError, OSError):
        raise
    # A damaged pickle can fail in any way that a wrong call can.
    except Exception as error:
        text = " ".join(str(error).split()) or "no details"
        raise UserError(
            f"{path}: is truncated or damaged ({type(error).__name__}: {text}); fetch it again"
        ) from error


@dataclasses.dataclass(frozen=True, slots=True)
class _Storage:
    """The bytes that one or more tensors view, and the dtype of their elements."""

    data: bytes
    dtype: np.dtype


def _rebuild_tensor(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool = False,
    hooks: Any = None,
    metadata: Any = None,
) -> np.ndarray:
    return _view(storage, storage.dtype, offset, shape, strides, metadata)


def _rebuild_tensor_v3(
    storage: _Storage,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    requires_grad: bool,
    hooks: Any,
    dtype: np.dtype,
    metadata: Any = None,
) -> np.ndarray:
    return _view(storage, dtype, offset, shape, strides, metadata)


def _view(
    storage: _Storage,
    dtype: np.dtype,
    offset: int,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    metadata: Any,
) -> np.ndarray:
    if metadata:
        raise ValueError(f"tensor with {metadata}, which is not supported")
    if math.prod(shape) == 0:  # An empty tensor may start past the end of its storage.
        return np.zeros(shape, dtype)
    size = dtype.itemsize
    # NumPy itself checks that the view stays inside the buffer.
    return np.ndarray(
        shape, dtype, storage.data, offset * size, tuple(stride * size for stride in strides)
    )


def _rebuild_parameter(data: np.ndarray, requires_grad: bool, hooks: Any) -> np.ndarray:
    return data


def _rebuild_device(kind: str, index: int | None = None) -> str:
    return kind if index is None else f"{kind}:{index}"


def _encode(text: str, encoding: str) -> bytes:
    """How protocol 2 writes bytes; no other encoding, for some of them run code."""
    if encoding != "latin1":
        raise ValueError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


_DTYPES = {
    "float64": np.dtype(np.float64),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "complex64": np.dtype(np.complex64),
    "complex128": np.dtype(np.complex128),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "int16": np.dtype(np.int16),
    "int8": np.dtype(np.int8),
    "uint64": np.dtype(np.uint64),
    "uint32": np.dtype(np.uint32),
    "uint16": np.dtype(np.uint16),
    "uint8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}
_STORAGES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "UntypedStorage": "uint8",
}
# Everything a checkpoint may name. A dtype stands for itself and for the class of storages.
_ALLOWED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("_codecs", "encode"): _encode,
    ("torch._utils", "_rebuild_tensor"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _rebuild_tensor_v3,
    ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
    ("torch", "Size"): tuple,
    ("torch", "device"): _rebuild_device,
    ("torch.storage", "UntypedStorage"): _DTYPES["uint8"],
    **{("torch", name): dtype for name, dtype in _DTYPES.items()},
    **{("torch", name): _DTYPES[dtype] for name, dtype in _STORAGES.items()},
    **{
        (module, kind.__name__): kind
        for module in ("builtins", "__builtin__")
        for kind in (set, frozenset, complex)
    },
}


# The Python class and not its twin in C: only there can an opcode be given another meaning.
class _Unpickler(pickle._Unpickler):
    stack: list[Any]

    def __init__(self, archive: zipfile.ZipFile, folder: str, path: str) -> None:
        super().__init__(io.BytesIO(archive.read(f"{folder}data.pkl")), encoding="utf-8")
        self._archive = archive
        self._folder = folder
        self._path = path
        self._bytes: dict[str, bytes] = {}

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise UserError(
                f"{self._path}: refused to run {module}.{name}, which the file asks for;"
                " only plain containers and tensors are read"
            )
        return _ALLOWED[module, name]

    def persistent_load(self, reference: Any) -> _Storage:
        kind, dtype, key, _, size = reference
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise ValueError(f"unknown reference {kind!r}")
        if key not in self._bytes:
            self._bytes[key] = self._archive.read(f"{self._folder}data/{key}")
        data = self._bytes[key]
        if len(data) != size * dtype.itemsize:
            raise ValueError(f"storage {key} holds {len(data)} bytes, not {size} elements")
        return _Storage(data, dtype)

    def load_build(self) -> None:
        # BUILD sets attributes of any object at all. Checkpoints need it only for the
        # `_metadata` of a state dict, which has no use here.
        self.stack.pop()
        if type(self.stack[-1]) is not OrderedDict:
            kind = type(self.stack[-1])
            raise UserError(
                f"{self._path}: refused to run __setstate__ of {kind.__module__}"
                f".{kind.__qualname__}; only plain containers and tensors are read"
            )

    dispatch: ClassVar[dict[int, Any]] = {
        **pickle._Unpickler.dispatch,
        pickle.BUILD[0]: load_build,
    }
