"""Directories of small random BERTs and RoBERTas, written by transformers, to compare with it."""

import json
from pathlib import Path

import pytest

TEXTS = [
    "the quick brown fox jumps over the lazy dog",
    "A dog.",
    "naïve café, 3.14 and an unusually long sentence of which only the first words are read",
    "every river finds the sea; and no river knows it",
    "the lazy dog jumps over the quick brown fox",
]
SIZES = dict(
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    num_labels=3,
)
MAX_TOKENS = 24


def write(directory: Path, family: str, kind: str = "Model", **changes) -> Path:
    """A model of transformers, `family` Bert or Roberta, and a tokenizer of pieces of `TEXTS`."""
    torch = pytest.importorskip("torch", reason="PyTorch is the other side of this comparison")
    transformers = pytest.importorskip("transformers")
    directory.mkdir()
    vocab_size = {"Bert": _write_bert_tokenizer, "Roberta": _write_roberta_tokenizer}[family](
        directory
    )
    if family == "Roberta":
        changes = {"pad_token_id": 1, "type_vocab_size": 1, "layer_norm_eps": 1e-5, **changes}
    positions = MAX_TOKENS + (2 if family == "Roberta" else 0)
    config = getattr(transformers, f"{family}Config")(
        **{**SIZES, "vocab_size": vocab_size, "max_position_embeddings": positions, **changes}
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}{kind}")(config)
    with torch.no_grad():  # Initial biases are 0 and gains 1, which hides mistakes.
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(str(directory))
    return directory


def _write_config(directory: Path, kind: str, **tokens: str) -> None:
    config = {"tokenizer_class": kind, "model_max_length": MAX_TOKENS, **tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _write_bert_tokenizer(directory: Path) -> int:
    letters = sorted(set("".join(TEXTS).lower()) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "dog", "river", "quick", "##ly"]
    pieces += [*letters, *(f"##{letter}" for letter in letters)]
    (directory / "vocab.txt").write_text("\n".join(pieces), encoding="utf-8")
    _write_config(directory, "BertTokenizer")
    return len(pieces)


def _write_roberta_tokenizer(directory: Path) -> int:
    tokenizers = pytest.importorskip("tokenizers")
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        TEXTS, vocab_size=300, min_frequency=1, special_tokens=special, show_progress=False
    )
    tokenizer.post_processor = tokenizers.processors.RobertaProcessing(
        ("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=False
    )
    tokenizer.save_model(str(directory))
    tokenizer.save(str(directory / "tokenizer.json"))
    names = dict(bos="<s>", cls="<s>", pad="<pad>", eos="</s>", sep="</s>", unk="<unk>")
    tokens = {f"{name}_token": token for name, token in (names | {"mask": "<mask>"}).items()}
    _write_config(directory, "RobertaTokenizer", **tokens)
    return tokenizer.get_vocab_size()
