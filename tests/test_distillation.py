"""Distillation against a numpy loop, an exact solution, and a trained teacher."""

import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_lib

import cosmos_jax
from cosmos_jax import pipeline, trained
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

TO_THE_END = {"diffusion__min_time": 0.05}


@pytest.fixture(scope="module")
def distilled(tiny, finished, tmp_path_factory):
    """The workdir of `finished` after all three stages."""
    workdir = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "distilled")
    run_stages(tiny.config(distillation__steps=80, **TO_THE_END), workdir)
    return workdir


@pytest.fixture(scope="module")
def taught_by(tiny, finished, tmp_path_factory):
    """The same without the student."""
    workdir = shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "taught_by")
    run_stages(tiny.config(**TO_THE_END), workdir, "generate")
    return workdir


def latents(config, workdir, sampler, steps):
    """Where a run's denoiser leads from noise that is always the same, [40, N, D]."""
    run = open_run(config, workdir)
    finished = pipeline.finished(run)
    shape = (40, run.config.autoencoder.num_latents, run.config.encoder.hidden_size)
    x_T = jax.random.normal(jax.random.key(3), shape)
    times = jnp.linspace(1, config.diffusion.min_time, steps + 1)

    @jax.jit
    def go(weights):
        def denoise(*inputs):
            return finished.model.denoise(weights, *inputs)

        return samplers.sample(denoise, SCHEDULE, sampler, x_T, times, jnp.zeros)

    return np.asarray(go(finished.weights))


def test_two_steps_of_the_student_end_where_those_of_the_teacher_do(tiny, distilled):
    student, teacher = (tiny.config(distillation__steps=n, **TO_THE_END) for n in (80, 0))
    learned = latents(student, distilled, "ddim", 2)
    few, goal = (latents(teacher, distilled, *how) for how in (("ddim", 2), ("dpmpp_2m", 64)))
    distances = [np.sqrt(np.mean((found - goal) ** 2)) for found in (learned, few)]
    assert distances[0] < 0.6 * distances[1], distances

    losses = [
        entry["validation_loss"]
        for entry in tiny_lib.read_rows(distilled / "metrics.jsonl")
        if "validation_loss" in entry and entry["stage"] == "distillation"
    ]
    assert losses[-1] < 0.5 * losses[0]


def test_it_is_what_writes(tiny, distilled, finished):
    """With the student's own steps, whatever those of its teacher are; and is scored as it."""
    samples = tiny_lib.read_rows(distilled / "samples.jsonl")
    model = cosmos_jax.load(distilled)
    assert [sample["text"] for sample in samples] == model.generate(len(samples))
    identity = json.loads((distilled / "generation.json").read_text())["identity"]
    assert (identity["sampler"], identity["num_sampling_steps"]) == ("ddim", 2)
    assert (identity["diffusion_step"], identity["distillation_step"]) == (30, 80)
    # Losses are those of the stages before it, as without it.
    scored, alone = (
        json.loads((workdir / "evaluation.json").read_text())["held_out"]
        for workdir in (distilled, finished)
    )
    assert scored == alone


def test_its_teacher_can_be_had(tiny, distilled, taught_by, tmp_path):
    teacher = cosmos_jax.load(distilled, distilled=False)
    same = cosmos_jax.load(taught_by)
    assert teacher.generate(4) == same.generate(4)
    assert teacher.generate(4, steps=5) == same.generate(4, steps=5)
    with pytest.raises(UserError, match=r"^steps cannot be chosen: .* to 2 steps; load"):
        cosmos_jax.load(distilled).generate(4, steps=5)

    export(distilled, tmp_path / "student")
    assert cosmos_jax.load(tmp_path / "student").generate(4) == cosmos_jax.load(distilled).generate(
        4
    )
    with pytest.raises(UserError, match="student: this export has its denoiser distilled only"):
        cosmos_jax.load(tmp_path / "student", distilled=False)
    card = (tmp_path / "student" / "README.md").read_text()
    assert "| distillation | 80 | 8 | 0.001 | 0.5 | the denoiser, its teacher in 8 steps |" in card
    assert "| diffusion | 30 |" in card

    assert "## Samples" in card
    export(distilled, tmp_path / "teacher", distilled=False)
    assert "## Samples" not in (tmp_path / "teacher" / "README.md").read_text()
    assert cosmos_jax.load(tmp_path / "teacher").generate(4) == teacher.generate(4)


def test_it_does_without_its_teacher(tiny, distilled, tmp_path):
    workdir = shutil.copytree(distilled, tmp_path / "run")
    shutil.rmtree(workdir / "diffusion")
    (workdir / "evaluation.json").unlink()
    assert cosmos_jax.load(workdir).generate(4) == cosmos_jax.load(distilled).generate(4)
    run_stages(tiny.config(distillation__steps=80, **TO_THE_END), workdir, "evaluate")
    found, before = (
        json.loads((path / "evaluation.json").read_text()) for path in (workdir, distilled)
    )
    assert found["held_out"] == {"autoencoder": before["held_out"]["autoencoder"]}
    assert found["scores"] == before["scores"]


