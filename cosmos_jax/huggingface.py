"""Models in the files of Hugging Face: finds them; reads their JSON, weights and tokenizer.

A directory of a model holds `config.json`, the files of a fast tokenizer and the weights in
one of the three formats of `WEIGHTS`, whole or in shards. `what` is how a message calls the
model: "text encoder", "language model", "classifier".
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict

from cosmos_jax.errors import UserError
from cosmos_jax.models.torch_files import load_torch_file

# In order of preference.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
# One of these makes a tokenizer; the others say what is special about it.
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json")
TOKENIZER = (*VOCABULARIES, "merges.txt", "tokenizer_config.json", "special_tokens_map.json")

# Folder of the text encoder that an exported model may come with; see `exported.py`.
ENCODER = "encoder"

# Seconds to wait for the first answer of the hub.
HUB_TIMEOUT = 10

Tensors = dict[str, np.ndarray]


@contextlib.contextmanager
def errors_in(directory: Path) -> Iterator[None]:
    """Lets a `UserError` about what was read say in which directory."""
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(directory)):
            raise
        raise UserError(f"{directory}: {error}") from error


# Where the files are


def locate(name: str, what: str, *, weights: bool = True, instead: str = "") -> Path:
    """The directory of the model called `name`: a path, or an id of the hub, cache first.

    Args:
      weights: whether its weights are needed too.
      instead: what a message suggests where nothing can be fetched.
    """
    if os.path.isdir(name):
        return Path(name)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return _hub_directory(name, what, weights, instead)
    raise UserError(f"{what} {name!r}: there is no such directory")


def _hub_directory(name: str, what: str, weights: bool, instead: str) -> Path:
    """The snapshot of a hub repository, from the cache if it is there."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        directory = Path(cached).parent
        have = {path.name for path in directory.iterdir()}
        complete = {"tokenizer.json", "tokenizer_config.json"} <= have
        if complete and _own_encoder_is_there(directory) and (not weights or _weights_among(have)):
            return directory
    try:
        # Asking for the list of files first fails at once where there is no network; a
        # download would be tried again and again.
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT)
        there = {file.rfilename for file in info.siblings or ()}
        wanted = [file for file in ("config.json", *TOKENIZER) if file in there]
        if weights:
            wanted += _weights_among(there)
            wanted += sorted(file for file in there if file.startswith(f"{ENCODER}/"))
        paths = [hf_hub_download(name, file) for file in wanted]
    # The hub's errors have no common base, and those of its HTTP client depend on its version.
    except Exception as error:
        raise UserError(
            f"{what} {name!r} is neither a directory nor in the local cache, and cannot be"
            f" fetched ({_one_line(error)}); put its config.json, tokenizer.json,"
            f" tokenizer_config.json and model.safetensors into a directory and name that{instead}"
        ) from error
    if not paths:
        raise UserError(f"{what} {name!r}: its repository holds no such model")
    return Path(paths[0]).parent


def _own_encoder_is_there(directory: Path) -> bool:
    """Whether an exported model that comes with its text encoder is whole; see `exported.py`."""
    encoder = read_json(directory / "config.json").get("encoder")
    own = isinstance(encoder, dict) and encoder.get("name") == ENCODER
    return not own or (directory / ENCODER / "config.json").exists()


def _weights_among(names: Iterable[str]) -> list[str]:
    """The files of the preferred format: a whole one, or all its shards; none if neither."""
    there = sorted(names)
    for whole in WEIGHTS:
        if whole in there:
            return [whole]
        stem, suffix = whole.split(".")
        shards = [n for n in there if re.fullmatch(rf"{stem}-\d{{5}}-of-\d{{5}}\.{suffix}", n)]
        if shards and shards[-1].startswith(f"{stem}-{len(shards):05}-of-{len(shards):05}"):
            return shards
    return []


