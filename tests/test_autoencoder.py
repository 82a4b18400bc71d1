"""Compressor and decompressor: sizes, masks, perturbation by dropout, and layers by hand."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from cosmos_jax.models import cosmos, layers
from cosmos_jax.models.autoencoder import (
    AutoencoderConfig,
    Block,
    Compressor,
    Decompressor,
    Gate,
    MemoryAttention,
)
from cosmos_jax.models.layers import FeedForward, RMSNorm

PAPER = AutoencoderConfig(
    width=768, num_heads=12, num_layers=12, num_latents=16, max_length=128, vocab_size=28_996
)
TINY = AutoencoderConfig(
    width=16, num_heads=2, num_layers=2, num_latents=3, max_length=7, vocab_size=11, dropout=0.5
)


def count(module, *inputs) -> int:
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def states_of(config: AutoencoderConfig, batch: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, config.max_length, config.width), jnp.float32)


def latents_of(config: AutoencoderConfig, batch: int = 1) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, config.num_latents, config.width), jnp.float32)


def test_compressor_has_the_size_of_the_release():
    mask = jax.ShapeDtypeStruct((1, 128), bool)
    assert count(Compressor(PAPER), states_of(PAPER), mask) == 99_287_040


def test_decompressor_has_the_size_of_the_release():
    embedding = jax.ShapeDtypeStruct((768,), jnp.float32)
    assert count(Decompressor(PAPER), latents_of(PAPER), embedding) == 126_266_162


def test_more_latents_than_positions_enlarge_the_tables():
    more = dataclasses.replace(PAPER, num_latents=200)
    mask = jax.ShapeDtypeStruct((1, 128), bool)
    assert count(Compressor(more), states_of(more), mask) == 99_287_040 + 768 * (184 + 72)


@functools.cache
def compressor():
    """(function of states and mask, states, mask) with weights that are all random."""
    rng = np.random.default_rng(0)
    states = rng.normal(size=(3, 7, 16)).astype(np.float32)
    mask = np.arange(7) < np.array([7, 4, 1])[:, None]
    module = Compressor(TINY)
    params = random_params(module, states, mask)
    return jax.jit(functools.partial(module.apply, params)), states, mask


@functools.cache
def decompressor(dropout: float = 0.5):
    module = Decompressor(dataclasses.replace(TINY, dropout=dropout))
    rng = np.random.default_rng(1)
    latents = rng.normal(size=(3, 3, 16)).astype(np.float32)
    embedding = rng.normal(size=16).astype(np.float32)
    params = random_params(module, latents, embedding)
    apply = jax.jit(functools.partial(module.apply, params))
    return apply, latents, embedding


def test_compressor_never_sees_padding_or_neighbours():
    apply, states, mask = compressor()
    latents = apply(states, mask)
    assert latents.shape == (3, 3, 16)
    assert latents.dtype == jnp.float32
    other = np.where(mask[..., None], states, 1e3)
    np.testing.assert_array_equal(apply(other, mask), latents)
    other[1] += 1
    changed = apply(other, mask)
    np.testing.assert_array_equal(changed[0::2], latents[0::2])
    assert np.abs(changed[1] - latents[1]).min(axis=-1).max() > 0
    shorter = apply(states[:, :4], mask[:, :4])
    np.testing.assert_allclose(shorter[1:], latents[1:], atol=1e-5)


def test_compressor_sees_every_real_token_and_its_place():
    apply, states, mask = compressor()
    latents = apply(states, mask)
    for i in range(4):
        other = states.copy()
        other[1, i] += 1
        assert np.abs(apply(other, mask)[1] - latents[1]).max() > 1e-3
    swapped = states[:, [1, 0, 2, 3, 4, 5, 6]]
    assert np.abs(apply(swapped, mask)[0] - latents[0]).max() > 1e-3


def test_decompressor_rows_are_independent_and_positions_differ():
    apply, latents, embedding = decompressor()
    states, logits = apply(latents, embedding)
    assert states.shape == (3, 7, 16)
    assert logits.shape == (3, 7, 11)
    assert states.dtype == logits.dtype == jnp.float32
    other = latents.copy()
    other[1] += 1
    changed, _ = apply(other, embedding)
    np.testing.assert_array_equal(changed[0::2], states[0::2])
    assert np.abs(changed[1] - states[1]).max() > 1e-3
    assert np.abs(np.diff(states, axis=1)).max(axis=-1).min() > 1e-3


def test_dropout_only_when_asked_for():
    apply, latents, embedding = decompressor()
    keys = [jax.random.split(jax.random.key(i), 3) for i in (0, 0, 1)]
    still, _ = apply(latents, embedding)
    first, again, other = (apply(latents, embedding, key)[0] for key in keys)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    assert np.abs(first - still).max() > 1e-2
    # Equal rows of a batch are perturbed differently.
    equal = np.broadcast_to(latents[:1], latents.shape)
    noisy, _ = apply(equal, embedding, keys[0])
    assert np.abs(noisy[0] - noisy[1]).max() > 1e-2
    # A text's noise is its key's, whatever the batch around it.
    alone, _ = apply(latents[1:2], embedding, keys[0][1:2])
    np.testing.assert_allclose(alone[0], first[1], atol=1e-5)


def test_dropout_keeps_its_share_and_the_mean():
    x = np.ones((2, 100, 200), np.float32)
    found = layers.dropout(x, 0.25, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(np.unique(found), [0, 1 / 0.75], rtol=1e-6)
    np.testing.assert_allclose(found.mean(axis=(1, 2)), 1, atol=0.02)


def test_without_dropout_training_and_inference_agree():
    """Inference computes the start of one query for all, training that of each."""
    module = Decompressor(dataclasses.replace(TINY, dropout=1e-12))
    apply, latents, embedding = decompressor(0.0)
    params = apply.__wrapped__.args[0]
    keys = jax.random.split(jax.random.key(0), len(latents))
    training = jax.jit(module.apply)(params, latents, embedding, keys)
    for a, b in zip(training, apply(latents, embedding), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_bfloat16_keeps_parameters_and_answers_in_float32():
    apply, states, mask = compressor()
    module = Compressor(TINY, jnp.bfloat16)
    params = apply.__wrapped__.args[0]
    shapes = jax.eval_shape(module.init, jax.random.key(0), states, mask)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    rounded = jax.jit(module.apply)(params, states, mask)
    assert rounded.dtype == jnp.float32
    error = np.abs(rounded - apply(states, mask)).max()
    assert 0 < error < 0.1


# Layers, recomputed in NumPy in double precision.


def rms_norm(x, gain=1.0):
    rms = np.sqrt((x**2).mean(axis=-1, keepdims=True))
    return x / np.where(rms > 1e-5, rms, 1e-5) * gain


def softmax(x):
    x = np.exp(x - x.max(axis=-1, keepdims=True))
    return x / x.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("scale", [0.0, 1e-7, 1e-5, 1.0, 1e6])
def test_rms_norm_bounds_the_rms_from_below(scale):
    rng = np.random.default_rng(0)
    x, gain = scale * rng.normal(size=(4, 9)), rng.normal(size=9)
    actual = RMSNorm().apply({"params": {"gain": gain}}, x.astype(np.float32))
    np.testing.assert_allclose(actual, rms_norm(x, gain), rtol=1e-5, atol=1e-6)


def test_gate():
    x = np.arange(4.0, dtype=np.float32)
    actual = Gate().apply({"params": {"weight": np.float32(0.5), "bias": np.float32(-0.25)}}, x)
    np.testing.assert_allclose(actual, 1.25 * x)


def test_feed_forward():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 8)) + 5
    module = FeedForward(0.1, jnp.float32)
    params = random_params(module, x.astype(np.float32))
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    h = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    h = (h * p["norm"]["scale"] + p["norm"]["bias"]) @ p["up"]["kernel"] + p["up"]["bias"]
    assert h.shape[-1] == 32
    h = h * 0.5 * (1 + np.vectorize(math.erf)(h / math.sqrt(2)))
    expected = h @ p["down"]["kernel"] + p["down"]["bias"]
    actual = module.apply(params, x.astype(np.float32))
    np.testing.assert_allclose(actual, expected, atol=1e-5)


def test_attention_over_memory_and_queries():
    rng = np.random.default_rng(0)
    queries, memory = rng.normal(size=(2, 3, 8)), rng.normal(size=(2, 5, 8))
    mask = np.arange(5) < np.array([5, 2])[:, None]
    module = MemoryAttention(2, jnp.float32)
    inputs = (queries.astype(np.float32), memory.astype(np.float32), mask)
    params = random_params(module, *inputs)
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params["params"])
    assert all(set(p[name]) == {"kernel"} for name in ("query", "key", "value", "out"))
    expected = np.zeros((2, 3, 8))
    for b in range(2):
        q_in = rms_norm(queries[b], p["norm_queries"]["gain"])
        m_in = rms_norm(memory[b][mask[b]], p["norm_memory"]["gain"])
        heads = []
        for head in (slice(0, 4), slice(4, 8)):
            query = q_in @ p["query"]["kernel"][:, head]
            own, theirs = p["key"]["kernel"][:, head], p["memory_key"]["kernel"][:, head]
            key = np.concatenate([q_in @ own, m_in @ theirs])
            own, theirs = p["value"]["kernel"][:, head], p["memory_value"]["kernel"][:, head]
            value = np.concatenate([q_in @ own, m_in @ theirs])
            query = rms_norm(query, p["norm_query_heads"]["gain"])
            key = rms_norm(key, p["norm_key_heads"]["gain"])
            heads.append(softmax(query @ key.T / math.sqrt(4)) @ value)
        expected[b] = np.concatenate(heads, axis=-1) @ p["out"]["kernel"]
    np.testing.assert_allclose(module.apply(params, *inputs), expected, atol=1e-5)


def test_only_the_decompressor_has_gates():
    for gated in (False, True):
        block = Block(TINY, gated, jnp.float32)
        x = jax.ShapeDtypeStruct((1, 3, 16), jnp.float32)
        params = jax.eval_shape(block.init, jax.random.key(0), x, x, None)["params"]
        assert ("attention_gate" in params) == ("mlp_gate" in params) == gated


@pytest.mark.parametrize("vocabulary_size", [layers.COLUMNS - 1, 3 * layers.COLUMNS - 7, 1_536])
def test_the_most_likely_rows_are_those_of_argmax(vocabulary_size):
    """With few positions, and with so many that a CPU looks at columns of logits instead."""
    rng = np.random.default_rng(0)
    head = rng.standard_normal((16, vocabulary_size)).astype(np.float32)
    head /= np.linalg.norm(head, axis=0)  # so that a row is what is most like it
    for positions in (3, layers.MANY_POSITIONS):
        wanted = rng.integers(vocabulary_size, size=(2, positions))
        wanted[:, :3] = [0, vocabulary_size - 1, vocabulary_size // 2]
        found = jax.jit(layers.most_likely)(head.T[wanted], head)
        assert found.dtype == jnp.int32
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("num_texts", [2, 84, 200])  # one part, exactly one, two and a rest
def test_texts_are_decoded_in_parts_as_all_at_once(tiny, num_texts):
    config = tiny.config()
    model = cosmos.build(config, vocabulary_size := 600)
    latents = jax.random.normal(jax.random.key(0), (num_texts, 4, config.encoder.hidden_size))
    embedding = jnp.ones(config.encoder.hidden_size)
    weights = {
        "decompressor": random_params(model.decompressor, latents, embedding)["params"],
        "mask_embedding": embedding,
        "vocabulary": jnp.arange(vocabulary_size)[::-1],
    }
    _, logits = model.decompress(weights, latents)
    found = jax.jit(model.decode)(weights, latents)
    np.testing.assert_array_equal(found, vocabulary_size - 1 - np.argmax(logits, axis=-1))
    assert len(np.unique(found)) >= min(10, num_texts)
