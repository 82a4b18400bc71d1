"""Decoding against loops without a cache, exhaustive search and transformers' beam search."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params
from test_autoregressive import SIZES, torch_gpt2

from cosmos_jax import config as config_lib
from cosmos_jax.decoding import draw_from_nucleus, likeliest, make_decoder, make_generator
from cosmos_jax.models import autoregressive

SOURCES = np.array([[2, 9, 8, 7, 4], [2, 5, 4, 0, 0], [2, 6, 6, 4, 0]])
B, S = SOURCES.shape
SOURCE = (jnp.array(SOURCES), jnp.array(SOURCES > 0))
ENCODER = dict(
    vocab_size=60, hidden_size=24, num_layers=1, num_heads=4, intermediate_size=32, max_positions=90
)


def make(conditional=False, length=13, vocabulary=50, dtype="float32", sharpness=1.0, **fields):
    """Config, model, weights. Token ids are not rows, but 59 less."""
    config = config_lib.base()
    config.dtype = dtype
    config.encoder.update(ENCODER)
    config.data.update(max_length=length, max_source_length=S, conditional=conditional)
    config.autoregressive.update(num_layers=SIZES["num_layers"], num_heads=SIZES["num_heads"])
    config.autoregressive.update(fields)
    model = autoregressive.build(config, vocabulary)
    inputs = (np.zeros((1, 2), int),)
    if conditional:
        inputs += (np.zeros((1, S, 24), np.float32), np.ones((1, S), bool))
    params = random_params(model.decoder, *inputs)["params"]
    # Or all texts say the same, and one word for ever.
    shares = {"bias": 0.3, "words": 0.3, "positions": 0.5, "cross_out": 6.0}
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * np.prod([shares.get(key.key, 1.0) for key in path]).astype("f4"),
        params,
    )
    params["norm"]["scale"] *= 3 * sharpness
    weights = {
        "decoder": params,
        "vocabulary": jnp.arange(59, 59 - vocabulary, -1, dtype=jnp.int32),
        "head_index": jnp.clip(59 - jnp.arange(60, dtype=jnp.int32), max=vocabulary - 1),
        "start": jnp.int32(59),
        "end": jnp.int32(58),
        "states_mean": jnp.full(24, 0.2),
        "states_std": jnp.full(24, 0.7),
    }
    if conditional:
        weights["bert"] = random_params(model.bert, *SOURCE)["params"]
    return config, model, weights


def decode(config, model, weights, keys=None, source=None):
    if keys is None:
        keys = jax.random.split(jax.random.key(3), B)
    rows, steps = jax.jit(make_decoder(config, model))(weights, keys, source)
    return np.asarray(rows), int(steps)


def full_logits(model, weights, source=None):
    """rows [B, T] -> logits of all positions, without a cache."""
    given = ()
    if source is not None:
        given = (model.text_states(weights, *source), source[1])
    forward = jax.jit(model.logits)
    return lambda rows: np.asarray(forward(weights, jnp.array(rows), *given))


def source_of(conditional):
    return SOURCE if conditional else None


@pytest.mark.parametrize("conditional", [False, True])
def test_steps_with_a_cache_are_the_full_forward(conditional):
    _, model, weights = make(conditional)
    rows = np.random.default_rng(0).integers(0, 50, (B, 12))
    expected = full_logits(model, weights, source_of(conditional))(rows)
    params, read = model.for_decoding(weights), None
    if conditional:
        states = model.text_states(weights, *SOURCE)
        read = model.read_source(params, states, SOURCE[1])
    grown = ((0, 0), (0, 0), (0, 12), (0, 0))
    cache = jax.tree.map(lambda entry: jnp.pad(entry, grown), model.empty_cache(B))
    step = jax.jit(model.step)
    for i in range(12):
        visible = (jnp.arange(12) <= i)[None, None]
        found, cache = step(params, rows[:, i : i + 1], jnp.int32(i), visible, cache, read)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found[:, 0], expected[:, i], atol=1e-5 * np.abs(expected).max())


def greedy_by_hand(logits, length, end, batch):
    """Rows by the greatest logit, all positions computed again for each; no text is stopped."""
    rows = np.zeros((batch, length), np.int32)
    for i in range(length - 1):
        rows[:, i + 1] = logits(rows)[:, i].argmax(axis=-1)
    for row in rows:
        ends = np.flatnonzero(row == end)
        if len(ends):
            row[ends[0] :] = end
    return rows


# A cache of 79 positions grows in three parts.
@pytest.mark.parametrize(
    ("conditional", "length", "end"), [(False, 80, 1), (False, 80, 25), (True, 13, 21)]
)
def test_greedy_is_the_loop_without_a_cache(conditional, length, end):
    config, model, weights = make(conditional, length, decoding="greedy", sharpness=4.0)
    source = source_of(conditional)
    weights["end"] = jnp.int32(59 - end)
    expected = greedy_by_hand(full_logits(model, weights, source), length, end, B)
    found, steps = decode(config, model, weights, source=source)
    np.testing.assert_array_equal(found, 59 - expected)
    assert found.dtype == np.int32
    assert len(np.unique(found[0])) > 2
    assert len(np.unique(found, axis=0)) > 1 or not conditional
    ends = [np.flatnonzero(row == end)[:1] for row in expected]
    assert steps == max(int(at[0]) if len(at) else length - 1 for at in ends)


def test_the_loop_stops_where_the_last_text_ends():
    """What a text would say is made its end: no more positions are gone through."""
    config, model, weights = make(True, 80, decoding="greedy", sharpness=4.0)
    whole, steps = decode(config, model, {**weights, "end": jnp.int32(10)}, source=SOURCE)
    assert steps == 79
    alone = SOURCE[0][:1], SOURCE[1][:1]
    key = jax.random.split(jax.random.key(0), 1)
    compiled = jax.jit(make_decoder(config, model))
    for token in list(dict.fromkeys(whole[0, 1:].tolist()))[:4]:
        first = int(np.flatnonzero(whole[0, 1:] == token)[0]) + 1
        found, steps = compiled({**weights, "end": jnp.int32(token)}, key, alone)
        assert steps == first
        np.testing.assert_array_equal(found[0, : first + 1], whole[0, : first + 1])
        np.testing.assert_array_equal(found[0, first:], token)


@pytest.mark.parametrize("decoding", ["nucleus", "beam"])
def test_a_text_does_not_depend_on_the_batch_around_it(decoding):
    config, model, weights = make(True, decoding=decoding, sharpness=2.0)
    keys = jax.random.split(jax.random.key(8), B)
    generate = jax.jit(make_generator(config, model))
    together = generate(weights, keys, SOURCE)
    order = np.array([2, 0, 2, 1])
    apart = generate(weights, keys[order], (SOURCE[0][order], SOURCE[1][order]))
    np.testing.assert_array_equal(apart, together[order])
    for i in range(B):
        one = slice(i, i + 1)
        alone = generate(weights, keys[one], (SOURCE[0][one], SOURCE[1][one]))
        np.testing.assert_array_equal(alone[0], together[i])
    assert len(np.unique(together, axis=0)) > 1
    if decoding == "nucleus":
        other = generate(weights, keys[np.array([1, 0, 2])], SOURCE)
        assert (other != together).any(axis=1).tolist() == [True, True, False]


# Nucleus sampling


def nucleus_by_hand(logits, top_p):
    """Probabilities within the smallest set of likeliest rows that holds `top_p`."""
    shares = np.exp(logits - logits.max())
    shares /= shares.sum()
    order = np.argsort(-shares)
    kept = order[: np.searchsorted(np.cumsum(shares[order]), top_p) + 1]
    inside = np.zeros_like(shares)
    inside[kept] = shares[kept]
    return inside / inside.sum()


@pytest.mark.parametrize("top_p", [0.2, 0.7, 0.95, 1.0])
def test_draws_are_those_of_the_renormalised_nucleus(top_p):
    num_draws = 20_000
    logits = 1.5 * np.random.default_rng(0).normal(size=37)
    expected = nucleus_by_hand(logits, top_p)
    keys = jax.random.split(jax.random.key(0), num_draws)
    many = jnp.tile(jnp.array(logits, jnp.float32), (num_draws, 1))
    counts = np.bincount(jax.jit(draw_from_nucleus)(keys, many, top_p), minlength=37)
    inside = expected > 0
    assert inside.sum() == {0.2: 2, 0.7: 11, 0.95: 27, 1.0: 37}[top_p]
    assert not counts[~inside].any()
    means = num_draws * expected[inside]
    chi_square = ((counts[inside] - means) ** 2 / means).sum()
    free = inside.sum() - 1
    assert chi_square < free + 5 * np.sqrt(2 * free)


def test_draws_end_on_what_is_no_number():
    keys = jax.random.split(jax.random.key(0), 2)
    logits = jnp.array([[jnp.nan, 0.0, 1.0], [5.0, -jnp.inf, -jnp.inf]])
    assert jax.jit(draw_from_nucleus, static_argnums=2)(keys, logits, 0.5)[1] == 0


def test_texts_are_drawn_token_by_token():
    """The shares of first and second tokens are those of the model, sharpened."""
    config, model, weights = make(length=3, vocabulary=6, temperature=0.8, top_p=0.9)
    count = 6_000
    found, _ = decode(config, model, weights, jax.random.split(jax.random.key(1), count))
    rows = 59 - found
    logits = full_logits(model, weights)
    first = nucleus_by_hand(logits([[0]])[0, 0].astype(float) / 0.8, 0.9)
    assert 1 < (first > 0).sum() < 6
    expected = np.zeros((6, 6))
    for row, share in enumerate(first):
        second = nucleus_by_hand(logits([[0, row]])[0, 1].astype(float) / 0.8, 0.9)
        expected[row] = share * (np.eye(6)[1] if row == 1 else second)
    counts = np.zeros((6, 6))
    np.add.at(counts, (rows[:, 1], rows[:, 2]), 1)
    assert not counts[expected == 0].any()
    spread = np.sqrt(count * expected * (1 - expected))
    assert (np.abs(counts - count * expected) <= 5 * spread + 1e-6).all()


def test_the_likeliest_is_the_first_of_the_greatest():
    logits = np.random.default_rng(0).integers(0, 9, (40, 31)).astype(np.float32)
    np.testing.assert_array_equal(likeliest(jnp.array(logits)), logits.argmax(axis=1))


def test_a_small_nucleus_is_greedy():
    greedy = decode(*make(True, decoding="greedy", sharpness=4.0), source=SOURCE)[0]
    small = decode(*make(True, top_p=1e-6, sharpness=4.0), source=SOURCE)[0]
    np.testing.assert_array_equal(small, greedy)


# Beam search


@pytest.mark.parametrize("conditional", [False, True])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 3.0])
def test_wide_beams_find_the_best_of_all_texts(conditional, length_penalty):
    vocabulary, length, end = 4, 6, 1
    config, model, weights = make(
        conditional,
        length,
        vocabulary,
        decoding="beam",
        num_beams=200,
        length_penalty=length_penalty,
    )
    source = source_of(conditional)
    batch = B if conditional else 1
    logits = full_logits(model, weights, source)
    best: list = [(-np.inf, None)] * batch
    for text in itertools.product(range(vocabulary), repeat=length - 1):
        size = text.index(end) + 1 if end in text else length - 1
        if any(token != end for token in text[size:]):
            continue
        rows = np.tile([0, *text], (batch, 1))
        scores = np.asarray(jax.nn.log_softmax(logits(rows)[:, :size]))
        for b in range(batch):
            total = sum(scores[b, i, text[i]] for i in range(size)) / size**length_penalty
            best[b] = max(best[b], (total, (0, *text)))
    keys = jax.random.split(jax.random.key(0), batch)
    found, _ = decode(config, model, weights, keys, source)
    np.testing.assert_array_equal(59 - found, [text for _, text in best])


@pytest.mark.parametrize(("length_penalty", "num_beams"), [(0.0, 3), (1.0, 4), (2.0, 2)])
def test_beams_are_those_of_transformers(length_penalty, num_beams):
    torch = pytest.importorskip("torch")
    config, model, weights = make(
        decoding="beam", length_penalty=length_penalty, num_beams=num_beams, sharpness=1.5
    )
    theirs = torch_gpt2(weights["decoder"])
    compiled = jax.jit(make_decoder(config, model))
    key = jax.random.split(jax.random.key(0), 1)
    ended = 0
    for start, end in itertools.product(range(0, 50, 10), (2, 18, 39, 43)):
        expected = theirs.generate(
            torch.tensor([[start]]),
            attention_mask=torch.ones((1, 1), dtype=int),
            num_beams=num_beams,
            length_penalty=length_penalty,
            do_sample=False,
            max_length=13,
            eos_token_id=end,
            pad_token_id=end,
        )[0].numpy()
        given = {**weights, "start": jnp.int32(59 - start), "end": jnp.int32(59 - end)}
        found = 59 - np.asarray(compiled(given, key, None)[0])[0]
        np.testing.assert_array_equal(found[: len(expected)], expected)
        assert (found[len(expected) :] == end).all()
        ended += len(expected) < 13
    assert ended > 1


@pytest.mark.parametrize("conditional", [False, True])
def test_one_beam_is_greedy(conditional):
    source = source_of(conditional)
    fields = dict(num_beams=1, length_penalty=0.0, sharpness=4.0)
    greedy = decode(*make(conditional, 40, decoding="greedy", **fields), source=source)
    beam = decode(*make(conditional, 40, decoding="beam", **fields), source=source)
    np.testing.assert_array_equal(beam[0], greedy[0])


def test_bfloat16_casts_all_but_the_norms():
    config, model, weights = make(True, dtype="bfloat16")
    for path, leaf in jax.tree_util.tree_leaves_with_path(model.for_decoding(weights)):
        is_norm = any("norm" in str(key) for key in path)
        assert leaf.dtype == (jnp.float32 if is_norm else jnp.bfloat16), path
    found, _ = decode(config, model, weights, source=SOURCE)
    assert (found[:, 0] == 59).all()
    assert np.isin(found, weights["vocabulary"]).all()
