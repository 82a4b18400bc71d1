"""Our GPT-2 against transformers' PyTorch GPT-2 with the same weights, and its files."""

import functools
import hashlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from tiny_gpt2 import CONFIG, torch_names, write_model, write_tokenizer

from cosmos_jax import huggingface, language_model
from cosmos_jax.errors import UserError
from cosmos_jax.models.gpt2 import Gpt2, Gpt2Config, from_torch_names, logits


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is the other side of this comparison")


@functools.cache
def jitted(config, dtype):
    return jax.jit(Gpt2(config, dtype).apply)


def apply(config, params, ids, dtype=jnp.float32):
    return np.asarray(jitted(config, dtype)({"params": params}, ids))


@functools.cache
def tiny():
    config = Gpt2Config.from_huggingface(CONFIG)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (3, 13))
    return config, random_params(Gpt2(config), ids)["params"], ids


@pytest.fixture
def directory(tmp_path):
    """A language model of random weights, complete."""
    write_tokenizer(tmp_path, ["one good dog", "two bad cats"])
    write_model(tmp_path, tiny()[1])
    return tmp_path


@pytest.mark.parametrize(
    "changes",
    [{}, {"n_inner": 40, "n_layer": 1}, {"layer_norm_epsilon": 1e-2, "n_head": 1}],
    ids=["plain", "inner size", "epsilon"],
)
def test_states_logits_and_loss_are_those_of_torch(torch, tmp_path, changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**CONFIG, **changes})).eval()
    with torch.no_grad():  # Initial biases are 0 and gains 1, which hides mistakes.
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    theirs.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, ["some text"])
    model = language_model.load(str(tmp_path))
    ids = tiny()[2]
    with torch.no_grad():
        expected = theirs(torch.tensor(ids), labels=torch.tensor(ids), output_hidden_states=True)
    states = apply(model.config, model.params, ids)
    assert states.dtype == np.float32
    np.testing.assert_allclose(states, expected.hidden_states[-1].numpy(), atol=1e-5)
    scores = logits(model.params, states)
    np.testing.assert_allclose(scores, expected.logits.numpy(), atol=1e-5)
    likelihoods = np.asarray(jax.nn.log_softmax(scores[:, :-1]))
    chosen = np.take_along_axis(likelihoods, ids[:, 1:, None], axis=2)
    assert -chosen.mean() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_nothing_behind_a_token_reaches_it():
    config, params, ids = tiny()
    states = apply(config, params, ids)
    changed = ids.copy()
    changed[:, 7:] = 1 + changed[:, 7:] // 2
    np.testing.assert_array_equal(apply(config, params, changed)[:, :7], states[:, :7])
    assert np.abs(apply(config, params, changed)[:, 7:] - states[:, 7:]).min(axis=2).max() > 0
    np.testing.assert_allclose(apply(config, params, ids[1:2, :5])[0], states[1, :5], atol=1e-5)


def test_bfloat16_is_close_and_answers_in_float32():
    config, params, ids = tiny()
    rounded = apply(config, params, ids, dtype=jnp.bfloat16)
    assert rounded.dtype == np.float32
    assert 0 < np.abs(rounded - apply(config, params, ids)).max() < 0.1


def test_too_long_a_text():
    config, params, _ = tiny()
    with pytest.raises(UserError, match="41 tokens do not fit the language model, which has 40"):
        apply(config, params, np.ones((1, 41), int))


def test_prefixed_names_with_masks_and_a_head_read_alike():
    config, params, _ = tiny()
    tensors = torch_names(config, params)
    other = {f"transformer.{name}": tensor for name, tensor in tensors.items()}
    other |= {
        "lm_head.weight": tensors["wte.weight"],
        "transformer.h.0.attn.bias": np.tril(np.ones((1, 1, 40, 40))),
        "transformer.h.1.attn.masked_bias": np.array(-1e4),
    }
    for read in (from_torch_names(config, tensors), from_torch_names(config, other)):
        jax.tree.map(np.testing.assert_array_equal, read, params)


