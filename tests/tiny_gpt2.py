"""A tiny GPT-2 on disk, with a tokenizer of its own: what `language_model.load` reads."""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers
from flax.traverse_util import flatten_dict

from cosmos_jax.models import gpt2

START = "<|endoftext|>"
VOCAB_SIZE = 300
CONFIG = dict(
    model_type="gpt2",
    vocab_size=VOCAB_SIZE,
    n_embd=24,
    n_layer=2,
    n_head=4,
    n_positions=40,
    bos_token_id=0,
    eos_token_id=0,
)


def write_tokenizer(directory: Path, texts: list[str]) -> None:
    """Byte-level BPE, as GPT-2's, learnt from the texts."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        texts, vocab_size=VOCAB_SIZE, min_frequency=1, special_tokens=[START], show_progress=False
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    special = {"bos_token": START, "eos_token": START, "unk_token": START}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2TokenizerFast", **special})
    )


def torch_names(config: gpt2.Gpt2Config, params: gpt2.Params) -> dict[str, np.ndarray]:
    """Tensors under PyTorch's names, by the table that the comparison with PyTorch checks."""
    flat = flatten_dict(params)
    return {theirs: np.asarray(flat[ours]) for ours, (theirs, _) in gpt2._renames(config).items()}


def write_model(directory: Path, params: gpt2.Params) -> None:
    """The files of `CONFIG` and its parameters, but for the tokenizer."""
    (directory / "config.json").write_text(json.dumps(CONFIG))
    tensors = torch_names(gpt2.Gpt2Config.from_huggingface(CONFIG), params)
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
