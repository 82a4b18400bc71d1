"""Generation against denoiser calls made one by one."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax import config as config_lib
from cosmos_jax import pipeline
from cosmos_jax.data import tokens
from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.runner import open_run
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
    run = open_run(tiny.pairs_config(diffusion__guidance=1.0), finished_pairs)
    finished = pipeline.finished(run)
    model, weights = finished.model, finished.weights
    encoded = tokens.encode(run.encoder.tokenizer, SOURCES, run.config.data.max_source_length)
    source = (jnp.array(encoded.ids_BxL), jnp.array(encoded.mask_BxL))
    keys = jax.random.split(jax.random.key(8), len(SOURCES))

    def generator(model_class=Latents, model=model, **fields):
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


def operations(jaxpr):
    """Every operation with the shapes of its results, those of inner functions too."""
    for equation in jaxpr.eqns:
        yield equation
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from operations(inner)


def test_no_step_computes_what_is_the_same_in_all(trained):
    """Keys and values of the source, and the denoiser's weights in the type of the products."""
    generator, model, weights, source, keys = trained
    model = dataclasses.replace(
        model, denoiser=dataclasses.replace(model.denoiser, dtype=jnp.bfloat16)
    )
    generate = generator(Latents, model=model, guidance=2.0)
    everything = jax.make_jaxpr(generate)(weights, keys, source).jaxpr
    (loop,) = [e for e in operations(everything) if e.primitive.name == "scan"]

    def of_source(equations):
        """Products for each position of the source, the shares of attention left out."""
        length = source[0].shape[1]
        shapes = [e.outvars[0].aval.shape for e in equations if e.primitive.name == "dot_general"]
        return [shape for shape in shapes if shape[1:2] == (length,)]

    def conversions(equations):
        kernels = {leaf.shape for leaf in jax.tree.leaves(weights["denoiser"]) if leaf.ndim == 2}
        converted = [e for e in equations if e.primitive.name == "convert_element_type"]
        return [e for e in converted if e.outvars[0].aval.shape in kernels]

    body = list(operations(loop.params["jaxpr"].jaxpr))
    assert of_source(operations(everything))
    assert not of_source(body)
    assert conversions(operations(everything))
    assert not conversions(body)


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


class Loud(Latents):
    """Estimates three times too large, which depend on all that a denoiser is given but weights."""

    def denoise(self, weights, x, t, self_condition, *condition):
        return 3 * jnp.tanh(x + self_condition) + t[:, None, None]


def loud(x, t, c):
    return 3 * np.tanh(x + c) + t


def prior(keys, steps):
    return np.stack(
        [jax.random.normal(jax.random.fold_in(key, steps + 1), SHAPE) for key in keys]
    ).astype(np.float64)


def restored(weights, x_0):
    return x_0 * np.asarray(weights["latents_std"]) + np.asarray(weights["latents_mean"])


def as_large_as_clean(x_0):
    return x_0 / np.maximum(1, np.sqrt(np.mean(x_0**2, axis=(1, 2), keepdims=True)))


@pytest.mark.parametrize("time_grid", ["time", "logsnr"])
def test_the_next_estimate_is_given_the_rescaled_one(trained, time_grid):
    """Against DDIM in double precision, step by step on either grid."""
    generator, _, weights, source, keys = trained
    settings = {"num_sampling_steps": 3, "min_time": 0.1, "sampler": "ddim", "guidance": 1.0}
    times = np.linspace(1, 0.1, 4)
    if time_grid == "logsnr":
        signal_to_noise = np.geomspace(0.01, 1 / (5 * np.tan(np.pi * 0.1 / 2)), 4)[1:]
        times = np.array([1, *(2 / np.pi * np.arctan(1 / (5 * signal_to_noise)))])
    x, c = prior(keys, 3), 0.0
    for t, s in itertools.pairwise(times):
        c = as_large_as_clean(loud(x, t, c))
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (
            (np.cos(angle), np.sin(angle))
            for angle in (np.arctan(5 * np.tan(np.pi * time / 2)) for time in (t, s))
        )
        x = alpha_s * c + sigma_s * (x - alpha_t * c) / sigma_t
    for answer, expected in (("mean", x), ("x0", c)):
        fields = {"rescale": "standardise", "time_grid": time_grid, "answer": answer}
        generate = generator(Loud, **settings, **fields)
        np.testing.assert_allclose(
            generate(weights, keys, source), restored(weights, expected), atol=1e-4
        )


@pytest.mark.parametrize("sampler", config_lib.SAMPLERS)
def test_estimates_of_every_sampler_are_rescaled(trained, sampler):
    generator, _, weights, source, keys = trained
    fields = {"sampler": sampler, "num_sampling_steps": 4, "answer": "x0", "guidance": 2.0}

    def sizes(rescale):
        found = np.asarray(generator(Loud, rescale=rescale, **fields)(weights, keys, source))
        x_0 = (found - np.asarray(weights["latents_mean"])) / np.asarray(weights["latents_std"])
        return np.sqrt(np.mean(x_0**2, axis=(1, 2))), np.abs(x_0).max(axis=(1, 2))

    assert (sizes("none")[0] > 2).all()
    np.testing.assert_allclose(sizes("standardise")[0], 1, rtol=1e-3)
    assert (sizes("none")[1] > 2.9).all()
    np.testing.assert_allclose(sizes("threshold")[1], 2.807, rtol=1e-3)
