"""The autoregressive baseline against transformers' GPT-2, its loss by hand, and its training."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny as tiny_texts
from random_params import random_params
from tiny import CLS, PAD, SEP, UNK, VOCABULARY

from cosmos_jax import config as config_lib
from cosmos_jax.data import tokens
from cosmos_jax.models import autoregressive
from cosmos_jax.models.autoregressive import Decoder, DecoderConfig
from cosmos_jax.models.cosmos import inverse_vocabulary
from cosmos_jax.stages.autoregressive import make

SIZES = dict(width=24, num_heads=4, num_layers=2, max_length=13, vocab_size=50)
B, T, S = 3, 9, 7


def make_decoder(conditional=False, **fields):
    config = DecoderConfig(**{**SIZES, "dropout": 0.0, "conditional": conditional, **fields})
    decoder = Decoder(config)
    return decoder, random_params(decoder, *inputs(conditional))["params"]


def inputs(conditional):
    rng = np.random.default_rng(0)
    rows = rng.integers(0, SIZES["vocab_size"], (B, T))
    if not conditional:
        return (rows,)
    states = rng.normal(size=(B, S, SIZES["width"])).astype(np.float32)
    return rows, states, np.arange(S) < np.array([[7], [2], [4]])


def logits(decoder, params, *inputs):
    return np.asarray(jax.jit(decoder.apply)({"params": params}, *inputs))


def torch_tensors(params, num_heads):
    """Our parameters under the names of PyTorch's GPT-2, of which each kind stands together."""

    def by_kind(x, kinds):
        *rest, width = x.shape
        heads = x.reshape(*rest, num_heads, kinds, width // kinds // num_heads)
        return np.moveaxis(heads, -2, -3).reshape(x.shape)

    tensors = {"wte.weight": params["words"], "wpe.weight": params["positions"]}

    def put(theirs, ours, kinds=1):
        for name, tensor in ours.items():
            name = {"scale": "weight", "kernel": "weight"}.get(name, name)
            tensors[f"{theirs}.{name}"] = by_kind(tensor, kinds)

    put("ln_f", params["norm"])
    for i in range(SIZES["num_layers"]):
        layer = params[f"layers_{i}"]
        put(f"h.{i}.ln_1", layer["attention_norm"])
        put(f"h.{i}.attn.c_attn", layer["query_key_value"], kinds=3)
        put(f"h.{i}.attn.c_proj", layer["attention_out"])
        put(f"h.{i}.ln_2", layer["mlp_norm"])
        put(f"h.{i}.mlp.c_fc", layer["up"])
        put(f"h.{i}.mlp.c_proj", layer["down"])
        if "cross_query" in layer:
            put(f"h.{i}.ln_cross_attn", layer["cross_norm"])
            put(f"h.{i}.crossattention.q_attn", layer["cross_query"])
            put(f"h.{i}.crossattention.c_attn", layer["cross_key_value"], kinds=2)
            put(f"h.{i}.crossattention.c_proj", layer["cross_out"])
    return tensors


def torch_gpt2(params, conditional=False):
    """transformers' GPT-2 with these parameters."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=SIZES["vocab_size"],
        n_embd=SIZES["width"],
        n_layer=SIZES["num_layers"],
        n_head=SIZES["num_heads"],
        n_positions=SIZES["max_length"],
        add_cross_attention=conditional,
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    tensors = {
        name: torch.tensor(np.asarray(tensor))
        for name, tensor in torch_tensors(params, SIZES["num_heads"]).items()
    }
    result = model.transformer.load_state_dict(tensors, strict=True)
    assert not result.missing_keys
    assert not result.unexpected_keys
    return model


@pytest.mark.parametrize("conditional", [False, True])
def test_logits_are_those_of_torch(conditional):
    torch = pytest.importorskip("torch")
    decoder, params = make_decoder(conditional)
    given = inputs(conditional)
    theirs = torch_gpt2(params, conditional)
    source = {}
    if conditional:
        norm = params["source_norm"]
        states = torch.nn.functional.layer_norm(
            torch.tensor(given[1]),
            (SIZES["width"],),
            torch.tensor(norm["scale"]),
            torch.tensor(norm["bias"]),
        )
        source = dict(encoder_hidden_states=states, encoder_attention_mask=torch.tensor(given[2]))
    with torch.no_grad():
        expected = theirs(torch.tensor(given[0]), **source).logits.numpy()
    found = logits(decoder, params, *given)
    assert found.dtype == np.float32
    assert expected.std() > 0.5
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("conditional", [False, True])
def test_nothing_behind_a_token_reaches_it(conditional):
    decoder, params = make_decoder(conditional)
    rows, *source = inputs(conditional)
    whole = logits(decoder, params, rows, *source)
    changed = rows.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % SIZES["vocab_size"]
    other = logits(decoder, params, changed, *source)
    np.testing.assert_array_equal(other[:, :5], whole[:, :5])
    assert np.abs(other[:, 5:] - whole[:, 5:]).max(axis=-1).min() > 1e-3


def test_padding_of_a_source_does_not_matter():
    decoder, params = make_decoder(conditional=True)
    rows, states, mask = inputs(True)
    whole = logits(decoder, params, rows, states, mask)
    changed = np.where(mask[..., None], states, 3 * states + 1)
    np.testing.assert_array_equal(logits(decoder, params, rows, changed, mask), whole)
    alone = logits(decoder, params, rows[1:2], states[1:2, :2], mask[1:2, :2])
    np.testing.assert_allclose(alone[0], whole[1], atol=1e-5)
    seen = logits(decoder, params, rows, states + 0.1 * mask[..., None] * states[:, :1], mask)
    assert np.abs(seen - whole).max(axis=(1, 2)).min() > 1e-3


def test_initial_weights_are_those_of_gpt2():
    decoder = Decoder(DecoderConfig(**{**SIZES, "width": 96, "num_layers": 8, "conditional": True}))
    states, mask = np.zeros((1, 2, 96), np.float32), np.ones((1, 2), bool)
    params = decoder.init(jax.random.key(0), np.zeros((1, 3), int), states, mask)["params"]
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, parent = path[-1].key, path[-2].key if len(path) > 1 else ""
        if name == "scale":
            np.testing.assert_array_equal(leaf, 1)
        elif name == "bias":
            np.testing.assert_array_equal(leaf, 0)
        else:
            residual = parent in ("attention_out", "cross_out", "down")
            std = 0.02 / 4 if residual else 0.02
            assert abs(leaf.std() / std - 1) < 6 / np.sqrt(2 * leaf.size), path


def test_dropout_is_of_a_text_and_needs_keys():
    decoder, params = make_decoder(dropout=0.3)
    (rows,) = inputs(False)
    keys = jax.random.split(jax.random.key(1), B)

    def dropped(order):
        order = np.array(order)
        return logits(decoder, params, rows[order], None, None, keys[order])

    whole, plain = dropped([0, 1, 2]), logits(decoder, params, rows)
    np.testing.assert_array_equal(plain, logits(make_decoder()[0], params, rows))
    np.testing.assert_allclose(dropped([2, 0]), whole[[2, 0]], atol=1e-5)
    assert np.abs(whole - plain).max(axis=(1, 2)).min() > 0.1


@pytest.mark.parametrize("conditional", [False, True])
def test_rematerialising_changes_no_gradient(conditional):
    given = inputs(conditional)

    def gradient(remat):
        decoder, params = make_decoder(conditional, remat=remat)
        return jax.jit(jax.grad(lambda p: jnp.sum(decoder.apply({"params": p}, *given) ** 2)))(
            params
        )

    plain, remat = gradient(False), gradient(True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-3), plain, remat)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(plain))


# The stage

SAYABLE = np.array([PAD, UNK, CLS, SEP, *range(7, 60)], np.int32)  # 5 and 6 cannot be said


def make_stage(tiny, conditional):
    """The stage on the tiny texts, with what it is given; the encoder is a random one."""
    config = tiny.config(
        tiny.pairs if conditional else None,
        autoregressive__num_layers=2,
        autoregressive__num_heads=4,
        autoregressive__dropout=0.1,
        data__conditional=conditional,
    )
    config.encoder.update({k: v for k, v in vars(tiny_texts.BERT).items() if k in config.encoder})
    model = autoregressive.build(config, len(SAYABLE))
    width = config.encoder.hidden_size
    frozen = {
        "vocabulary": jnp.array(SAYABLE),
        "head_index": jnp.array(inverse_vocabulary(SAYABLE, len(VOCABULARY), UNK)),
        "bert": random_params(model.bert, np.zeros((1, 4), int), np.ones((1, 4), bool))["params"],
        "states_mean": jnp.full(width, 0.1),
        "states_std": jnp.full(width, 1.5),
    }
    return config, model, make(config, model, frozen, {}, "data")


def read_batch(tiny, config, conditional, count=16):
    texts = tiny_texts.read_rows((tiny.pairs if conditional else tiny.texts) / "train.jsonl")
    texts = texts[:count]

    def encode(field, length):
        rows = [[VOCABULARY.index(word) for word in row[field].split()] for row in texts]
        found = np.full((count, length), PAD, np.int32)
        for i, row in enumerate(rows):
            row = [CLS, *row[: length - 2], SEP]
            found[i, : len(row)] = row
        return found, found != PAD

    names = ("target", "source") if conditional else ("text",)
    ids, mask = encode(names[0], config.data.max_length)
    batch = {"ids": ids, "mask": mask, "rows": np.arange(count)}
    if conditional:
        ids, mask = encode("source", config.data.max_source_length)
        batch |= {"source_ids": ids, "source_mask": mask}
    return batch


def test_the_tokens_of_the_batch_are_those_of_the_tokenizer(tiny):
    """The batches here are made by hand, so that no data set need be prepared."""
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(tiny.encoder))
    rows = tiny_texts.read_rows(tiny.texts / "train.jsonl")[:16]
    encoded = tokens.encode(tokenizer, [row["text"] for row in rows], 12)
    batch = read_batch(tiny, tiny.config(), False)
    np.testing.assert_array_equal(encoded.ids_BxL, batch["ids"])
    np.testing.assert_array_equal(encoded.mask_BxL, batch["mask"])


@pytest.mark.parametrize("conditional", [False, True])
def test_validation_by_hand(tiny, conditional):
    config, model, stage = make_stage(tiny, conditional)
    batch = read_batch(tiny, config, conditional, 6)
    batch["real"] = np.arange(6) < 5
    features = jax.jit(stage.features)(stage.frozen, batch)
    assert ("source_states" in features) is conditional
    assert stage.features(stage.frozen, features).keys() == features.keys()
    shapes = stage.init(jax.random.key(0), stage.frozen)["decoder"]
    rng = np.random.default_rng(0)
    params = {
        "decoder": jax.tree.map(lambda p: p + 0.2 * rng.normal(size=p.shape).astype("f4"), shapes)
    }
    sums = jax.jit(stage.validation)(params, stage.frozen, features, jax.random.key(0))
    losses, hits = [], []
    to_row = {token: row for row, token in enumerate(SAYABLE)}
    unknown = to_row[UNK]
    for b in range(5):
        length = batch["mask"][b].sum()
        ids = batch["ids"][b, :length]
        rows = [to_row.get(token, unknown) for token in ids]
        source = ()
        if conditional:
            source = (features["source_states"][b : b + 1], batch["source_mask"][b : b + 1])
        scores = logits(model.decoder, params["decoder"], np.array([rows]), *source)[0].astype(
            float
        )
        for position in range(length - 1):
            now = scores[position]
            losses.append(np.log(np.exp(now).sum()) - now[rows[position + 1]])
            hits.append(SAYABLE[now.argmax()] == ids[position + 1])
        assert ids[-1] == SEP
    assert float(sums["loss"][1]) == float(sums["token_accuracy"][1]) == len(losses)
    np.testing.assert_allclose(float(sums["loss"][0]), np.sum(losses), rtol=1e-5)
    assert float(sums["token_accuracy"][0]) == np.sum(hits)
    assert not {5, 6}.isdisjoint(batch["ids"][:5].ravel()), "a token that cannot be said is there"


@pytest.mark.parametrize("conditional", [False, True])
def test_training_lowers_the_loss(tiny, conditional):
    config, _, stage = make_stage(tiny, conditional)
    batch = read_batch(tiny, config, conditional)
    features = jax.jit(stage.features)(stage.frozen, batch)
    params = jax.jit(stage.init)(jax.random.key(0), stage.frozen)
    optimizer = optax.adam(1e-2)
    state = optimizer.init(params)

    @jax.jit
    def update(params, state, key):
        def objective(params):
            total, weight = stage.losses(params, stage.frozen, features, key)["loss"]
            return total / weight

        updates, state = optimizer.update(jax.grad(objective)(params), state)
        return optax.apply_updates(params, updates), state

    def validate(params):
        real = {**features, "real": np.ones(16, bool)}
        sums = jax.jit(stage.validation)(params, stage.frozen, real, jax.random.key(0))
        return {name: float(total / weight) for name, (total, weight) in sums.items()}

    before = validate(params)
    assert before["loss"] == pytest.approx(np.log(len(SAYABLE)), abs=0.1)
    for i in range(60):
        params, state = update(params, state, jax.random.key(i))
    after = validate(params)
    assert after["loss"] < 0.5 * before["loss"]
    assert after["token_accuracy"] > before["token_accuracy"] + 0.3


def test_the_sizes_are_those_of_the_config():
    config = config_lib.base()
    config.data.conditional = True
    config.autoregressive.remat = True
    decoder = autoregressive.build(config, 1_234).decoder
    assert decoder.config == DecoderConfig(768, 12, 12, 128, 1_234, True, 0.1, True)
    assert decoder.dtype == jnp.bfloat16
