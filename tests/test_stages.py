"""What each stage minimises: perturbations by their rates, losses by hand in NumPy."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cosmos_jax import config as config_lib
from cosmos_jax.models.cosmos import inverse_vocabulary
from cosmos_jax.stages import autoencoder, diffusion
from cosmos_jax.stages.base import row_keys

B, L, N, D = 400, 9, 4, 6


def config(**fields):
    config = config_lib.base()
    config.update_from_flattened_dict({k.replace("__", "."): v for k, v in fields.items()})
    config.data.max_length = L
    config.encoder.hidden_size = D
    config.autoencoder.num_latents = N
    return config


def assert_share(hits, rate):
    """Within five standard deviations of a binomial with this rate."""
    hits = np.asarray(hits)
    assert abs(hits.mean() - rate) < 5 * np.sqrt(rate * (1 - rate) / hits.size)


# Perturbations of stage one


@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    states = rng.normal(size=(B, L, D)).astype(np.float32)
    mask = np.arange(L) < rng.integers(3, L + 1, size=(B, 1))
    return states, mask


def perturb(texts, **fields):
    settings = config(**{f"autoencoder__{k}": v for k, v in fields.items()}).autoencoder
    keys = row_keys(jax.random.key(3), jnp.arange(B))
    return jax.tree.map(np.asarray, autoencoder.perturb(settings, *texts, keys, (N, D)))


def test_rates_of_the_perturbations(texts):
    states, mask = texts
    seen, visible, keep = perturb(texts)
    assert not visible[~mask].any()
    hidden = mask & ~visible
    # The shares of texts that are masked and noised, and the rates within them.
    masked_B, noised_B = hidden.any(axis=1), (seen != states).any(axis=(1, 2))
    spared = 0.7 ** mask.sum(axis=1)  # masked, and yet every token is visible
    assert_share(masked_B, 0.5 * (1 - spared).mean())
    assert_share(noised_B, 0.5)
    assert_share(masked_B & noised_B, 0.25 * (1 - spared).mean())
    assert (seen != states)[noised_B].all()
    assert_share(~keep, 0.4)
    always = perturb(texts, masked_share=1.0)[1]
    assert_share(~always[mask], 0.3)
    # Each text has its own draws.
    assert len(np.unique(keep.reshape(B, -1), axis=0)) == B


def test_all_or_nothing(texts):
    states, mask = texts
    off = dict(masked_share=0.0, noised_share=0.0, latent_dropout=0.0)
    seen, visible, keep = perturb(texts, **off)
    np.testing.assert_array_equal(seen, states)
    np.testing.assert_array_equal(visible, mask)
    assert keep.all()
    seen, visible, keep = perturb(
        texts, masked_share=1.0, token_mask_rate=1.0, noised_share=0.0, latent_dropout=1.0
    )
    np.testing.assert_array_equal(seen, states)
    assert not visible.any()
    assert not keep.any()


def test_noise_is_mixed_in_with_a_variance_of_one(texts):
    states, _ = texts
    whole = perturb(texts, noised_share=1.0, activation_noise_delta=0.0)[0]  # noise alone
    mixed = perturb(texts, noised_share=1.0, activation_noise_delta=0.6)[0]
    np.testing.assert_allclose(mixed, 0.6 * states + 0.8 * whole, atol=1e-6)
    assert abs(whole.mean()) < 5 / np.sqrt(whole.size)
    assert abs(whole.std() - 1) < 5 / np.sqrt(2 * whole.size)
    assert abs((whole * states).mean()) < 5 / np.sqrt(whole.size)


def test_masked_states_may_be_zeroed(texts):
    states, mask = texts
    fields = dict(masked_share=1.0, token_mask_rate=0.5, noised_share=0.0)
    kept, visible, _ = perturb(texts, **fields)
    zeroed, same_visible, _ = perturb(texts, zero_masked_states=True, **fields)
    hidden = mask & ~visible
    assert hidden.any()
    np.testing.assert_array_equal(visible, same_visible)
    np.testing.assert_array_equal(kept, states)
    assert not zeroed[hidden].any()
    np.testing.assert_array_equal(zeroed[visible], states[visible])


# Losses of stage one


@dataclasses.dataclass
class Decoded:
    """Stands for the model: what comes out does not depend on what goes in."""

    predicted: Any
    logits: Any

    def compress(self, weights, states, mask, dropout_keys=None):
        return jnp.zeros((len(states), N, D))

    def decompress(self, weights, latents, dropout_keys=None):
        return self.predicted, self.logits


VOCABULARY = np.array([0, 1, 2, 4, 7], np.int32)  # 1 is [UNK]; 3, 5 and 6 cannot be said
UNK = 1


@pytest.fixture
def decoded():
    """Texts of 3, 5, 2 and 4 tokens, the last one padding of the batch."""
    rng = np.random.default_rng(5)
    ids = np.array([[2, 7, 4, 0, 0], [2, 7, 3, 1, 4], [2, 4, 0, 0, 0], [2, 7, 7, 4, 0]], np.int32)
    mask = np.arange(5) < np.array([[3], [5], [2], [4]])
    states, predicted = rng.normal(size=(2, 4, 5, D)).astype(np.float32)
    logits = rng.normal(size=(4, 5, 5)).astype(np.float32)
    rows = {token: row for row, token in enumerate(VOCABULARY)}
    # Right everywhere in text 0 and all but one token of text 1, where 3 is answered with
    # [UNK]; in text 2 [SEP] is wrong, in text 3 all is right.
    for text, answers in enumerate(([2, 7, 4], [2, 7, 1, 1, 4], [2, 7], [2, 7, 7, 4])):
        for position, token in enumerate(answers):
            logits[text, position, rows[token]] = 6
    model = Decoded(jnp.array(predicted), jnp.array(logits))
    frozen = {
        "vocabulary": jnp.array(VOCABULARY),
        "head_index": jnp.array(inverse_vocabulary(VOCABULARY, 8, UNK)),
    }
    stage = autoencoder.make(config(autoencoder__alignment_weight=0.3), model, frozen, {}, "")
    batch = {"ids": ids, "mask": mask, "states": states, "rows": np.arange(4)}
    return SimpleNamespace(stage=stage, frozen=frozen, batch=batch, model=model)


def by_hand(decoded, texts):
    """Crossentropy and squared error, token by token."""
    entropies, errors = [], []
    batch, rows = decoded.batch, {token: row for row, token in enumerate(VOCABULARY)}
    for b in texts:
        for position in range(int(batch["mask"][b].sum())):
            scores = np.asarray(decoded.model.logits)[b, position].astype(float)
            target = rows.get(batch["ids"][b, position], rows[UNK])
            entropies.append(np.log(np.exp(scores).sum()) - scores[target])
            difference = np.asarray(decoded.model.predicted)[b, position].astype(float)
            difference = difference - batch["states"][b, position]
            errors.append((difference**2).mean())
    return np.mean(entropies), np.mean(errors)


def values(losses, frozen, batch):
    """What a stage's losses or validation say of a batch."""
    sums = jax.jit(losses)({}, frozen, batch, jax.random.key(0))
    return {name: float(total) / float(weight) for name, (total, weight) in sums.items()}