def test_weights_that_do_not_fit():
    config, params, _ = tiny()
    tensors = torch_names(config, params)
    name = "h.1.mlp.c_fc.weight"
    with pytest.raises(UserError, match=f"{name} is missing"):
        from_torch_names(config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match=r"has shape \[96, 24\], but its config asks for \[24, 96"):
        from_torch_names(config, {**tensors, name: tensors[name].T})
    with pytest.raises(UserError, match=r"h\.2\.ln_1\.bias has no place in a GPT-2 of 2 layers"):
        from_torch_names(config, {**tensors, "h.2.ln_1.bias": np.zeros(24)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gptj"}, "model_type is 'gptj'; only 'gpt2' will do"),
        ({"activation_function": "relu"}, "activation_function is 'relu'; only 'gelu_new'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "only False will do"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False; only True"),
        ({"n_embd": "24"}, "hidden_size is '24'; it must be a positive integer"),
        ({"n_inner": 0}, "intermediate_size is 0; it must be a positive integer"),
        ({"n_head": 5}, "24 cannot be divided among 5 heads"),
    ],
)
def test_configs_that_cannot_work(change, message):
    with pytest.raises(UserError, match=message):
        Gpt2Config.from_huggingface({**CONFIG, **change})


def test_a_config_without_a_size():
    with pytest.raises(UserError, match="n_layer is missing"):
        Gpt2Config.from_huggingface({k: v for k, v in CONFIG.items() if k != "n_layer"})


def test_loading_a_language_model(directory):
    model = language_model.load(str(directory))
    content = (directory / "model.safetensors").read_bytes()
    assert model.fingerprint == hashlib.sha256(content).hexdigest()
    assert model.tokenizer.bos_token_id == 0
    text = "Two bad dogs: naïve, 漢字!"
    assert model.tokenizer.decode(model.tokenizer(text)["input_ids"]) == text
    jax.tree.map(np.testing.assert_array_equal, model.params, tiny()[1])


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", json.dumps({**CONFIG, "n_layer": 3}), "h.2.ln_1.weight is missing"),
        ("config.json", json.dumps({**CONFIG, "vocab_size": 9}), "only 9 word embeddings"),
        ("config.json", json.dumps({**CONFIG, "model_type": "bert"}), "model_type is 'bert'"),
        ("model.safetensors", "garbage", "model.safetensors: is damaged"),
        ("tokenizer.json", None, "holds no tokenizer"),
    ],
)
def test_a_language_model_that_cannot_be_read(directory, file, content, message):
    if content is None:
        (directory / file).unlink()
    else:
        (directory / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        language_model.load(str(directory))
    assert str(caught.value).startswith(str(directory))
    assert str(caught.value).count(str(directory)) == 1


def test_names_of_no_language_model():
    with pytest.raises(UserError, match=r"language model '\.\./x': there is no such directory"):
        language_model.load("../x")
    with pytest.raises(
        UserError, match="language model 'a/b' is neither a directory nor"
    ) as caught:
        language_model.load("a/b")
    assert str(caught.value).endswith("into a directory and name that")


def test_shards_read_as_one_file(torch, directory):
    """The shards are those that transformers writes."""
    transformers = pytest.importorskip("transformers")
    whole = language_model.load(str(directory))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(str(directory))
    (directory / "model.safetensors").unlink()
    theirs.save_pretrained(directory, max_shard_size="20kB")
    shards = sorted(directory.glob("model-*.safetensors"))
    assert len(shards) > 1
    read = language_model.load(str(directory))
    jax.tree.map(np.testing.assert_array_equal, read.params, whole.params)
    content = b"".join(path.read_bytes() for path in shards)
    assert read.fingerprint == hashlib.sha256(content).hexdigest()
    shards[0].unlink()
    with pytest.raises(UserError, match="or all of its shards"):
        huggingface.read_tensors(directory)
