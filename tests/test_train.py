"""The training loop: steps by hand, parts of a batch, learning, stopping and going on."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
import tiny as tiny_lib

from cosmos_jax import config as config_lib
from cosmos_jax import distributed, optimizer, pipeline
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.errors import UserError
from cosmos_jax.runner import open_run, run_stages
from cosmos_jax.stages import autoencoder
from cosmos_jax.stages.base import Stage, row_keys
from cosmos_jax.train import TrainState, init_state, make_step

# A linear model by hand


def linear_stage(**settings):
    """Least squares of 3 features; the "loss" of a row is weighted by its last id."""
    config = config_lib.base().diffusion
    config.update(settings)

    def losses(params, frozen, batch, key):
        error = batch["ids"][:, :3] @ params["w"] + params["b"] - frozen["target"][batch["rows"]]
        weight = batch["ids"][:, 3].astype(jnp.float32)
        return {
            "loss": (jnp.sum(weight * error**2), jnp.sum(weight)),
            "bias": (jnp.sum(error), jnp.float32(len(error))),
        }

    return Stage(
        name="linear",
        settings=config,
        init=lambda key, frozen: {"w": jnp.array([1.0, -2.0, 0.5]), "b": jnp.array(0.25)},
        features=lambda frozen, tokens: tokens,
        losses=losses,
        validation=losses,
        frozen={"target": jnp.linspace(-1, 1, 8)},
        statistics={},
        provenance={},
    )


def linear_batches(count):
    rng = np.random.default_rng(4)
    return [
        {"ids": rng.integers(1, 5, size=(8, 4)), "rows": rng.permutation(8)} for _ in range(count)
    ]


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_steps_of_a_linear_model_by_hand(parts):
    stage = linear_stage(accumulate=parts, ema_decay=0.6, steps=5)
    stage.settings.optimizer.update(
        learning_rate=0.1, final_learning_rate=0.1, warmup_steps=2, warmup_from=0.02, clip_norm=3.0
    )
    transform = optimizer.make(stage.settings.optimizer, 5)
    state = init_state(stage, transform, jax.random.key(0), stage.frozen)
    step = jax.jit(make_step(stage, transform))

    x_dim = np.array([1.0, -2.0, 0.5, 0.25])  # w and b
    first, second, average = np.zeros(4), np.zeros(4), x_dim
    for i, batch in enumerate(linear_batches(5), 1):
        state, values = step(state, stage.frozen, batch, jax.random.key(1))
        inputs = np.concatenate([batch["ids"][:, :3], np.ones((8, 1))], axis=1)
        weight = batch["ids"][:, 3] / batch["ids"][:, 3].sum()
        error = inputs @ x_dim - np.linspace(-1, 1, 8)[batch["rows"]]
        gradient = 2 * (weight * error) @ inputs
        norm = np.linalg.norm(gradient)
        np.testing.assert_allclose(values["loss"], weight @ error**2, rtol=1e-5)
        np.testing.assert_allclose(values["bias"], error.mean(), rtol=1e-5)
        np.testing.assert_allclose(values["gradient_norm"], norm, rtol=1e-5)

        gradient *= min(1, 3 / norm)
        first = 0.9 * first + 0.1 * gradient
        second = 0.98 * second + 0.02 * gradient**2
        direction = first / (1 - 0.9**i) / (np.sqrt(second / (1 - 0.98**i)) + 1e-6)
        rate = [0.02, 0.06, 0.1, 0.1, 0.1][i - 1]
        x_dim = x_dim - rate * (direction + 1e-5 * x_dim)
        momentum = min(0.6, (1 + i) / (10 + i))
        average = momentum * average + (1 - momentum) * x_dim

        for params, expected in ((state.params, x_dim), (state.ema, average)):
            found = np.append(params["w"], params["b"])
            np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5)
        assert state.step == i


# The gradients of both stages


@pytest.fixture(scope="module")
def opened(tiny, finished_pairs):
    """Both stages of a conditional run: the stage, its trained parameters, a batch, the model,
    and the `gradients` of that batch."""
    run = open_run(tiny.pairs_config(), finished_pairs)
    finished = pipeline.finished(run)
    model, weights = finished.model, finished.weights
    batch = run.training_batches(8, "test")(3)
    found = {}
    for name, parts in (
        ("autoencoder", ("compressor", "decompressor")),
        ("diffusion", ("denoiser", "condition_encoder")),
    ):
        stage, params = finished.stages[name], {part: weights[part] for part in parts}
        found[name] = stage, params, batch, model, gradients(stage, params, batch, 1)
    return found


def gradients(stage, params, batch, parts):
    """What a step of plain gradient descent with rate 1 subtracts, and the values it logs."""
    stage.settings.accumulate = parts
    transform = optax.sgd(1.0)
    step = jax.jit(make_step(stage, transform))
    state = TrainState(jnp.int32(6), params, None, transform.init(params))
    after, values = step(state, stage.frozen, batch, jax.random.key(2))
    stage.settings.accumulate = 1
    after = jax.device_get(after.params)
    return jax.tree.map(lambda a, b: np.asarray(a) - b, params, after), values


@pytest.mark.parametrize("name", ["autoencoder", "diffusion"])
def test_parts_of_a_batch_give_the_update_of_the_whole(opened, tiny, finished_pairs, name):
    stage, params, batch, _, (whole, values) = opened[name]
    if name == "autoencoder":
        still = values["loss"]
        run = open_run(tiny.pairs_config(autoencoder__dropout=0.2), finished_pairs)
        stage = pipeline.autoencoder_stage(run)[1]
        whole, values = gradients(stage, params, batch, 1)
        assert abs(values["loss"] - still) > 1e-3
    size = float(optax.tree.norm(whole))
    np.testing.assert_allclose(size, values["gradient_norm"], rtol=1e-3)
    assert size > 0.05
    found, found_values = gradients(stage, params, batch, 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), found, whole)
    np.testing.assert_allclose(found_values["gradient_norm"], optax.tree.norm(found), rtol=2e-6)
    for key in values:
        # Gradients within the bound above have norms further apart on one processor than another.
        rtol = 1e-5 if key == "gradient_norm" else 2e-6
        np.testing.assert_allclose(found_values[key], values[key], rtol=rtol)


def test_activations_computed_again_give_the_same_gradients(opened, tiny, finished_pairs):
    remat = {f"{stage}__remat": True for stage in ("autoencoder", "diffusion")}
    again = pipeline.finished(open_run(tiny.pairs_config(**remat), finished_pairs)).stages
    for name, stage in again.items():
        _, params, batch, _, (expected, _) = opened[name]
        found, _ = gradients(stage, params, batch, 1)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, expected
        )


def assert_gradients(found, expected):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), found, expected
    )


def test_a_step_of_the_autoencoder_by_hand(opened):
    stage, params, batch, model, (found, values) = opened["autoencoder"]
    frozen, mask = stage.frozen, jnp.array(batch["mask"])
    states = jax.jit(model.bert.apply)({"params": frozen["bert"]}, batch["ids"], mask)
    states = (states - frozen["states_mean"]) / frozen["states_std"]
    keys = row_keys(jax.random.fold_in(jax.random.key(2), 6), batch["rows"])
    keys = jax.vmap(lambda key: jax.random.split(key, 3)[0])(keys)
    seen, visible, keep = autoencoder.perturb(stage.settings, states, mask, keys, (4, 32))
    assert not np.array_equal(seen, states)
    assert not np.array_equal(visible, mask)

    def loss(params):
        latents = model.compressor.apply({"params": params["compressor"]}, seen, visible)
        predicted, logits = model.decompressor.apply(
            {"params": params["decompressor"]},
            jnp.where(keep, latents, 0),
            frozen["mask_embedding"],
        )
        chosen = jax.nn.one_hot(batch["ids"], 60)
        entropy = -jnp.sum(chosen * jax.nn.log_softmax(logits), axis=-1)
        error = jnp.sum((predicted - states) ** 2, axis=-1) / 32
        return jnp.mean((entropy + error)[batch["mask"]])

    expected, grads = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-5)
    assert_gradients(found, grads)


def test_a_step_of_the_diffusion_by_hand(opened):
    """Equations (1) of diffusion/loss.py and (5) of models/pointer.py without their helpers, with a
    first pass and dropout."""
    stage, params, batch, model, (found, values) = opened["diffusion"]
    frozen = stage.frozen
    features = jax.jit(stage.features)(frozen, batch)
    coin_key, row_key = jax.random.split(jax.random.fold_in(jax.random.key(2), 6))
    draws = []
    for row in batch["rows"]:
        source_key, noise_key = jax.random.split(jax.random.fold_in(row_key, row))
        time_key, eps_key = jax.random.split(noise_key)
        draws.append(
            (
                bool(jax.random.bernoulli(source_key, 0.5)),
                float(jax.random.uniform(time_key, minval=1e-5, maxval=1.0)),
                np.asarray(jax.random.normal(eps_key, (4, 32))),
            )
        )
    dropped, times, noise = (np.array(column) for column in zip(*draws, strict=True))
    assert 0 < dropped.sum() < 8
    alpha = 1 / np.sqrt(1 + (5 * np.tan(np.pi / 2 * times)) ** 2)
    x_0 = np.asarray(features["latents"])
    x_t = alpha[:, None, None] * x_0 + np.sqrt(1 - alpha**2)[:, None, None] * noise
    states, mask = np.array(features["source_states"]), np.array(batch["source_mask"])
    states[dropped], mask[dropped] = frozen["no_source_states"], frozen["no_source_mask"]
    common = np.zeros(mask.shape)
    for b in np.flatnonzero(~dropped):
        text, source = (
            np.asarray(batch[ids])[b][1 : batch[seen][b].sum() - 1]  # without [CLS] and [SEP]
            for ids, seen in (("ids", "mask"), ("source_ids", "source_mask"))
        )
        for p in range(mask.shape[1]):
            common[b, p] = sum(x == y for x, y in zip(text, source[p:], strict=False))
    wanted = common**4 / (1 + (common**4).sum(axis=1, keepdims=True))
    assert wanted.sum(axis=1).max() > 0.1

    def loss(params, self_conditioned):
        condition = model.condition_encoder.apply(
            {"params": params["condition_encoder"]}, states, mask
        )

        def denoise(c, method=None):
            inputs = (jnp.float32(x_t), jnp.float32(times), c, condition, mask)
            return model.denoiser.apply({"params": params["denoiser"]}, *inputs, method=method)

        c = jnp.zeros_like(x_0)
        c = jnp.where(self_conditioned, jax.lax.stop_gradient(denoise(c)), c)
        log_shares = jnp.where(mask, denoise(c, "point"), 0)
        pointing = -jnp.mean(jnp.sum(wanted * log_shares, axis=1))
        return jnp.mean((denoise(c) - x_0) ** 2) + pointing

    coin = jax.random.bernoulli(coin_key, 0.5)
    expected, grads = jax.jit(jax.value_and_grad(loss))(params, coin)
    np.testing.assert_allclose(values["loss"], expected, rtol=1e-4)
    assert_gradients(found, grads)


# Whole stages


def read_all(directory):
    """Step, items and metadata of the newest checkpoint."""
    items = ("step", "params", "optimizer", "statistics")
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.newest(
            dict.fromkeys(
                (*items, "ema")
                if (directory / str(checkpoints.steps()[0]) / "ema").exists()
                else items
            )
        )


def assert_same_run(workdir, other):
    for stage in ("autoencoder", "diffusion"):
        found, expected = read_all(workdir / stage), read_all(other / stage)
        assert found[0] == expected[0]
        assert found[2] == expected[2]
        tiny_lib.assert_trees_equal(found[1], expected[1])
    for name in ("samples.jsonl", "evaluation.json"):
        assert (workdir / name).read_text() == (other / name).read_text(), name
    # A stage trained again comes after the others.
    found, expected = (
        sorted((path / "metrics.jsonl").read_text().splitlines()) for path in (workdir, other)
    )
    assert found == expected


def stop_at(monkeypatch, calls, how):
    """Lets `distributed.preempted` answer at the calls with these numbers, by `how()`."""
    count = 0

    def preempted():
        nonlocal count
        count += 1
        return count in calls and how()

    monkeypatch.setattr(distributed, "preempted", preempted)
    return lambda: count


class Killed(BaseException):
    """Leaves the program at once, as far as that can be done from within."""


def kill():
    raise Killed


def test_few_texts_are_learnt(tiny, tmp_path):
    rows = tiny_lib.read_rows(tiny.texts / "train.jsonl")[:8]
    (tmp_path / "texts").mkdir()
    for split in tiny_lib.NUM_ROWS:
        tiny_lib.write_rows(tmp_path / "texts" / f"{split}.jsonl", rows)
    for stage in ("autoencoder", "diffusion"):
        run_stages(tiny.config(tmp_path / "texts"), tmp_path / "run", stage)
    lines = tiny_lib.read_rows(tmp_path / "run" / "metrics.jsonl")
    for stage, factor in (("autoencoder", 0.6), ("diffusion", 0.85)):
        losses = [
            line["validation_loss"]
            for line in lines
            if line["stage"] == stage and "validation_loss" in line
        ]
        assert losses[-1] < factor * losses[0]


def test_a_run_stopped_at_random_is_the_run_never_stopped(tiny, tmp_path, finished, monkeypatch):
    rng = np.random.default_rng()
    # Calls: 6 for the statistics, 80 steps, 6 and 30 for the second stage, 2 of generation.
    wanted = sorted({*rng.choice(np.arange(1, 123), size=4, replace=False).tolist(), 123})
    count = stop_at(monkeypatch, wanted, lambda: True)
    stops = 0
    while True:
        try:
            run_stages(tiny.config(), tmp_path)
            break
        except distributed.Preempted as stopped:
            stops += 1
            print(f"stopped at call {count()}: {stopped}")
        assert stops < 20
    assert stops >= 3, wanted
    assert_same_run(tmp_path, finished)


@pytest.mark.parametrize("call", [8, 100], ids=["before a save", "stage two"])
def test_a_run_killed_goes_on_from_the_checkpoint_before(
    tiny, tmp_path, finished, monkeypatch, call
):
    stop_at(monkeypatch, [call], kill)
    with pytest.raises(Killed):
        run_stages(tiny.config(), tmp_path)
    run_stages(tiny.config(), tmp_path)
    assert_same_run(tmp_path, finished)


def test_a_damaged_checkpoint_costs_only_its_steps(tiny, tmp_path, finished, monkeypatch, caplog):
    stop_at(monkeypatch, [6 + 50], lambda: True)
    with pytest.raises(distributed.Preempted, match="autoencoder is saved at step 50"):
        run_stages(tiny.config(), tmp_path)
    files = [p for p in (tmp_path / "autoencoder" / "50" / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:1000])
    run_stages(tiny.config(), tmp_path)
    assert "autoencoder/50 cannot be read" in caplog.text
    assert_same_run(tmp_path, finished)


def test_a_damaged_end_of_a_stage_is_trained_again(tiny, tmp_path, finished, caplog):
    workdir = shutil.copytree(finished, tmp_path / "run")
    files = [p for p in (workdir / "autoencoder" / "80" / "params").rglob("*") if p.is_file()]
    max(files, key=lambda path: path.stat().st_size).write_bytes(b"")
    for stage in ("diffusion", "generate"):
        with pytest.raises(UserError, match="--stage=autoencoder trains it again from step 60"):
            run_stages(tiny.config(), workdir, stage)
    run_stages(tiny.config(), workdir)
    assert "autoencoder/80 cannot be read" in caplog.text
    assert_same_run(workdir, finished)


def test_nothing_changes_where_all_checkpoints_are_damaged(tiny, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for path in workdir.glob("*/*/params/**/*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def files():
        """But those that say who is at work, and when."""
        others = (".lock", "config.json", "timing.jsonl", "report.html")
        paths = (path for path in workdir.rglob("*") if path.name not in others)
        return {path: path.is_file() and path.read_bytes() for path in paths}

    before = files()
    for stage in ("all", "generate"):
        with pytest.raises(UserError, match=r"none of the checkpoints \[80, 60\] can be read") as e:
            run_stages(tiny.config(), workdir, stage)
        assert "\n" not in str(e.value)
    assert files() == before


def test_the_best_checkpoint_is_kept_and_the_next_stage_uses_it(tiny, tmp_path, finished):
    """After it come steps so large that they undo what was learnt."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "diffusion")
    rates = {f"autoencoder__optimizer__{name}learning_rate": 0.5 for name in ("", "final_")}
    rewrite(workdir, **rates)
    config = tiny.config(
        autoencoder__steps=120,
        autoencoder__keep_checkpoints=1,
        autoencoder__best_metric="validation_loss",
        diffusion__steps=2,
        **rates,
    )
    for stage in ("autoencoder", "diffusion"):
        run_stages(config, workdir, stage)
    losses = {
        line["step"]: line["validation_loss"]
        for line in tiny_lib.read_rows(workdir / "metrics.jsonl")
        if line["stage"] == "autoencoder" and "validation_loss" in line and line["step"] >= 60
    }
    best = min(losses, key=losses.__getitem__)
    assert best in (60, 80)
    assert {path.name for path in (workdir / "autoencoder").iterdir()} == {str(best), "120"}
    assert read_all(workdir / "diffusion")[2]["autoencoder_step"] == best
    with Checkpoints(finished / "autoencoder", read_only=True) as checkpoints:
        expected = checkpoints.newest({"params": None}, best="validation_loss")[1]["params"]
    weights = pipeline.trained_autoencoder(open_run(config, workdir))[1]
    tiny_lib.assert_trees_equal({name: weights[name] for name in expected}, expected)