def test_loss_is_a_mean_over_tokens_with_sep_and_without_pad(decoded):
    found = values(decoded.stage.losses, decoded.frozen, decoded.batch)
    crossentropy, error = by_hand(decoded, range(4))
    np.testing.assert_allclose(found["crossentropy"], crossentropy, rtol=1e-5)
    np.testing.assert_allclose(found["alignment"], error, rtol=1e-5)
    np.testing.assert_allclose(found["loss"], crossentropy + 0.3 * error, rtol=1e-5)
    assert found["token_accuracy"] == pytest.approx(12 / 14)
    assert found["exact_match"] == pytest.approx(2 / 4)


def test_rows_that_fill_a_batch_do_not_count(decoded):
    batch = {**decoded.batch, "real": np.array([True, True, True, False])}
    found = values(decoded.stage.validation, decoded.frozen, batch)
    crossentropy, error = by_hand(decoded, range(3))
    np.testing.assert_allclose(found["crossentropy"], crossentropy, rtol=1e-5)
    np.testing.assert_allclose(found["alignment"], error, rtol=1e-5)
    # Of 10 tokens a wrong [SEP] and one that the head cannot say.
    assert found["token_accuracy"] == pytest.approx(8 / 10)
    assert found["exact_match"] == pytest.approx(1 / 3)


