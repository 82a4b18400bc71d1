"""Distillation against a numpy loop, an exact solution, and a trained teacher."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_lib

from configs import distill
from cosmos_jax import config_checks, pipeline, trained
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.describe import describe
from cosmos_jax.diffusion import samplers
from cosmos_jax.diffusion.distillation import distillation_errors
from cosmos_jax.diffusion.schedule import TanSchedule
from cosmos_jax.errors import UserError
from cosmos_jax.export import export
from cosmos_jax.runner import open_run, run_stages
from cosmos_jax.stages import distillation

SCHEDULE = TanSchedule(5.0)
TIMES = np.linspace(1, 0.05, 4)
B, N, D = 5, 3, 2


def alpha64(t):
    return 1 / np.sqrt(1 + (5 * np.tan(np.pi * t / 2)) ** 2) if t < 1 else 0.0


def sigma64(t):
    return np.sqrt(1 - alpha64(t) ** 2)


def lambda64(t):
    return np.log(alpha64(t) / sigma64(t)) if t < 1 else -np.inf


def teacher(x, t, c):
    return 0.5 * jnp.sin(x) + 0.3 * c - t[:, None, None]


def student(x, t, c):
    return 0.4 * jnp.cos(x) - 0.2 * c + t[:, None, None] ** 2


def noise():
    return np.random.default_rng(0).standard_normal((B, N, D)).astype(np.float32)


def errors(student, teacher, teacher_steps, times=TIMES):
    times = jnp.asarray(times, jnp.float32)
    return distillation_errors(
        student, teacher, SCHEDULE, jnp.asarray(noise()), times, teacher_steps
    )


def test_errors_against_a_loop_in_numpy():
    x, c, found = noise().astype(np.float64), np.zeros((B, N, D)), []
    for t, s in itertools.pairwise(TIMES):
        y, estimate, last = x, c, None
        inner = np.linspace(t, s, 5)
        for u, v in itertools.pairwise(inner):
            x_0 = 0.5 * np.sin(y) + 0.3 * estimate - u
            k = lambda64(v) - lambda64(u)
            # No slope without a finite step before.
            q = k / (2 * last) if last is not None and np.isfinite(last) else 0.0
            line = x_0 + q * (x_0 - estimate)
            y = sigma64(v) / sigma64(u) * y + alpha64(v) * (1 - np.exp(-k)) * line
            estimate, last = x_0, k
        x_0 = 0.4 * np.cos(x) - 0.2 * c + t**2
        eps = (x - alpha64(t) * x_0) / sigma64(t)
        # What the student would have had to say for its own step to end at y.
        r = sigma64(s) / sigma64(t)
        wanted = (y - r * x) / (alpha64(s) - r * alpha64(t))
        found.append(np.mean((wanted - x_0) ** 2, axis=(1, 2)))
        x, c = alpha64(s) * x_0 + sigma64(s) * eps, x_0
    np.testing.assert_allclose(errors(student, teacher, 4), np.mean(found, axis=0), rtol=2e-5)


def test_a_student_that_knows_the_solution_has_no_error():
    """Of data from N(mu, v) the flow keeps (x_t - alpha_t mu) / sqrt(alpha_t^2 v + sigma_t^2)."""
    mu, v = 0.7, 0.3

    def scale(t):
        return np.sqrt(alpha64(t) ** 2 * v + sigma64(t) ** 2)

    def posterior_mean(x, t, _):
        alpha, sigma = (part(t)[:, None, None] for part in (SCHEDULE.alpha, SCHEDULE.sigma))
        return mu + alpha * v / (alpha**2 * v + sigma**2) * (x - alpha * mu)

    def solution(x, t, _):
        answer = jnp.nan * x
        for start, end in itertools.pairwise(TIMES):
            x_s = alpha64(end) * mu + scale(end) / scale(start) * (x - alpha64(start) * mu)
            r = sigma64(end) / sigma64(start)
            estimate = (x_s - r * x) / (alpha64(end) - r * alpha64(start))
            at_start = jnp.abs(t - start)[:, None, None] < 1e-4
            answer = jnp.where(at_start, estimate, answer)
        return answer

    few, more, many = (
        float(jnp.mean(errors(solution, posterior_mean, steps))) for steps in (8, 16, 128)
    )
    assert many < 1e-5
    # The distance falls at least as the square of the teacher's steps: a solver of second order.
    assert few > 8 * more > 64 * many
    assert float(jnp.mean(errors(posterior_mean, posterior_mean, 128))) > 100 * many


def test_gradients_are_those_of_each_step_by_itself():
    """No step answers for what the ones before it led to, and none for the teacher."""

    def loss(weight, of_teacher):
        def weighed(x, t, c):
            return weight[jnp.int32(jnp.round((1 - t[0]) / 0.95 * 3))] * student(x, t, c)

        return jnp.mean(errors(weighed, lambda *inputs: of_teacher * teacher(*inputs), 2))

    weights, of_teacher = jnp.array([1.0, 0.9, 1.2]), jnp.float32(1.0)
    by_weight, by_teacher = jax.grad(loss, argnums=(0, 1))(weights, of_teacher)
    assert by_teacher == 0
    assert np.all(np.abs(by_weight) > 0)
    # With the errors of the later steps left out the first weight has the same gradient.
    first = jax.grad(
        lambda weight: jnp.mean(
            errors(lambda *inputs: weight * student(*inputs), teacher, 2, TIMES[:2])
        )
    )(weights[0])
    np.testing.assert_allclose(3 * by_weight[0], first, rtol=1e-5)


# The stage


def distilled(tiny, source, data=None, **fields):
    names = {"autoencoder__pretrained": str(source), "diffusion__pretrained": str(source)}
    own = {
        "diffusion__distilled_steps": 2,
        "diffusion__teacher_steps": 8,
        "diffusion__num_sampling_steps": 2,
        "diffusion__sampler": "ddim",
        "diffusion__guidance": 1.0,
        "diffusion__ema_decay": 0.5,
        "diffusion__optimizer__learning_rate": 1e-3,
        "diffusion__optimizer__final_learning_rate": 1e-3,
    }
    return tiny.config(data, **{**names, **own, **fields})


def latents(config, workdir, sampler, steps):
    """Where a run's denoiser leads from noise that is always the same, [40, N, D]."""
    run = open_run(config, workdir)
    finished = pipeline.finished(run)
    shape = (40, run.config.autoencoder.num_latents, run.config.encoder.hidden_size)
    x_T, times = jax.random.normal(jax.random.key(3), shape), jnp.linspace(1, 0.05, steps + 1)

    @jax.jit
    def go(weights):
        def denoise(*inputs):
            return finished.model.denoise(weights, *inputs)

        return samplers.sample(denoise, SCHEDULE, sampler, x_T, times, jnp.zeros)

    return np.asarray(go(finished.weights))