def test_a_loss_that_is_not_finite_stops_the_run(tiny, tmp_path):
    directory = shutil.copytree(tiny.encoder, tmp_path / "encoder")
    tensors = safetensors.numpy.load_file(directory / "model.safetensors")
    tensors["encoder.layer.1.output.LayerNorm.bias"][3] = np.nan
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    with pytest.raises(UserError, match="autoencoder: the loss is not finite at step 1; "):
        run_stages(tiny.config(encoder__name=str(directory)), tmp_path / "run")
    assert not list((tmp_path / "run" / "autoencoder").iterdir())


def rewrite(workdir, **recorded):
    """Fields of a run's recorded config."""
    path = workdir / "config.json"
    entries = config_lib.from_json(path.read_text())
    entries.update_from_flattened_dict(
        {name.replace("__", "."): value for name, value in recorded.items()}
    )
    path.write_text(config_lib.to_json(entries))


def continued(tiny, workdir, **recorded):
    """Asks for more steps of a run whose recorded config is rewritten."""
    rewrite(workdir, **recorded)
    run_stages(tiny.config(diffusion__steps=40, **recorded), workdir, "diffusion")


def test_a_checkpoint_of_another_model_is_refused(tiny, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    with pytest.raises(UserError, match=r"is of another model: .*layers_2.* has shape None there"):
        continued(tiny, workdir, diffusion__num_layers=4)


def test_a_checkpoint_of_other_texts_is_refused(tiny, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    texts = shutil.copytree(tiny.texts, tmp_path / "texts")
    tiny_lib.write_rows(texts / "valid.jsonl", [{"text": "the river sees the hill"}])
    with pytest.raises(UserError, match="checkpoint of step 30 was trained with data '"):
        continued(tiny, workdir, data__source=f"jsonl:{texts}")


def test_cached_features_train_the_same(tiny, tmp_path, finished):
    run_stages(tiny.config(data__cache_features=True), tmp_path)
    assert not (tmp_path / "cache").exists()
    found, expected = (
        tiny_lib.read_rows(workdir / "metrics.jsonl") for workdir in (tmp_path, finished)
    )
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        if theirs["step"] <= 20:
            np.testing.assert_allclose(ours.get("loss", 0), theirs.get("loss", 0), rtol=5e-3)
    assert found != expected  # halves were read
