"""Our BERT against transformers' PyTorch BERT and RoBERTa with the same weights."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util
from random_params import random_params

from cosmos_jax import encoder
from cosmos_jax.errors import UserError
from cosmos_jax.models import bert
from cosmos_jax.models.bert import (
    Bert,
    BertConfig,
    RobertaConfig,
    from_torch_names,
)

TINY = dict(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=20,
)
TEXTS = [
    "It was a bright cold day in April, and the clocks were striking thirteen.",
    "No.",
    "Alice was beginning to get very tired of sitting by her sister on the bank, and of having"
    " nothing to do: once or twice she had peeped into the book her sister was reading, but it had"
    " no pictures or conversations in it, “and what is the use of a book,” thought Alice"
    " “without pictures or conversations?”",
    "Ünïcode — 漢字, emoji 🙂 and number 3.14159!",
]


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="PyTorch is the other side of this comparison")


@pytest.fixture(scope="module")
def minilm():
    if importlib.util.find_spec(encoder.MINILM_PACKAGE) is None:
        pytest.skip(f"real weights are needed: {encoder.MINILM_INSTALL}")
    return encoder.load("minilm")


@functools.cache
def jitted(config, dtype):
    return jax.jit(Bert(config, dtype).apply)


def apply(config, params, ids, mask, dtype=jnp.float32):
    return np.asarray(jitted(config, dtype)({"params": params}, ids, mask))


def tiny_torch_bert(torch, family="Bert", **changes):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**TINY, **changes})
    model = getattr(transformers, f"{family}Model")(config, add_pooling_layer=True).eval()
    with torch.no_grad():  # Initial biases are 0 and gains 1, which hides mistakes.
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return model, config


def random_tokens(seed: int, rows: int = 3, length: int = 11):
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, TINY["vocab_size"], (rows, length))
    mask = np.arange(length) < np.array([length, 5, 1])[:, None]
    return ids, mask


def test_real_weights_on_real_text(torch, minilm, monkeypatch):
    import transformers

    directory = str(encoder._minilm_directory())
    theirs = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False).eval()

    def largest_difference(ids, mask):
        with torch.no_grad():
            expected = theirs(torch.tensor(ids), attention_mask=torch.tensor(mask))
        ids, real = np.asarray(ids), np.asarray(mask, dtype=bool)
        actual = apply(minilm.config, minilm.params, ids, real)
        assert actual.dtype == np.float32
        return np.abs(actual - expected.last_hidden_state.numpy())[real].max()

    padded = minilm.tokenizer(TEXTS, padding="max_length", max_length=96)
    assert largest_difference(padded["input_ids"], padded["attention_mask"]) < 1e-5
    for text in TEXTS[1:3]:
        alone = minilm.tokenizer([text])
        assert largest_difference(alone["input_ids"], alone["attention_mask"]) < 1e-5


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu"])
def test_random_weights_with_every_activation(torch, activation):
    model, config = tiny_torch_bert(torch, hidden_act=activation, layer_norm_eps=1e-5)
    ours = BertConfig.from_huggingface(config.to_dict())
    assert ours.activation == activation
    assert ours.layer_norm_eps == 1e-5
    params = from_torch_names(ours, {k: v.numpy() for k, v in model.state_dict().items()})
    ids, mask = random_tokens(0)
    with torch.no_grad():
        output = model(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    actual = apply(ours, params, ids, mask)
    np.testing.assert_allclose(actual[mask], output.last_hidden_state.numpy()[mask], atol=1e-5)


@pytest.mark.parametrize("padding", [1, 3])
@pytest.mark.parametrize("prefix", ["", "roberta."])
def test_roberta_with_random_weights(torch, padding, prefix):
    model, config = tiny_torch_bert(
        torch, "Roberta", pad_token_id=padding, type_vocab_size=1, layer_norm_eps=1e-5
    )
    ours = BertConfig.from_huggingface(config.to_dict())
    assert isinstance(ours, RobertaConfig)
    assert ours.max_positions == TINY["max_position_embeddings"] - padding - 1
    state = {prefix + name: tensor.numpy() for name, tensor in model.state_dict().items()}
    params = from_torch_names(ours, state)
    # As long as it can be; and no word is the padding, which it tells by its id.
    ids, mask = random_tokens(2, length=ours.max_positions)
    ids = np.where(mask, np.where(ids == padding, padding + 1, ids), padding)
    with torch.no_grad():
        output = model(torch.tensor(ids), attention_mask=torch.tensor(mask).long())
    actual = apply(ours, params, ids, mask)
    np.testing.assert_allclose(actual[mask], output.last_hidden_state.numpy()[mask], atol=1e-5)
    with pytest.raises(UserError, match=f"which has {ours.max_positions} positions"):
        apply(ours, params, np.pad(ids, ((0, 0), (0, 1))), np.pad(mask, ((0, 0), (0, 1))))


def test_roberta_runs_wherever_a_bert_is_built_from_its_sizes():
    config, params, ids, mask = tiny()
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(BertConfig)}
    roberta = RobertaConfig(**fields, first_position=5)
    tensors = torch_names(config, params)
    name = "embeddings.position_embeddings.weight"
    tensors[name] = np.concatenate([np.full((5, 24), np.nan), tensors[name]])
    read = from_torch_names(roberta, tensors)
    np.testing.assert_array_equal(apply(config, read, ids, mask), apply(config, params, ids, mask))
    with pytest.raises(UserError, match=r"has shape \[25, 24\], but its config asks for \[20, 24"):
        from_torch_names(config, tensors)


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_what_we_write_says_the_same_to_transformers_and_to_us(model_type):
    transformers = pytest.importorskip("transformers")
    written = {**TINY, "model_type": model_type, "pad_token_id": 4, "layer_norm_eps": 1e-5}
    sizes = BertConfig.from_huggingface(written)
    assert BertConfig.from_huggingface(sizes.to_huggingface()) == sizes
    theirs = transformers.AutoConfig.for_model(**sizes.to_huggingface())
    assert (theirs.model_type, theirs.max_position_embeddings) == (model_type, 20)
    assert model_type == "bert" or theirs.pad_token_id == 4


@functools.cache
def tiny():
    config = BertConfig.from_huggingface(TINY)
    ids, mask = random_tokens(1)
    return config, random_params(Bert(config), ids, mask)["params"], ids, mask


def test_padding_and_neighbours_never_matter():
    config, params, ids, mask = tiny()
    states = apply(config, params, ids, mask)
    other = np.where(mask, ids, 7)
    other[1] = np.where(mask[1], 3, other[1])
    changed = apply(config, params, other, mask)
    for row in (0, 2):
        np.testing.assert_array_equal(changed[row][mask[row]], states[row][mask[row]])
    alone = apply(config, params, ids[1:2, :5], mask[1:2, :5])
    np.testing.assert_allclose(alone[0], states[1, :5], atol=1e-5)


def test_bfloat16_is_close_and_answers_in_float32():
    config, params, ids, mask = tiny()
    exact = apply(config, params, ids, mask)
    rounded = apply(config, params, ids, mask, dtype=jnp.bfloat16)
    assert rounded.dtype == np.float32
    error = np.abs(rounded - exact)[mask].max()
    assert 0 < error < 0.1


def test_too_long_a_text():
    config, params, *_ = tiny()
    with pytest.raises(UserError, match="21 tokens do not fit the encoder, which has 20"):
        apply(config, params, np.ones((1, 21), int), np.ones((1, 21), bool))


def torch_names(config, params):
    """Tensors under PyTorch's names, by the table that the comparison with PyTorch has checked."""
    flat = traverse_util.flatten_dict(params)
    return {
        theirs: np.asarray(flat[ours]).T if ours[-1] == "kernel" else np.asarray(flat[ours])
        for ours, (theirs, _) in bert._renames(config).items()
    }