def test_two_steps_of_the_student_end_where_those_of_the_teacher_do(tiny, finished, tmp_path):
    config = distilled(tiny, finished, diffusion__steps=80, diffusion__min_time=0.05)
    run_stages(config, tmp_path / "run", "diffusion")
    learned = latents(config, tmp_path / "run", "ddim", 2)
    few, goal = (latents(tiny.config(), finished, *how) for how in (("ddim", 2), ("dpmpp_2m", 64)))
    distances = [np.sqrt(np.mean((found - goal) ** 2)) for found in (learned, few)]
    assert distances[0] < 0.6 * distances[1], distances

    losses = [
        entry["validation_loss"]
        for entry in tiny_lib.read_rows(tmp_path / "run" / "metrics.jsonl")
        if "validation_loss" in entry
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_it_goes_on_bit_for_bit_and_only_with_its_teacher(tiny, finished, tmp_path):
    teacher = shutil.copytree(finished, tmp_path / "teacher")
    config = distilled(tiny, teacher, diffusion__steps=6)
    run_stages(config, tmp_path / "whole", "diffusion")
    run_stages(distilled(tiny, teacher, diffusion__steps=4), tmp_path / "parts", "diffusion")
    run_stages(config, tmp_path / "parts", "diffusion")
    whole, parts = (_parameters(tmp_path / name) for name in ("whole", "parts"))
    tiny_lib.assert_trees_equal(whole, parts)

    # As it is, it is used without its teacher.
    moved = teacher.rename(tmp_path / "moved")
    run = open_run(config, tmp_path / "whole")
    run.config.autoencoder.pretrained = str(moved)
    assert pipeline.finished(run).identity["diffusion_step"] == 6
    moved.rename(teacher)
    run_stages(tiny.config(diffusion__steps=31), teacher, "diffusion")
    with pytest.raises(UserError, match="was trained with teacher_step 30, but here it is 31"):
        run_stages(distilled(tiny, teacher, diffusion__steps=8), tmp_path / "whole", "diffusion")


def _parameters(workdir):
    with Checkpoints(workdir / "diffusion", read_only=True) as checkpoints:
        step, items, _ = checkpoints.newest({"params": None, "ema": None})
    return step, items


def test_a_guided_teacher_is_asked_with_and_without_the_source(tiny, finished_pairs, tmp_path):
    fields = {
        f"diffusion__{name}": value
        for name, value in tiny.pairs_config().diffusion.items()
        if name in ("latent_positions", "time_gains", "pointer")
    }
    fields |= {"diffusion__teacher_guidance": 3.0, "diffusion__steps": 2}
    config = distilled(tiny, finished_pairs, tiny.pairs, **fields)
    run = open_run(config, tmp_path / "run")
    found = pipeline.diffusion_stage(run)
    model, diffusion = found.model, found.stages["diffusion"]
    step, params = trained.parameters(diffusion, run, finished_pairs / "diffusion")
    stage = distillation.make(run.config, model, diffusion, params, step)
    batch = stage.features(stage.frozen, run.training_batches(8, "diffusion")(0))
    key = jax.random.key(5)
    loss, weight = stage.losses(params, stage.frozen, batch, key)["loss"]

    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, batch["rows"])
    shape = (config.autoencoder.num_latents, run.config.encoder.hidden_size)
    x_T = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
    weights = {**stage.frozen, **params}
    states, mask = batch["source_states"].astype(jnp.float32), batch["source_mask"]
    empty = jnp.broadcast_to(weights["no_source_states"], states.shape)
    no_mask = jnp.broadcast_to(weights["no_source_mask"], mask.shape)

    def estimate(x, t, c, states, mask):
        return model.denoise(weights, x, t, c, model.encode_condition(weights, states, mask), mask)

    def guided(x, t, c):
        with_source, without = estimate(x, t, c, states, mask), estimate(x, t, c, empty, no_mask)
        return without + 3.0 * (with_source - without)

    times = jnp.linspace(1, config.diffusion.min_time, 3)
    error_B = distillation_errors(
        lambda *inputs: estimate(*inputs, states, mask), guided, SCHEDULE, x_T, times, 4
    )
    np.testing.assert_allclose(loss / weight, jnp.mean(error_B), rtol=1e-4)
    run.config.diffusion.teacher_guidance = 1.0
    unguided = distillation.make(run.config, model, diffusion, params, step)
    assert unguided.losses(params, stage.frozen, batch, key)["loss"][0] < loss


