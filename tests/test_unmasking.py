"""Generation by masked diffusion against the law of its steps, enumerated."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from random_params import random_params

from cosmos_jax import config as config_lib
from cosmos_jax.models import masked
from cosmos_jax.unmasking import make_generator, unmasking_steps

V, M = 3, 3  # tokens, and positions after the first
VOCABULARY = np.array([11, 4, 9], np.int32)
WEIGHTS = {
    "vocabulary": jnp.array(VOCABULARY),
    "head_index": jnp.zeros(12, jnp.int32).at[VOCABULARY].set(jnp.arange(V)),
    "start": jnp.int32(4),
}
TEXTS = list(itertools.product(range(V), repeat=M))


class Known:
    """Stands for the model: logits from a table of all states of a text; calls are counted."""

    mask_row = V

    def __init__(self, length=M + 1):
        size = (V + 1) ** M
        self.table = 2 * np.random.default_rng(0).normal(size=(size, length, V)).astype(np.float32)
        self.seen = []  # the texts of each call

    def hidden(self, weights, rows_BxL):
        jax.debug.callback(lambda rows: self.seen.append(np.array(rows)), rows_BxL, ordered=True)
        state_B = rows_BxL[:, 1 : M + 1] @ (V + 1) ** jnp.arange(M)[::-1]
        return jnp.asarray(self.table)[state_B]

    def logits(self, weights, hidden):
        return hidden

    def probabilities(self, state):
        """Of each token at each position after the first, in double precision."""
        index = int(np.ravel_multi_index(state, (V + 1,) * M))
        exp = np.exp(self.table[index, 1:].astype(float))
        return exp / exp.sum(axis=-1, keepdims=True)


def law(model, num_steps):
    """Probability of each text: MDLM's transitions, one step after the other, [V ** M].

    From t to s a mask stays with probability s / t, and is token v with (t - s) / t times p_v.
    """
    now = {(V,) * M: 1.0}
    for i in range(num_steps):
        t, s = 1 - i / num_steps, 1 - (i + 1) / num_steps
        after: dict[tuple[int, ...], float] = {}
        for state, weight in now.items():
            p = model.probabilities(state)
            choices = [
                [(V, s / t), *((v, (t - s) / t * p[at, v]) for v in range(V))]
                if token == V
                else [(token, 1.0)]
                for at, token in enumerate(state)
            ]
            for combination in itertools.product(*choices):
                tokens, factors = zip(*combination, strict=True)
                after[tokens] = after.get(tokens, 0.0) + weight * np.prod(factors)
        now = after
    return np.array([now[text] for text in TEXTS])


def generator(model, num_steps, length=M + 1):
    config = config_lib.base()
    config.data.max_length = length
    config.masked.num_sampling_steps = num_steps
    return jax.jit(make_generator(config, model))


def chi_square(counts, probabilities):
    expected = counts.sum() * probabilities
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_texts_follow_the_law_of_the_steps(num_steps):
    model = Known()
    keys = jax.random.split(jax.random.key(num_steps), 20_000)
    ids = np.asarray(generator(model, num_steps)(WEIGHTS, keys, None))
    assert ids.dtype == np.int32
    assert (ids[:, 0] == 4).all()
    rows = np.argmax(ids[:, 1:, None] == VOCABULARY, axis=-1)
    counts = np.bincount(rows @ V ** np.arange(M)[::-1], minlength=V**M)
    laws = {n: law(model, n) for n in (1, 2, 5)}
    for probabilities in laws.values():
        assert probabilities.sum() == pytest.approx(1)
    # 26 degrees of freedom; above 70 once in 100,000 runs.
    assert chi_square(counts, laws.pop(num_steps)) < 70
    for other in laws.values():
        assert chi_square(counts, other) > 200


def calls(num_steps, batch, length=M + 1):
    model = Known(length)
    keys = jax.random.split(jax.random.key(3), batch)
    jax.block_until_ready(generator(model, num_steps, length)(WEIGHTS, keys, None))
    jax.effects_barrier()
    return model.seen


def test_the_network_is_called_once_for_each_step_that_changes_something():
    length, num_steps, batch = 40, 50, 5
    seen = calls(num_steps, batch, length)
    hidden = np.array([[(rows == V).sum() for rows in texts] for texts in seen])  # [calls, batch]
    assert (hidden[0] == length - 1).all()
    # A text that is not done changes at each call; so no call is there twice for a text.
    assert (np.diff(hidden, axis=0)[hidden[1:] > 0] < 0).all()
    assert (hidden[-1] > 0).any()
    # 39 masks fall into some 27 of 50 steps: 50 (1 - (1 - 1/50)^39) = 27.3, deviation 2.
    assert 20 < len(seen) < 36
    for before, after in itertools.pairwise(seen):
        assert (before == after)[before != V].all(), "a token that was written has changed"


def test_as_many_calls_as_positions_or_steps_are_the_most():
    assert len(calls(num_steps=1, batch=4)) == 1
    assert len(calls(num_steps=10**6, batch=4)) == M


def test_steps_are_uniform_and_independent():
    steps = np.asarray(unmasking_steps(jax.random.split(jax.random.key(0), 9_000), 2, 3))
    counts = np.bincount(steps[:, 0] * 3 + steps[:, 1], minlength=9)
    assert chi_square(counts, np.full(9, 1 / 9)) < 35  # 8 degrees of freedom


@pytest.fixture(scope="module")
def conditional():
    """A model with a source, all weights random; its config and weights."""
    config = config_lib.base()
    config.dtype = "float32"
    config.encoder.update(
        dict(vocab_size=20, hidden_size=16, num_layers=1, num_heads=2, intermediate_size=32)
    )
    config.data.update(dict(conditional=True, max_length=9, max_source_length=6))
    config.masked.update(dict(num_layers=1, num_heads=2, num_sampling_steps=6))
    model = masked.build(config, 20)
    ids, mask = np.zeros((1, 6), np.int32), np.ones((1, 6), bool)
    parts = {
        "bert": random_params(model.bert, ids, mask),
        "masked_denoiser": random_params(model.denoiser, ids, np.zeros((1, 6, 16)), mask),
    }
    weights = {name: variables["params"] for name, variables in parts.items()}
    weights |= {"states_mean": np.zeros(16), "states_std": np.ones(16)}
    weights |= {"vocabulary": jnp.arange(20), "head_index": jnp.arange(20), "start": jnp.int32(2)}
    return SimpleNamespace(config=config, model=model, weights=weights)


def test_a_text_depends_on_its_key_and_source_alone(conditional):
    generate = jax.jit(make_generator(conditional.config, conditional.model))
    rng = np.random.default_rng(0)
    mask = np.arange(6) < np.array([6, 3, 4, 1])[:, None]
    ids = np.where(mask, rng.integers(1, 20, mask.shape), 0).astype(np.int32)
    keys = jax.random.split(jax.random.key(5), 4)
    texts = np.asarray(generate(conditional.weights, keys, (ids, mask)))
    assert len(np.unique(texts, axis=0)) == 4
    for i in range(4):
        alone = generate(conditional.weights, keys[i : i + 1], (ids[i : i + 1], mask[i : i + 1]))
        np.testing.assert_array_equal(alone[0], texts[i])
    # What is under the mask does not matter, what is not does.
    garbage = np.where(mask, ids, 7)
    np.testing.assert_array_equal(generate(conditional.weights, keys, (garbage, mask)), texts)
    other = generate(conditional.weights, keys, (np.where(mask, 7, 0).astype(np.int32), mask))
    assert (np.asarray(other) != texts).any(axis=1).sum() >= 2
