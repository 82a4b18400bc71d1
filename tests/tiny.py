"""A model small enough to train in a test: an encoder, texts and a configuration.

The encoder is the frozen BERT inside the fixture's `autoencoder.pth`, with a vocabulary of
words of our own, each of which is one token.
"""

import json
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax.models.bert import BertConfig
from cosmos_jax.models.denoiser import NOT_OF_THE_PAPER
from cosmos_jax.models.torch_files import load_torch_file
from cosmos_jax.models.weights import BERT_PREFIX
from cosmos_jax.run import Run
from cosmos_jax.runner import open_run

FIXTURE = Path(__file__).parent / "fixtures" / "official_tiny"

# The fixture's [MASK] is 3.
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[MASK]", "[SEP]")
PAD, UNK, CLS, MASK, SEP = range(5)
WORDS = (
    "a the one two some every river hill tree cloud bird horse child farmer baker king garden "
    "window letter lamp stone bridge road market winter summer morning night red green old "
    "young small tall quiet bright slow warm sees finds takes gives leaves carries makes hears "
    "under over near behind with and but then never"
).split()
VOCABULARY = (*SPECIAL, *WORDS)

BERT = BertConfig(
    vocab_size=60,
    hidden_size=32,
    num_layers=2,
    num_heads=4,
    intermediate_size=64,
    max_positions=14,
)

NUM_ROWS = {"train": 48, "valid": 11, "test": 10}


def write_encoder(directory: Path) -> Path:
    """A directory that `encoder.load` reads."""
    assert len(VOCABULARY) == BERT.vocab_size
    tensors = load_torch_file(FIXTURE / "autoencoder.pth")["encoder"]
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(BERT.to_huggingface()))
    (directory / "vocab.txt").write_text("\n".join(VOCABULARY))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    safetensors.numpy.save_file(
        {
            name.removeprefix(BERT_PREFIX): np.ascontiguousarray(tensor)
            for name, tensor in tensors.items()
            if name.startswith(BERT_PREFIX)
        },
        directory / "model.safetensors",
    )
    return directory


def sentence(rng: np.random.Generator, shortest: int, longest: int) -> str:
    return " ".join(rng.choice(WORDS, size=rng.integers(shortest, longest + 1)))


def write_texts(directory: Path, *, conditional: bool) -> Path:
    """Three splits of random sentences of 3 to 10 words, with sources of 2 to 8 words or none."""
    rng = np.random.default_rng(1)
    directory.mkdir()
    for split, count in NUM_ROWS.items():
        rows: list[dict[str, str]] = []
        for _ in range(count):
            text = sentence(rng, 3, 10)
            if conditional:
                rows.append({"source": sentence(rng, 2, 8), "target": text})
            else:
                rows.append({"text": text})
        write_rows(directory / f"{split}.jsonl", rows)
    return directory


def write_rows(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class Tiny:
    """Encoder and texts in one folder, made once for all tests."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.encoder = write_encoder(directory / "encoder")
        self.texts = write_texts(directory / "texts", conditional=False)
        self.pairs = write_texts(directory / "pairs", conditional=True)

    def config(self, data: Path | None = None, **fields) -> ConfigDict:
        """Fields as `section__name=value`; without `data` the texts without sources."""
        config = config_lib.base()
        config.update_from_flattened_dict(
            {
                "dtype": "float32",
                "encoder.name": str(self.encoder),
                "data.source": f"jsonl:{data or self.texts}",
                "data.directory": str(self.directory / "tfds"),
                "data.max_length": 12,
                "data.max_source_length": 10,
                "autoencoder.num_latents": 4,
                "autoencoder.num_layers": 1,
                "autoencoder.decompressor_layers": 1,
                "autoencoder.dropout": 0.0,
                "autoencoder.steps": 80,
                "diffusion.steps": 30,
                "diffusion.num_layers": 2,
                "diffusion.condition_layers": 1,
                "diffusion.sampler": "euler_sde",  # draws noise in every step
                "diffusion.num_sampling_steps": 3,
                # Ends while there is noise left, so that texts of so short a training differ.
                "diffusion.min_time": 0.6,
                "distillation.steps": 0,
                "distillation.num_sampling_steps": 2,
                "distillation.teacher_steps": 8,
                "distillation.ema_decay": 0.5,
                "autoregressive.steps": 30,
                "autoregressive.num_layers": 2,
                "masked.steps": 30,
                "masked.num_layers": 2,
                "masked.num_sampling_steps": 5,
                "generate.num_texts": 6,
                "generate.batch_size": 4,
                "evaluate.batch_size": 8,
                **{
                    f"{stage}.{name}": value
                    for stage in config_lib.TRAINED
                    for name, value in (
                        ("batch_size", 8),
                        *([("num_heads", 4)] if stage != "distillation" else []),
                        ("log_every", 10),
                        ("evaluate_every", 20),
                        ("checkpoint_every", 20),
                        ("optimizer.warmup_steps", 2),
                        ("optimizer.learning_rate", 5e-3),
                        ("optimizer.final_learning_rate", 5e-3),
                    )
                },
                # It begins where there is little to learn.
                "distillation.optimizer.learning_rate": 1e-3,
                "distillation.optimizer.final_learning_rate": 1e-3,
                **{name.replace("__", "."): value for name, value in fields.items()},
            }
        )
        return config

    def pairs_config(self, **fields) -> ConfigDict:
        """Conditional, guided, trained for it, and with all that is not the paper's."""
        guided = {"diffusion__guidance": 2.0, "diffusion__source_dropout_rate": 0.5}
        guided |= {f"diffusion__{part}": True for part in NOT_OF_THE_PAPER}
        return self.config(self.pairs, **{**guided, **fields})

    def save_config(self, path: Path, config: ConfigDict) -> str:
        """Writes a config for a command of its own; the flag that reads it."""
        path.write_text(config_lib.to_json(config))
        return f"--config={Path(__file__).parent / 'saved_config.py'}:{path}"

    def run(self, workdir: Path, data: Path | None = None, **fields) -> Run:
        """An opened run, for tests of what lies below `main`."""
        return open_run(self.config(data, **fields), workdir)


def assert_trees_equal(left, right) -> None:
    """Bit by bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    jax.tree.map(np.testing.assert_array_equal, left, right)