def test_a_run_is_used_before_it_is_distilled(tiny, finished, caplog, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    config = tiny.config(distillation__steps=4)
    with pytest.raises(UserError, match="distillation holds no checkpoint: run --stage=distil"):
        run_stages(config, workdir, "generate")
    model = cosmos_jax.load(workdir)
    assert "is not distilled yet" in caplog.text
    assert model.generate(3) == cosmos_jax.load(finished).generate(3)


def test_it_goes_on_bit_for_bit_and_only_with_its_teacher(tiny, finished, tmp_path):
    whole, parts = (shutil.copytree(finished, tmp_path / name) for name in ("whole", "parts"))
    config = tiny.config(distillation__steps=6)
    run_stages(config, whole, "distillation")
    run_stages(tiny.config(distillation__steps=4), parts, "distillation")
    run_stages(config, parts, "distillation")
    tiny_lib.assert_trees_equal(*(_parameters(workdir) for workdir in (whole, parts)))

    # As it is, it is used whatever becomes of its teacher.
    more = {"diffusion__steps": 31}
    run_stages(tiny.config(distillation__steps=6, **more), whole, "diffusion")
    run_stages(tiny.config(distillation__steps=6, **more), whole, "generate")
    run_stages(tiny.config(distillation__steps=6, **more), whole, "evaluate")
    evaluation = json.loads((whole / "evaluation.json").read_text())
    assert set(evaluation["held_out"]) == {"autoencoder"}
    message = "learned from the denoiser at step 30, and that of .*diffusion is at step 31: delete"
    with pytest.raises(UserError, match=message):
        run_stages(tiny.config(distillation__steps=6, **more), whole, "distillation")
    with pytest.raises(UserError, match="was trained with diffusion_step 30, but here it is 31"):
        run_stages(tiny.config(distillation__steps=8, **more), whole, "distillation")
    message = r"config\.distillation\.num_sampling_steps is 4, but .* learned with 2: give that"
    with pytest.raises(UserError, match=message):
        run_stages(
            tiny.config(distillation__steps=8, distillation__num_sampling_steps=4),
            parts,
            "distillation",
        )


def _parameters(workdir):
    with Checkpoints(workdir / "distillation", read_only=True) as checkpoints:
        step, items, _ = checkpoints.newest({"params": None, "ema": None})
    return step, items


def test_it_is_sampled_as_it_learned(tiny, distilled):
    asked = tiny.config(distillation__steps=80, diffusion__min_time=0.3)
    message = (
        r"config\.diffusion\.min_time is 0\.3, but .*distillation learned with 0\.05: give that"
    )
    before = (distilled / "config.json").read_text()
    with pytest.raises(UserError, match=message):
        run_stages(asked, distilled, "generate")
    assert (distilled / "config.json").read_text() == before
    with pytest.raises(UserError, match=message):
        pipeline.finished(open_run(asked, distilled))
    asked = tiny.config(distillation__steps=80, distillation__num_sampling_steps=4, **TO_THE_END)
    message = r"config\.distillation\.num_sampling_steps is 4, but .* learned with 2"
    with pytest.raises(UserError, match=message):
        pipeline.finished(open_run(asked, distilled))


def test_what_was_not_begun_may_be_changed(tiny, finished, tmp_path):
    """A run of before there was this stage is distilled, in whatever way."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    recorded = json.loads((workdir / "config.json").read_text())
    del recorded["distillation"]
    (workdir / "config.json").write_text(json.dumps(recorded))
    assert cosmos_jax.load(workdir).generate(2) == cosmos_jax.load(finished).generate(2)
    fields = {"distillation__num_sampling_steps": 4, "distillation__batch_size": 4}
    run_stages(tiny.config(distillation__steps=2, **fields), workdir, "distillation")
    fields["distillation__batch_size"] = 8
    with pytest.raises(UserError, match=r"distillation\.batch_size is 4 there and 8 here"):
        run_stages(tiny.config(distillation__steps=2, **fields), workdir, "distillation")


def test_with_features_from_the_cache(tiny, finished_pairs, tmp_path):
    """Those of the denoiser, where there are sources; the same as computed anew."""
    found = []
    for cached in (False, True):
        config = tiny.pairs_config(distillation__steps=3, data__cache_features=cached)
        workdir = shutil.copytree(finished_pairs, tmp_path / str(cached))
        recorded = json.loads((workdir / "config.json").read_text())
        recorded["data"]["cache_features"] = cached
        (workdir / "config.json").write_text(json.dumps(recorded))
        run_stages(config, workdir, "distillation")
        assert not (workdir / "cache").exists()
        found.append(_parameters(workdir)[1]["params"])
    # In the cache they are fp16.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-3), *found)


def test_a_guided_teacher_is_asked_with_and_without_the_source(tiny, finished_pairs):
    config = tiny.pairs_config(diffusion__guidance=3.0)
    run = open_run(config, finished_pairs)
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
    run.config.diffusion.guidance = 1.0
    unguided = distillation.make(run.config, model, diffusion, params, step)
    assert unguided.losses(params, stage.frozen, batch, key)["loss"][0] < loss


def test_what_a_step_of_it_costs(tiny):
    """Three passes for each step of the student, one for each of an unguided teacher."""
    config = tiny.config(distillation__steps=1)
    flops = describe(config)["flops"]
    config.distillation.num_sampling_steps = 8
    of_denoiser = (describe(config)["flops"]["generated_text"] - flops["generated_text"]) / 6
    passes = config.distillation.batch_size * (3 * 2 + 8)
    assert flops["distillation_training_step"] == passes * of_denoiser
