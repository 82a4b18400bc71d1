"""States as latents: what stands for the compressor and the decompressor."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
from random_params import random_params
from tiny import BERT, SPECIAL

from cosmos_jax import encoder as encoder_lib
from cosmos_jax.models.autoencoder import AutoencoderConfig, Decompressor
from cosmos_jax.models.bert import Bert
from cosmos_jax.models.token_decoder import IdentityCompressor, TokenDecoder

TINY = AutoencoderConfig(
    width=16, num_heads=2, num_layers=2, num_latents=7, max_length=7, vocab_size=11, dropout=0.5
)


def test_states_come_back_as_they_are():
    states = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(np.float16)
    mask = np.arange(7) < np.array([[7], [3]])
    module = IdentityCompressor()
    assert not jax.tree.leaves(module.init(jax.random.key(0), states, mask))
    latents = module.apply({"params": {}}, states, mask, jax.random.split(jax.random.key(0), 2))
    assert latents.dtype == jnp.float32
    np.testing.assert_array_equal(latents, states)


def test_size_of_the_decoder():
    """Of TEncDM's three layers with BERT's width and vocabulary."""
    config = AutoencoderConfig(
        width=768, num_heads=12, num_layers=3, num_latents=128, max_length=128, vocab_size=28_996
    )
    latents = jax.ShapeDtypeStruct((1, 128, 768), jnp.float32)
    params = jax.eval_shape(TokenDecoder(config).init, jax.random.key(0), latents)["params"]
    # Of a layer: attention, its norm, the norm before the MLP with its bias, and the MLP.
    layer = 4 * 768**2 + 768 + 2 * 768 + 8 * 768**2 + 5 * 768
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(params)) == 3 * layer + 768 * 28_996
    # The same head as the decompressor's, so that it may start from the same regression.
    other = jax.eval_shape(Decompressor(config).init, jax.random.key(0), latents, jnp.zeros(768))[
        "params"
    ]
    assert params["head"] == other["head"]


@functools.cache
def decoder(dropout=0.5):
    """(function of latents, [MASK]'s embedding and keys; latents) with random weights."""
    module = TokenDecoder(dataclasses.replace(TINY, dropout=dropout))
    latents = np.random.default_rng(1).normal(size=(3, 7, 16)).astype(np.float32)
    params = random_params(module, latents)
    return jax.jit(functools.partial(module.apply, params)), latents


def test_every_latent_matters_to_its_own_text_alone():
    apply, latents = decoder()
    states, logits = apply(latents, np.zeros(16))
    assert (states.shape, logits.shape) == ((3, 7, 16), (3, 7, 11))
    assert states.dtype == logits.dtype == jnp.float32
    for position in (0, 6):
        other = latents.copy()
        other[1, position] += 0.5
        for before, after in zip((states, logits), apply(other, np.ones(16)), strict=True):
            np.testing.assert_array_equal(after[0::2], before[0::2])
            assert (np.abs(after[1] - before[1]).max(axis=-1) > 1e-4).all()
    # So does the order.
    turned, _ = apply(latents[:, ::-1], np.zeros(16))
    assert np.abs(turned[:, ::-1] - states).max() > 1e-3


def test_dropout_is_that_of_each_text():
    apply, latents = decoder()
    keys = jax.random.split(jax.random.key(0), 3)
    _, dropped = apply(latents, None, keys)
    _, whole = apply(latents, None)
    assert np.abs(dropped - whole).max() > 1e-2
    _, alone = apply(latents[1:2], None, keys[1:2])
    np.testing.assert_allclose(alone[0], dropped[1], atol=1e-5)
    kept, _ = decoder(dropout=0.0)
    np.testing.assert_allclose(kept(latents, None, keys)[1], whole, atol=1e-5)


def test_tokens_can_be_read_from_the_states_of_an_encoder(tiny):
    """From noised ones too, and of texts that were not trained on."""
    encoder = encoder_lib.load(str(tiny.encoder))
    rng = np.random.default_rng(0)
    ids = rng.integers(len(SPECIAL), BERT.vocab_size, (400, 12)).astype(np.int32)
    states = jax.jit(Bert(BERT).apply)({"params": encoder.params}, ids, np.ones_like(ids, bool))
    states = np.asarray((states - states.mean(axis=(0, 1))) / states.std(axis=(0, 1)))
    noise = rng.normal(size=states.shape).astype(np.float32)
    module = TokenDecoder(
        AutoencoderConfig(
            width=32, num_heads=2, num_layers=1, num_latents=12, max_length=12, vocab_size=60
        )
    )
    params = jax.jit(module.init)(jax.random.key(0), states[:1])["params"]
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, texts, key):
        def loss(params):
            latents = 0.9 * states_on_device[texts] + 0.4 * noise_on_device[texts]
            keys = jax.random.split(key, len(texts))
            predicted, logits = module.apply({"params": params}, latents, None, keys)
            entropy = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array(ids)[texts])
            return entropy.mean() + jnp.mean((predicted - states_on_device[texts]) ** 2)

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    states_on_device, noise_on_device = jnp.array(states), jnp.array(noise)
    state = optimizer.init(params)
    for key in jax.random.split(jax.random.key(1), 150):
        texts = jax.random.choice(key, 300, (32,))
        params, state = step(params, state, texts, key)
    apply = jax.jit(lambda latents: module.apply({"params": params}, latents))
    held_out = slice(300, None)
    for latents in (states, 0.9 * states + 0.4 * noise):
        _, logits = apply(latents[held_out])
        assert (np.argmax(logits, axis=-1) == ids[held_out]).mean() > 0.95
