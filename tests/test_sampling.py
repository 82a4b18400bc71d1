"""Generation against denoiser calls made one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax import pipeline
from cosmos_jax.data import tokens
from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.sampling import make_generator

SHAPE = (4, 32)  # latents, width
SOURCES = ["the old king", "a bird sees the river and the hill", "snow"]


class Latents(Cosmos):
    """Answers with the latents instead of the tokens they decode to."""

    def decode(self, weights, latents):
        return latents


@pytest.fixture(scope="module")
def trained(tiny, finished_pairs):
    """config -> a generator of latents; weights; sources; keys."""
    run = tiny.run(finished_pairs, tiny.pairs)
    finished = pipeline.finished(run)
    model, weights = finished.model, finished.weights
    encoded = tokens.encode(run.encoder.tokenizer, SOURCES, run.config.data.max_source_length)
    source = (jnp.array(encoded.ids_BxL), jnp.array(encoded.mask_BxL))
    keys = jax.random.split(jax.random.key(8), len(SOURCES))

    def generator(model_class=Latents, **fields):
        config = run.config.copy_and_resolve_references()
        config.diffusion.update(fields)
        return jax.jit(make_generator(config, model_class(**vars(model))))

    return generator, model, weights, source, keys


@pytest.fixture(scope="module")
def estimates(trained):
    """x_0 of one denoiser call at t = 1, with the sources and with empty ones."""
    _, model, weights, (ids, mask), keys = trained
    noise = jnp.stack([jax.random.normal(jax.random.fold_in(key, 2), SHAPE) for key in keys])
    empty_ids = jnp.zeros_like(ids).at[:, :2].set(jnp.array([2, 4]))  # [CLS] [SEP]
    empty_mask = jnp.zeros_like(mask).at[:, :2].set(True)

    @jax.jit
    def estimate(weights, ids, mask):
        condition = model.encode_condition(weights, model.text_states(weights, ids, mask), mask)
        x_0 = model.denoise(weights, noise, jnp.ones(3), jnp.zeros_like(noise), condition, mask)
        return x_0 * weights["latents_std"] + weights["latents_mean"]

    with_source, without = estimate(weights, ids, mask), estimate(weights, empty_ids, empty_mask)
    assert jnp.abs(with_source - without).max() > 0.01
    return np.asarray(with_source), np.asarray(without)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 2.5])
def test_guidance_goes_from_the_empty_source_through_the_own(trained, estimates, guidance):
    generator, _, weights, source, keys = trained
    generate = generator(num_sampling_steps=1, answer="x0", guidance=guidance)
    with_source, without = estimates
    expected = without + guidance * (with_source - without)
    np.testing.assert_allclose(generate(weights, keys, source), expected, atol=2e-5)


def test_a_text_does_not_depend_on_the_batch_around_it(trained):
    generator, _, weights, (ids, mask), keys = trained
    generate = generator(guidance=2.0)
    together = generate(weights, keys, (ids, mask))
    order = jnp.array([2, 0, 2])
    apart = generate(weights, keys[order], (ids[order], mask[order]))
    np.testing.assert_allclose(apart, together[order], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_a_text_depends_on_its_key_and_its_source(trained):
    generator, _, weights, (ids, mask), keys = trained
    generate = generator(guidance=2.0)
    first = generate(
        weights, keys[jnp.array([0, 1, 0])], (ids[:1].repeat(3, 0), mask[:1].repeat(3, 0))
    )
    np.testing.assert_array_equal(first[0], first[2])
    assert np.abs(first[0] - first[1]).max() > 0.01
    other = generate(weights, keys[jnp.array([0, 0, 0])], (ids, mask))
    assert np.abs(other[0] - other[1]).max() > 0.01


def test_the_answer_is_decoded(trained):
    generator, model, weights, source, keys = trained
    latents = generator(guidance=2.0)(weights, keys, source)
    ids = generator(Cosmos, guidance=2.0)(weights, keys, source)
    _, logits = jax.jit(model.decompress)(weights, latents)
    np.testing.assert_array_equal(ids, np.asarray(logits).argmax(axis=-1))
    assert ids.shape == (3, 12)
