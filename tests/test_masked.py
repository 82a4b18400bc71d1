"""Masked diffusion: the model, what is masked, and the bound, by hand and against an entropy."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params

from cosmos_jax import config as config_lib
from cosmos_jax.models import masked
from cosmos_jax.models.masked import MaskedDenoiser
from cosmos_jax.stages import masked as masked_stage
from cosmos_jax.stages.base import row_keys
from cosmos_jax.unmasking import make_generator

CLS, SEP, UNK = 2, 4, 1


def config(**fields):
    """A tiny one; fields as `section__name=value`."""
    config = config_lib.base()
    config.dtype = "float32"
    config.encoder.update(
        dict(vocab_size=20, hidden_size=32, num_layers=1, num_heads=2, intermediate_size=32)
    )
    config.data.update(dict(max_length=8, max_source_length=5))
    config.masked.update(dict(num_layers=1, num_heads=2, num_sampling_steps=1_000))
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    return config


# The model


def network(conditional):
    """(module, params, inputs) of random weights."""
    rng = np.random.default_rng(1)
    inputs = [rng.integers(0, 21, (3, 8)).astype(np.int32)]
    if conditional:
        mask = np.arange(5) < np.array([5, 2, 3])[:, None]
        inputs += [rng.normal(size=(3, 5, 32)).astype(np.float32), mask]
    module = masked.build(config(data__conditional=conditional), 20).denoiser
    return module, random_params(module, *inputs), inputs


def test_size_at_that_of_the_paper():
    """Of the blocks 12 times 4 D^2 of attention and 3 x 4 D^2 of the MLP, and their norms."""
    model = masked.build(config_lib.base(), 28_996)
    params = jax.eval_shape(model.denoiser.init, jax.random.key(0), jnp.zeros((1, 128), jnp.int32))
    sizes = {
        name: sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(part))
        for name, part in params["params"].items()
    }
    assert sizes.pop("words") == 28_997 * 768
    assert sizes.pop("head") == 28_996 * 768
    assert sum(sizes.values()) == 12 * (16 * 768**2 + 2 * 768) + 768


@pytest.mark.parametrize("conditional", [False, True])
def test_every_token_of_a_text_matters_to_it_alone(conditional):
    module, params, inputs = network(conditional)
    apply = jax.jit(module.apply)
    logits = apply(params, *inputs)
    assert logits.shape == (3, 8, 20)
    assert logits.dtype == jnp.float32
    for position in (0, 7):
        rows = inputs[0].copy()
        rows[1, position] = (rows[1, position] + 1) % 21
        changed = apply(params, rows, *inputs[1:])
        np.testing.assert_array_equal(changed[0::2], logits[0::2])
        # Attention looks both ways.
        assert (np.abs(changed[1] - logits[1]).max(axis=-1) > 1e-4).all()


def test_padding_of_the_source_is_never_seen():
    module, params, (rows, states, mask) = network(True)
    apply = jax.jit(module.apply)
    logits = apply(params, rows, states, mask)
    garbage = np.where(mask[..., None], states, 1e3)
    np.testing.assert_array_equal(apply(params, rows, garbage, mask), logits)
    assert np.abs(apply(params, rows, -states, mask) - logits).max() > 1e-3


def test_dropout_is_that_of_each_text():
    module, params, (rows,) = network(False)
    keys = jax.random.split(jax.random.key(0), 3)

    def hidden(rows, keys):
        return module.apply(params, rows, None, None, keys, method="hidden")

    dropped = hidden(rows, keys)
    assert np.abs(dropped - hidden(rows, None)).max() > 1e-2
    np.testing.assert_allclose(hidden(rows[1:2], keys[1:2])[0], dropped[1], atol=1e-5)
    same = hidden(np.repeat(rows[:1], 3, axis=0), keys)
    assert np.abs(same[0] - same[1]).max() > 1e-2
    without = MaskedDenoiser(module.config, 20, 0.0)
    kept = without.apply(params, rows, None, None, keys, method="hidden")
    np.testing.assert_allclose(kept, hidden(rows, None), atol=1e-5)


# What is masked


def test_every_number_of_masks_is_as_likely_and_then_every_place():
    length, count = 4, 40_000
    hidden, weight = map(
        np.asarray, masked_stage.corrupt(jax.random.split(jax.random.key(0), count), length)
    )
    assert not hidden[:, 0].any()
    number = hidden.sum(axis=1)
    # t ~ U[0, 1] makes the number uniform, and given it all places are alike.
    patterns = np.bincount(hidden[:, 1:] @ np.array([4, 2, 1]), minlength=8) / count
    for pattern, share in enumerate(patterns):
        expected = 1 / 4 / math.comb(3, pattern.bit_count())
        assert abs(share - expected) < 5 * math.sqrt(expected * (1 - expected) / count)
    np.testing.assert_allclose(weight[number > 0], 4 / number[number > 0])


# The bound


class Known:
    """Stands for the model: logits from a function of the rows that it is given."""

    conditional = False

    def __init__(self, mask_row, answer):
        self.mask_row, self.answer = mask_row, answer

    def hidden(self, params, rows, condition, condition_mask, dropout_keys):
        assert condition is None
        assert condition_mask is None
        noise = 0.0 if dropout_keys is None else params["dropout"]
        return self.answer(rows) + noise

    def logits(self, params, hidden):
        return hidden


def test_loss_by_hand():
    vocabulary = np.array([UNK, CLS, SEP, 6, 8], np.int32)
    index = np.zeros(10, np.int32)  # that of [UNK]
    index[vocabulary] = np.arange(5)
    frozen = {"head_index": jnp.array(index), "end": jnp.int32(SEP)}
    rng = np.random.default_rng(2)
    # Token 7 has no row. The last text is padding of the batch.
    ids = np.array([[2, 6, 4, 0, 0, 0], [2, 8, 6, 7, 8, 4], [2, 6, 8, 4, 0, 0], [2, 8, 4, 0, 0, 0]])
    mask = np.arange(6) < np.array([[3], [6], [4], [3]])
    batch = {"ids": ids, "mask": mask, "rows": np.array([5, 0, 9, 9])}
    batch["real"] = np.array([True, True, True, False])
    table = rng.normal(size=(6, 6, 5)).astype(np.float32)
    noise = rng.normal(size=(6, 5)).astype(np.float32)
    params = {"dropout": jnp.asarray(noise)}

    def answer(rows):
        return jnp.asarray(table)[rows, jnp.arange(6)] + jnp.mean(rows, axis=1)[:, None, None]

    model = Known(5, answer)
    stage = masked_stage.make(config(), model, frozen, {}, "")
    key = jax.random.key(4)
    keys = jax.vmap(jax.random.split)(row_keys(key, batch["rows"]))[:, 0]
    hidden, _ = map(np.asarray, masked_stage.corrupt(keys, 6))
    rows = np.array(
        [[1, 3, 2, 2, 2, 2], [1, 4, 3, 0, 4, 2], [1, 3, 4, 2, 2, 2], [1, 4, 2, 2, 2, 2]]
    )

    def bound(added, texts):
        total = 0.0
        for b in texts:
            given = np.where(hidden[b], 5, rows[b])
            for position in np.flatnonzero(hidden[b]):
                logits = table[given[position], position] + given.mean() + added[position]
                crossentropy = np.log(np.exp(logits).sum()) - logits[rows[b, position]]
                total += crossentropy * 6 / hidden[b].sum()
        return total

    found, weight = jax.jit(stage.losses)(params, frozen, batch, key)["loss"]
    assert weight == 2 + 5 + 3 + 2
    np.testing.assert_allclose(found, bound(noise, range(4)), rtol=1e-5)
    found, weight = jax.jit(stage.validation)(params, frozen, batch, key)["loss"]
    assert weight == 2 + 5 + 3
    np.testing.assert_allclose(found, bound(0 * noise, range(3)), rtol=1e-5)


def test_the_bound_of_a_perfect_denoiser_is_the_entropy():
    """Whatever order tokens come in, the factors of the chain rule multiply to p(x)."""
    num_tokens, count = 3, 4_000
    texts = list(itertools.product(range(num_tokens), repeat=3))
    p = np.random.default_rng(3).gamma(0.7, size=(num_tokens,) * 3)
    p /= p.sum()
    table = np.full((num_tokens + 1,) * 3 + (3, num_tokens), 0.0)
    for state in itertools.product(range(num_tokens + 1), repeat=3):
        joint = p[tuple(slice(None) if v == num_tokens else slice(v, v + 1) for v in state)]
        for at in np.flatnonzero(np.array(state) == num_tokens):
            others = tuple(i for i in range(3) if i != at)
            table[state][at] = np.log(joint.sum(axis=others) / joint.sum())
    logits = jnp.asarray(table, jnp.float32)
    model = Known(num_tokens, lambda r: jnp.pad(logits[r[:, 1], r[:, 2], r[:, 3]], PAD_FIRST))
    frozen = {"head_index": jnp.arange(num_tokens), "end": jnp.int32(0)}
    stage = masked_stage.make(config(), model, frozen, {}, "")

    @jax.jit
    @jax.vmap
    def bound(ids, key):
        batch = {"ids": ids[None], "mask": jnp.ones((1, 4), bool), "rows": jnp.zeros(1, int)}
        batch["real"] = jnp.ones(1, bool)
        total, weight = stage.validation({}, frozen, batch, key)["loss"]
        return total / weight

    ids = np.repeat([(0, *text) for text in texts], count, axis=0)
    keys = jax.random.split(jax.random.key(6), len(ids))
    bounds = 3 * np.asarray(bound(ids, keys), float).reshape(len(texts), count)
    error = bounds.std(axis=1) / math.sqrt(count)
    probability = p.ravel()
    assert (np.abs(bounds.mean(axis=1) + np.log(probability)) < 5 * error).all()
    entropy = -(probability * np.log(probability)).sum()
    tolerance = 5 * math.sqrt(((probability * error) ** 2).sum())
    assert tolerance < 0.03 * entropy
    assert abs(probability @ bounds.mean(axis=1) - entropy) < tolerance


PAD_FIRST = ((0, 0), (1, 0), (0, 0))  # a position for [CLS], which is never asked for


# Training


def train(stage, frozen, batch, steps):
    """Parameters after some steps of Adam on one batch."""
    params = jax.jit(stage.init)(jax.random.key(0), frozen)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            total, weight = stage.losses(params, frozen, batch, key)["loss"]
            return total / weight

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), steps):
        params, state = step(params, state, key)
    return params


def bound_of(stage, params, frozen, batch, count=20):
    """The validation loss, over several keys."""
    batch = {**batch, "real": np.ones(len(batch["ids"]), bool)}
    validate = jax.jit(stage.validation)
    keys = jax.random.split(jax.random.key(7), count)
    sums = [validate(params, frozen, batch, key)["loss"] for key in keys]
    return sum(float(total) for total, _ in sums) / sum(float(weight) for _, weight in sums)


TEXTS = np.array([[2, 6, 7, 8, 4, 0, 0, 0], [2, 9, 10, 11, 12, 13, 14, 4]], np.int32)


def test_two_texts_are_learned_with_their_lengths():
    fields = config(masked__dropout=0.0)
    model = masked.build(fields, 20)
    frozen = {"head_index": jnp.arange(20), "end": jnp.int32(SEP), "start": jnp.int32(CLS)}
    stage = masked_stage.make(fields, model, frozen, {}, "")
    ids = np.tile(TEXTS, (8, 1))
    batch = {"ids": ids, "mask": ids > 0, "rows": np.arange(16)}
    untrained = bound_of(stage, jax.jit(stage.init)(jax.random.key(0), frozen), frozen, batch)
    params = train(stage, frozen, batch, 250)
    # Which of the two it is are ln 2 nats, in 5.5 tokens; less it cannot be.
    assert math.log(2) / 5.5 < bound_of(stage, params, frozen, batch) < 0.1 * untrained
    weights = {**frozen, **params, "vocabulary": jnp.arange(20)}
    generate = jax.jit(make_generator(fields, model))
    written = np.asarray(generate(weights, jax.random.split(jax.random.key(2), 64), None))
    expected = np.where(TEXTS > 0, TEXTS, SEP)
    matches = (written[:, None] == expected).all(axis=-1)
    # Hardly two tokens come in one of so many steps, where they would not know of each other.
    assert matches.any(axis=1).mean() > 0.6
    assert (matches.mean(axis=0) > 0.2).all()


def test_the_source_says_which_text_it_is():
    fields = config(masked__dropout=0.1, data__conditional=True)
    model = masked.build(fields, 20)
    source_ids = np.array([[2, 15, 16, 4, 0], [2, 17, 4, 0, 0]], np.int32)
    bert = random_params(model.bert, source_ids, source_ids > 0)["params"]
    frozen = {"head_index": jnp.arange(20), "end": jnp.int32(SEP), "bert": bert}
    frozen |= {"states_mean": jnp.zeros(32), "states_std": jnp.ones(32)}
    stage = masked_stage.make(fields, model, frozen, {}, "")
    ids, source_ids = np.tile(TEXTS, (8, 1)), np.tile(source_ids, (8, 1))
    tokens = {"ids": ids, "mask": ids > 0, "rows": np.arange(16)}
    tokens |= {"source_ids": source_ids, "source_mask": source_ids > 0}
    batch = jax.jit(stage.features)(frozen, tokens)
    assert stage.features(frozen, batch) is batch
    params = train(stage, frozen, batch, 250)
    right = bound_of(stage, params, frozen, batch)
    assert right < math.log(2) / 5.5  # which no model reaches that is not told
    swapped = {**batch, "source_states": jnp.flip(batch["source_states"], 0)}
    swapped["source_mask"] = jnp.flip(batch["source_mask"], 0)
    assert bound_of(stage, params, frozen, swapped) > 10 * right