def test_the_config_of_a_finished_run(tiny, finished, tmp_path):
    """configs/distill.py, from the first command to an exported model that needs no teacher."""
    config = distill.get_config(str(finished))
    config_checks.validate(config)
    assert config.diffusion.num_sampling_steps == config.diffusion.distilled_steps == 4
    config.diffusion.steps = 2
    run_stages(config, tmp_path / "run")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert set(evaluation["held_out"]) == {"autoencoder"}
    export(tmp_path / "run", tmp_path / "exported")
    card = (tmp_path / "exported" / "README.md").read_text()
    assert f"| {finished.name}, its teacher in 24 steps |" in card
    run = pipeline.open_trained(tmp_path / "exported")
    assert run.config.diffusion.pretrained == ""
    assert pipeline.finished(run).identity["diffusion_step"] == 2
    with pytest.raises(UserError, match="exported: is already distilled; name the run of a"):
        distill.get_config(str(tmp_path / "exported"))
    with pytest.raises(UserError, match=r"nothing: no config\.json"):
        distill.get_config(str(tmp_path / "nothing"))


def test_what_a_step_of_it_costs(finished):
    """Three passes for each step of the student, one for each of an unguided teacher."""
    config = distill.get_config(str(finished))
    flops = describe(config)["flops"]
    config.diffusion.num_sampling_steps = 8
    of_denoiser = (describe(config)["flops"]["generated_text"] - flops["generated_text"]) / 4
    assert flops["diffusion_training_step"] == config.diffusion.batch_size * 36 * of_denoiser


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("distilled_steps", -1, "must be 0 or more"),
        ("sampler", "dpmpp_2m", "must be 'ddim', of a denoiser that learned to go in those steps"),
        ("num_sampling_steps", 50, "must be 2, of a denoiser"),
        ("guidance", 1.5, "must be 1.0, of a denoiser"),
        ("teacher_steps", 9, "must be a multiple of distilled_steps, 2"),
        ("best_metric", "validation_self_conditioned_loss", "must be empty or validation_loss"),
        ("pretrained", "", "name the folder of the teacher's run"),
    ],
)
def test_what_does_not_go_with_it_is_refused(tiny, finished, tmp_path, field, value, message):
    config = distilled(tiny, finished, **{f"diffusion__{field}": value})
    with pytest.raises(UserError, match=message):
        open_run(config, tmp_path / "run")
