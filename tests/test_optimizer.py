"""Optimiser, learning rates and moving average against PyTorch and values by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from cosmos_jax import config as config_lib
from cosmos_jax import optimizer

DECAYING = config_lib.base().autoencoder.optimizer  # 2e-4 to 1e-4
CONSTANT = config_lib.base().diffusion.optimizer


@pytest.mark.parametrize(
    ("step", "rate"),
    [
        (0, 1e-8),
        (500, (1e-8 + 2e-4) / 2),
        (1_000, 2e-4),
        (1_000 + 99_000 // 4, 1e-4 + 1e-4 * (1 + 0.5**0.5) / 2),
        (1_000 + 99_000 // 2, 1.5e-4),
        (100_000, 1e-4),
        (120_000, 1e-4),
    ],
)
def test_rate_rises_linearly_then_falls_as_a_cosine(step, rate):
    found = optimizer.learning_rate(DECAYING, 100_000)(step)
    np.testing.assert_allclose(found, rate, rtol=1e-5, atol=1e-11)


def test_equal_rates_are_constant_after_the_warm_up():
    rate = optimizer.learning_rate(CONSTANT, 200_000)
    for step in (1_000, 50_000, 200_000):
        np.testing.assert_allclose(rate(step), 2e-4, rtol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 600, 1_000])
def test_a_run_shorter_than_its_warm_up_only_rises(steps):
    rate = optimizer.learning_rate(DECAYING, steps)
    found = np.array([rate(step) for step in range(0, steps + 1, 100)])
    assert np.all(np.diff(found) > 0)
    np.testing.assert_allclose(rate(steps), 2e-4, rtol=1e-6)


def test_no_warm_up_starts_at_the_full_rate():
    config = DECAYING.copy_and_resolve_references()
    config.warmup_steps = 0
    np.testing.assert_allclose(optimizer.learning_rate(config, 10)(0), 2e-4, rtol=1e-6)


@pytest.mark.parametrize("gradient_scale", [0.01, 10.0], ids=["below the clip", "clipped"])
def test_steps_agree_with_torch(gradient_scale):
    config = CONSTANT.copy_and_resolve_references()
    config.warmup_steps, config.weight_decay = 2, 0.1
    rng = np.random.default_rng(0)
    start = {"matrix": rng.normal(size=(3, 4)), "vector": rng.normal(size=5)}
    gradients = [
        {name: gradient_scale * rng.normal(size=value.shape) for name, value in start.items()}
        for _ in range(6)
    ]

    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), start)
    transform = optimizer.make(config, steps=6)
    state = transform.init(params)

    theirs = {name: torch.nn.Parameter(torch.tensor(x)) for name, x in start.items()}
    adamw = torch.optim.AdamW(theirs.values(), betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1)

    for step, gradient in enumerate(gradients):
        updates, state = transform.update(
            jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), gradient), state, params
        )
        params = optax.apply_updates(params, updates)

        for name, parameter in theirs.items():
            parameter.grad = torch.tensor(gradient[name])
        torch.nn.utils.clip_grad_norm_(theirs.values(), 1.0)
        adamw.param_groups[0]["lr"] = (1e-8, (1e-8 + 2e-4) / 2, 2e-4, 2e-4, 2e-4, 2e-4)[step]
        adamw.step()

    for name, parameter in theirs.items():
        moved = np.asarray(params[name]) - start[name]
        np.testing.assert_allclose(moved, parameter.detach().numpy() - start[name], atol=3e-7)
        assert np.abs(moved).min() > 1e-5


@pytest.mark.parametrize(("step", "momentum"), [(1, 2 / 11), (8, 0.5), (90, 0.91), (10**6, 0.9999)])
def test_average_ramps_up_to_its_decay(step, momentum):
    old, new = {"a": jnp.array([1.0, 2.0])}, {"a": jnp.array([3.0, -2.0])}
    found = optimizer.ema_update(old, new, jnp.asarray(step), 0.9999)
    wanted = momentum * np.array([1.0, 2.0]) + (1 - momentum) * np.array([3.0, -2.0])
    np.testing.assert_allclose(found["a"], wanted, rtol=1e-5)


def test_no_decay_copies_the_parameters():
    found = optimizer.ema_update(jnp.zeros(3), jnp.arange(3.0), jnp.asarray(5), 0.0)
    np.testing.assert_array_equal(found, jnp.arange(3.0))
