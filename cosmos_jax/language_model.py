"""A language model that scores texts: a GPT-2 and its tokenizer, from Hugging Face's files."""

from __future__ import annotations

import dataclasses
from typing import Any

from cosmos_jax import huggingface
from cosmos_jax.models.gpt2 import Gpt2Config, Params, from_torch_names


@dataclasses.dataclass(frozen=True, eq=False)
class LanguageModel:
    """A GPT-2 and its tokenizer.

    `params` are those of `models.gpt2.Gpt2`, nested, NumPy fp32; `tokenizer` is a fast one of
    transformers with a start token, in GPT-2 <|endoftext|>; `fingerprint` is the SHA-256 of
    the weights.
    """

    name: str
    config: Gpt2Config
    params: Params
    tokenizer: Any
    fingerprint: str


def load(name: str) -> LanguageModel:
    """Reads the language model called `name`: a directory or a Hugging Face id.

    Raises:
      UserError: the files cannot be found or read, are damaged, or do not belong together.
    """
    directory = huggingface.locate(name, "language model")
    with huggingface.errors_in(directory):
        config = Gpt2Config.from_huggingface(huggingface.read_json(directory / "config.json"))
        tokenizer = huggingface.read_tokenizer(directory, ("bos",), config.vocab_size)
        tensors, fingerprint = huggingface.read_tensors(directory)
        params = from_torch_names(config, tensors)
    return LanguageModel(name, config, params, tokenizer, fingerprint)