def files(directory: Path) -> list[Path]:
    """Those of a model in a directory: config, weights in the preferred format, tokenizer."""
    there = {path.name for path in directory.iterdir() if path.is_file()}
    names = [name for name in ("config.json", *TOKENIZER) if name in there]
    return [directory / name for name in (*names, *_weights_among(there))]


# What is in them


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def read_tensors(directory: Path) -> tuple[Tensors, str]:
    """The weights of a model, and the SHA-256 of their files one after another.

    Names and shapes are PyTorch's, whatever the format: a Flax kernel is transposed, and
    `kernel`, `embedding` and `scale` are called `weight`.
    """
    names = _weights_among(path.name for path in directory.iterdir())
    if not names:
        raise UserError(
            f"{directory}: holds no weights; one of {', '.join(WEIGHTS)} is needed,"
            " or all of its shards"
        )
    fingerprint = hashlib.sha256()
    tensors: Tensors = {}
    for path in (directory / name for name in names):
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                fingerprint.update(block)
        with errors_in(path):
            tensors |= _READERS[path.suffix](path)
    return tensors, fingerprint.hexdigest()


def _read_safetensors(path: Path) -> Tensors:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"is damaged ({_one_line(error)}); fetch it again") from error


def _read_torch(path: Path) -> Tensors:
    tensors = load_torch_file(path)
    if not isinstance(tensors, dict):
        raise UserError("is not a state dict")
    return tensors


def _read_flax(path: Path) -> Tensors:
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    # msgpack has a class for every way in which a file can be damaged.
    except Exception as error:
        raise UserError(f"is damaged ({_one_line(error)}); fetch it again") from error
    if not isinstance(tree, dict):
        raise UserError("is not a tree of parameters")
    tensors = {}
    for names, array in flatten_dict(tree.get("params", tree)).items():
        leaf = "bias" if names[-1] == "bias" else "weight"
        tensors[".".join((*names[:-1], leaf))] = array.T if names[-1] == "kernel" else array
    return tensors


_READERS: dict[str, Callable[[Path], Tensors]] = {
    ".safetensors": _read_safetensors,
    ".bin": _read_torch,
    ".msgpack": _read_flax,
}


def read_tokenizer(
    directory: Path, special_tokens: Iterable[str] = (), vocab_size: int | None = None
) -> Any:
    """The fast tokenizer of a model.

    Args:
      special_tokens: those it must have, such as "cls" or "bos".
      vocab_size: how many word embeddings its model has for its ids.
    """
    if not any((directory / name).is_file() for name in VOCABULARIES):
        raise UserError(f"{directory}: holds no tokenizer; tokenizer.json or vocab.txt is needed")
    tokenizer_class = _tokenizer_class(directory)
    try:
        tokenizer = tokenizer_class.from_pretrained(str(directory), local_files_only=True)
    # What a damaged file raises depends on the file and on the version of transformers.
    except Exception as error:
        raise UserError(
            f"{directory}: its tokenizer cannot be read ({_one_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: its tokenizer is not a fast one; tokenizer.json is needed")
    for name in special_tokens:
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(f"{directory}: its tokenizer has no [{name.upper()}] token")
    last_id = max(tokenizer.get_vocab().values())
    if vocab_size is not None and last_id >= vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has ids up to {last_id}, but its model only"
            f" {vocab_size} word embeddings; do they belong together?"
        )
    return tokenizer


def _tokenizer_class(directory: Path) -> Any:
    """The class that a BERT's tokenizer_config.json names, else `AutoTokenizer`.

    The latter would find the same one, but imports PyTorch where that is installed: seconds.
    """
    # Without PyTorch transformers offers only tokenizers, and says so at import.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    config = directory / "tokenizer_config.json"
    name = read_json(config).get("tokenizer_class") if config.is_file() else None
    is_bert = name in ("BertTokenizer", "BertTokenizerFast")
    return getattr(transformers, "BertTokenizerFast" if is_bert else "AutoTokenizer")


def _one_line(error: Exception) -> str:
    text = textwrap.shorten(str(error), width=200, placeholder="...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