def test_sums_of_parts_add_up(decoded):
    def losses(texts):
        batch = {name: value[texts] for name, value in decoded.batch.items()}
        model = Decoded(decoded.model.predicted[texts], decoded.model.logits[texts])
        stage = autoencoder.make(config(), model, decoded.frozen, {}, "")
        return jax.jit(stage.losses)({}, decoded.frozen, batch, jax.random.key(0))

    whole, parts = losses(slice(4)), (losses(slice(1)), losses(slice(1, 4)))
    added = jax.tree.map(lambda *sums: sum(sums), *parts)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), whole, added)


# Stage two


@dataclasses.dataclass
class Revealing:
    """Stands for a denoiser whose error says what it was given."""

    conditional: bool

    def encode_condition(self, params, states, mask):
        return states

    def denoise(self, params, x, t, self_condition, states=None, mask=None):
        if not self.conditional:
            return 1 + self_condition
        level = jnp.mean(states, axis=(1, 2)) + 10 * mask[:, -1]
        return jnp.broadcast_to(level[:, None, None], x.shape)


def diffusion_losses(conditional, batch, count, **fields):
    """Losses of the stage for `count` keys."""
    frozen = {"no_source_states": jnp.full((3, D), 2.0), "no_source_mask": jnp.arange(3) < 2}
    stage = diffusion.make(
        config(**{f"diffusion__{k}": v for k, v in fields.items()}),
        Revealing(conditional),
        frozen,
        {},
        "",
        0,
    )
    keys = jax.random.split(jax.random.key(1), count)
    losses = jax.jit(jax.vmap(lambda key: stage.losses({}, frozen, batch, key)["loss"][0]))
    return np.asarray(losses(keys)), stage, frozen


def test_a_share_of_the_batches_is_self_conditioned():
    batch = {"latents": jnp.zeros((2, N, D)), "rows": jnp.arange(2)}
    # The estimate is 1, or 2 after a first pass that saw zeros and said 1.
    losses, stage, frozen = diffusion_losses(False, batch, 600, self_condition_rate=0.3)
    assert set(losses) == {2.0, 8.0}
    assert_share(losses == 8, 0.3)
    batch["real"] = jnp.array([True, False])
    assert values(stage.validation, frozen, batch) == {
        "loss": 1.0,
        "self_conditioned_loss": 4.0,
    }


def test_a_share_of_the_sources_becomes_the_empty_one():
    num_texts = 25
    batch = {
        "latents": jnp.zeros((num_texts, N, D)),
        "rows": jnp.arange(num_texts),
        "source_states": jnp.ones((num_texts, 3, D)),
        "source_mask": jnp.ones((num_texts, 3), bool),
    }
    # The error is 2^2 of an empty source and (1 + 10)^2 of its own; their mixtures are neither.
    losses, stage, frozen = diffusion_losses(True, batch, 40, source_dropout_rate=0.2)
    dropped = (121 * num_texts - losses) / (121 - 4)
    np.testing.assert_allclose(dropped, np.round(dropped), atol=1e-3)
    total = np.round(dropped).sum()
    assert_share(np.arange(40 * num_texts) < total, 0.2)
    assert len(np.unique(np.round(dropped))) > 3
    batch["real"] = jnp.ones(num_texts, bool)
    assert values(stage.validation, frozen, batch)["loss"] == 121
    kept, _, _ = diffusion_losses(True, batch, 3, source_dropout_rate=0.0)
    np.testing.assert_array_equal(kept, 121 * num_texts)


def test_the_target_is_the_latents():
    latents = jnp.array(np.random.default_rng(2).normal(size=(2, N, D)), jnp.float32)
    batch = {"latents": latents, "rows": jnp.arange(2)}
    losses, _, _ = diffusion_losses(False, batch, 1, self_condition_rate=0.0)
    expected = ((np.asarray(latents, float) - 1) ** 2).mean(axis=(1, 2)).sum()
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
