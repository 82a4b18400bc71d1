"""Runs that begin at a text, traces, and infilling, with denoisers that answer what is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from cosmos_jax import editing, guides, pipeline
from cosmos_jax.data import tokens
from cosmos_jax.models.cosmos import Cosmos
from cosmos_jax.sampling import Start, make_sampler

SHAPE = (4, 32)  # latents, width
TEXTS = ["the old king", "a bird sees the river and the hill"]


class Still(Cosmos):
    """The estimate is x_t itself, so that a trace shows where a run begins."""

    def denoise(self, weights, x, t, self_condition, *condition):
        return x


@pytest.fixture(scope="module")
def trained(tiny, finished):
    run = tiny.run(finished)
    done = pipeline.finished(run)
    encoded = tokens.encode(run.encoder.tokenizer, TEXTS, run.config.data.max_length)
    keys = jax.random.split(jax.random.key(3), len(TEXTS))
    return run.config, done.model, done.weights, encoded, keys


def change(config, **fields):
    config = config.copy_and_resolve_references()
    config.diffusion.update(fields)
    return config


@pytest.mark.parametrize("time_grid", ["time", "logsnr"])
@pytest.mark.parametrize("strength", [0.05, 0.5, 0.9])
def test_strength_is_the_noise_in_the_variance(trained, time_grid, strength):
    config, model, weights, _, keys = trained
    model = Still(**vars(model))
    config = change(config, num_sampling_steps=4, time_grid=time_grid, sampler="ddim")
    x_0 = jnp.full((2, *SHAPE), 3.0)
    draw = jax.jit(
        lambda start: make_sampler(config, model)(weights, keys, start=start, trace=True)
    )
    _, estimates = draw(Start(x_0, strength))
    eps = [jax.random.normal(jax.random.fold_in(key, 5), SHAPE) for key in keys]
    expected = np.sqrt(1 - strength) * 3.0 + np.sqrt(strength) * np.stack(eps)
    np.testing.assert_allclose(estimates[0], expected, atol=1e-4)
    assert estimates.shape == (4, 2, *SHAPE)


def test_times_end_before_a_late_beginning(trained):
    """A weak edit, which begins below the usual last time, still has steps, all downwards."""
    config, model, weights, _, keys = trained
    seen = []

    class Watched(Cosmos):
        def denoise(self, weights, x, t, self_condition, *condition):
            jax.debug.callback(lambda t: seen.append(float(t[0])), t)
            return x

    config = change(config, num_sampling_steps=3, sampler="ddim", min_time=0.6)
    draw = make_sampler(config, Watched(**vars(model)))
    draw(weights, keys, start=Start(jnp.ones((2, *SHAPE)), 0.1))
    jax.effects_barrier()
    first = 2 / np.pi * np.arctan(np.sqrt(0.1 / 0.9) / 5)
    np.testing.assert_allclose(seen, first * np.array([1, 5 / 6, 4 / 6]), rtol=1e-4)


def test_estimates_are_refined_in_every_step(trained):
    config, model, weights, _, keys = trained
    config = change(config, num_sampling_steps=3, answer="x0")
    sigmas = []

    def refine(x_0, sigma):
        jax.debug.callback(lambda s: sigmas.append(float(s)), sigma)
        return jnp.full_like(x_0, 0.25)

    found = make_sampler(config, model)(weights, keys, refine=refine)
    jax.effects_barrier()
    np.testing.assert_array_equal(found, 0.25)
    times = np.linspace(1, config.diffusion.min_time, 4)[:3]
    expected = np.sin(np.arctan(5 * np.tan(np.pi * times / 2)))
    np.testing.assert_allclose(sigmas, expected, rtol=1e-5)


def test_the_last_of_a_trace_is_the_answer(trained):
    config, model, weights, _, keys = trained
    draw = jax.jit(
        lambda: make_sampler(change(config, answer="x0"), model)(weights, keys, trace=True)
    )
    found, estimates = draw()
    np.testing.assert_array_equal(found, estimates[-1])
    assert jnp.abs(estimates[0] - estimates[-1]).max() > 0.01


def test_of_a_strength_near_0_the_text_comes_back_and_near_1_nothing(trained):
    config, model, weights, _, keys = trained
    edit = jax.jit(editing.make_editor(change(config, sampler="dpmpp_2m"), Still(**vars(model))))
    x_0 = jnp.array(np.random.default_rng(0).normal(size=(2, *SHAPE)), jnp.float32)
    near = edit(weights, keys, x_0, 1e-4)
    assert np.corrcoef(near.ravel(), x_0.ravel())[0, 1] > 0.99
    far, other = (edit(weights, keys, x, 1 - 1e-6) for x in (x_0, -x_0))
    np.testing.assert_allclose(far, other, atol=0.02)


def test_interpolation_is_a_straight_line():
    a, b = np.zeros(SHAPE), np.ones(SHAPE)
    path = editing.interpolate(a, b, 5)
    np.testing.assert_allclose(path[:, 0, 0], [0, 0.25, 0.5, 0.75, 1])


def test_hidden_tokens_are_not_looked_at(trained):
    """The compressor does not see what is not given, whatever BERT makes of it."""
    _, model, weights, encoded, _ = trained
    ids, mask = jnp.array(encoded.ids_BxL), jnp.array(encoded.mask_BxL)
    seen = mask.at[:, 2].set(False)

    class Apart(Cosmos):
        """A BERT whose states do not depend on other tokens."""

        def text_states(self, weights, ids, mask):
            return jax.nn.one_hot(ids, 32)

    model = Apart(**vars(model))
    changed = ids.at[:, 2].set(7)
    first = editing.encode(model, weights, ids, mask, seen)
    second = editing.encode(model, weights, changed, mask, seen)
    np.testing.assert_array_equal(first, second)
    assert np.abs(editing.encode(model, weights, ids, mask) - first).max() > 1e-3


def test_infilling_holds_what_is_given(trained, monkeypatch):
    """Given tokens are likelier than where nothing is given."""
    config, model, weights, encoded, keys = trained
    monkeypatch.setattr(editing, "decode", guides.log_probabilities)
    ids, mask = jnp.array(encoded.ids_BxL), jnp.array(encoded.mask_BxL)
    # After so little training latents are nearly the same for all texts, and say nothing.
    inputs = (jnp.zeros((1, *SHAPE)), weights["mask_embedding"])
    weights = {
        **weights,
        "decompressor": random_params(model.decompressor, *inputs)["params"],
        "latents_std": jnp.ones(SHAPE),
    }
    infill = jax.jit(editing.make_infiller(config, model))
    given = mask.at[:, 2].set(False)
    masked = jnp.where(given | ~mask, ids, 3)
    rows = weights["head_index"][ids][..., None]

    def likely(given):
        log_probs = infill(weights, keys, masked, mask, given)
        return np.asarray(jnp.take_along_axis(log_probs, rows, axis=2)[..., 0])

    held, free = likely(given), likely(jnp.zeros_like(given))
    assert held[given].mean() > free[given].mean() + 0.5