def test_old_and_prefixed_names_read_alike():
    config, params, *_ = tiny()
    tensors = torch_names(config, params)
    old = {
        "bert." + name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): t
        for name, t in tensors.items()
    }
    old |= {"bert.embeddings.position_ids": np.arange(20), "bert.pooler.dense.bias": np.zeros(2)}
    old |= {"cls.predictions.bias": np.zeros(2)}
    for read in (from_torch_names(config, tensors), from_torch_names(config, old)):
        jax.tree.map(np.testing.assert_array_equal, read, jax.tree.map(np.asarray, params))


def test_weights_that_do_not_fit():
    config, params, *_ = tiny()
    tensors = torch_names(config, params)
    name = "encoder.layer.1.intermediate.dense.weight"
    with pytest.raises(UserError, match=f"{name} is missing"):
        from_torch_names(config, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match=r"has shape \[24, 40\], but its config asks for \[40, 24"):
        from_torch_names(config, {**tensors, name: tensors[name].T})
    extra = "encoder.layer.2.output.dense.bias"
    with pytest.raises(UserError, match=f"{extra} has no place in a BERT of 2 layers"):
        from_torch_names(config, {**tensors, extra: np.zeros(24)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt2"}, "only 'bert' and 'roberta' will do"),
        (
            {"model_type": "roberta", "pad_token_id": 30},
            "max_positions is 0; it must be a positive",
        ),
        ({"position_embedding_type": "relative_key"}, "only 'absolute' will do"),
        ({"is_decoder": True}, "is a decoder"),
        ({"hidden_act": "swish"}, "activation 'swish' is not supported"),
        ({"hidden_size": 0}, "hidden_size is 0; it must be a positive integer"),
        ({"hidden_size": "24"}, "must be a positive integer"),
        ({"num_attention_heads": 5}, "24 cannot be divided among 5 heads"),
        ({"num_hidden_layers": None}, "must be a positive integer"),
    ],
)
def test_configs_that_cannot_work(change, message):
    with pytest.raises(UserError, match=message):
        BertConfig.from_huggingface({**TINY, **change})


def test_a_config_without_a_size():
    with pytest.raises(UserError, match="vocab_size is missing"):
        BertConfig.from_huggingface({k: v for k, v in TINY.items() if k != "vocab_size"})
