"""The command: what a run leaves, going on, refusing, and describing."""

import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny as tiny_lib

from cosmos_jax import config as config_lib
from cosmos_jax import config_checks
from cosmos_jax.baselines import BASELINES, MAKE_GENERATOR
from cosmos_jax.describe import describe
from cosmos_jax.errors import UserError
from cosmos_jax.runner import run_stages

ROOT = Path(__file__).parents[1]


@pytest.fixture(params=["texts", "pairs"])
def complete(request, tiny):
    """A finished run, unconditional and conditional: its folder, config and data."""
    if request.param == "texts":
        return request.getfixturevalue("finished"), tiny.config(), tiny.texts
    return request.getfixturevalue("finished_pairs"), tiny.pairs_config(), tiny.pairs


def test_what_a_run_leaves(complete, tiny):
    workdir, asked, data = complete
    conditional = data == tiny.pairs
    names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")}
    assert names - {"tensorboard"} == {
        "config.json",
        "autoencoder",
        "diffusion",
        "metrics.jsonl",
        "samples.jsonl",
        "generation.json",
        "evaluation.json",
        "examples.json",
        "timing.jsonl",
        "report.html",
    }
    # The last two checkpoints of each stage.
    for stage, steps in (("autoencoder", {"60", "80"}), ("diffusion", {"20", "30"})):
        assert {path.name for path in (workdir / stage).iterdir()} == steps

    for stage, metrics in config_lib.METRICS.items():
        names = {f"validation_{name}" for name in metrics}
        if stage == "diffusion" and asked.diffusion.pointer:
            names.add("validation_pointer")
        lines = tiny_lib.read_rows(workdir / "metrics.jsonl")
        for line in lines:
            if line["stage"] == stage and "validation_loss" in line:
                assert line.keys() == {"stage", "step", *names}

    # What was asked for, with the encoder's sizes and whether there are sources.
    expected = config_lib.flatten(asked) | {
        "data.conditional": conditional,
        "encoder.vocab_size": 60,
        "encoder.hidden_size": 32,
        "encoder.num_layers": 2,
        "encoder.num_heads": 4,
        "encoder.intermediate_size": 64,
        "encoder.max_positions": 14,
        "encoder.type_vocab_size": 2,
        "encoder.layer_norm_eps": 1e-12,
        "encoder.activation": "gelu",
    }
    recorded = config_lib.from_json((workdir / "config.json").read_text())
    assert config_lib.flatten(recorded) == expected

    lines = tiny_lib.read_rows(workdir / "metrics.jsonl")
    logged, validated = (
        [(e["stage"], e["step"]) for e in lines if ("validation_loss" in e) == validation]
        for validation in (False, True)
    )
    assert logged == [
        *(("autoencoder", step) for step in range(10, 81, 10)),
        *(("diffusion", step) for step in (10, 20, 30)),
    ]
    assert validated == [
        *(("autoencoder", step) for step in range(0, 81, 20)),
        *(("diffusion", step) for step in (0, 20, 30)),
    ]
    for entry in lines:
        assert all(isinstance(v, int | float) for k, v in entry.items() if k != "stage")

    rows = tiny_lib.read_rows(data / "test.jsonl")
    samples = tiny_lib.read_rows(workdir / "samples.jsonl")
    assert len(samples) == 6
    for sample, row in zip(samples, rows, strict=False):
        assert set(sample["text"].split()) <= {*tiny_lib.WORDS}
        assert len(sample["text"].split()) <= 12
        if conditional:
            assert sample == {
                "text": sample["text"],
                "source": row["source"],
                "reference": row["target"],
            }
        else:
            assert list(sample) == ["text"]
    assert len({sample["text"] for sample in samples}) > 1

    generation = json.loads((workdir / "generation.json").read_text())
    assert generation["identity"]["sampler"] == "euler_sde"
    assert generation["identity"]["diffusion_step"] == 30


def test_evaluation_of_a_run(complete, tiny):
    workdir, _, data = complete
    content = (workdir / "samples.jsonl").read_bytes()
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    assert evaluation["identity"]["samples_sha256"] == hashlib.sha256(content).hexdigest()
    losses = evaluation["held_out"]["autoencoder"]
    assert losses["loss"] == pytest.approx(losses["crossentropy"] + losses["alignment"])
    assert 0 < losses["token_accuracy"] < 1
    assert 0 < evaluation["held_out"]["diffusion"]["loss"] < 2

    field = "target" if data == tiny.pairs else "text"
    texts = {
        split: [row[field] for row in tiny_lib.read_rows(data / f"{split}.jsonl")]
        for split in tiny_lib.NUM_ROWS
    }
    generated = [json.loads(line)["text"] for line in content.splitlines()]
    summary, scores = evaluation["texts"], evaluation["scores"]
    assert summary["generated"]["count"] == 6
    assert summary["generated"]["empty"] == generated.count("")
    said = [text for text in generated if text]
    assert scores["diversity"]["value"] == pytest.approx(diversity(said))
    assert scores["diversity"]["real"] == pytest.approx(diversity(texts["test"][: len(said)]))
    seen = set().union(*(ngrams(text, 4) for text in texts["train"]))
    counts = sum((ngrams(text, 4) for text in generated), Counter())
    known = sum(count for ngram, count in counts.items() if ngram in seen)
    assert scores["memorisation"]["value"] == pytest.approx(known / max(1, counts.total()))
    assert ("bleu" in scores) == ("rouge1" in scores) == (data == tiny.pairs)
    assert scores["latent_frechet"]["value"] > scores["latent_frechet"]["real"]
    assert {score["protocol"] for score in scores.values()} == {"offline", "latents"}
    assert "at least 50" in evaluation["problems"]["encoder_mauve"]


def test_examples_of_a_run(complete, tiny):
    """Tokens are marked by what came back, and a path ends at what its texts come back as."""
    workdir, _, data = complete
    field = "target" if data == tiny.pairs else "text"
    test = [row[field] for row in tiny_lib.read_rows(data / "test.jsonl")]
    examples = json.loads((workdir / "examples.json").read_text())
    assert examples["real"] == test[: len(examples["real"])]
    answers = []
    for text, example in zip(test, examples["reconstructions"], strict=False):
        assert example["text"] == text
        assert " ".join(token for token, _, _ in example["tokens"]) == text
        assert all(right == (token == answer) for token, right, answer in example["tokens"])
        answers.append([answer for _, _, answer in example["tokens"]])
    share = np.mean([right for e in examples["reconstructions"] for _, right, _ in e["tokens"]])
    assert 0 <= share < 1
    path = examples["interpolation"]["path"]
    assert [step["weight"] for step in path] == pytest.approx(np.linspace(0, 1, 7))
    for step, answer in ((path[0], answers[0]), (path[-1], answers[1])):
        # Decoding ends at the first [SEP], which may come before or after the text's own.
        said = step["text"].split()
        n = min(len(said), len(answer))
        assert said[:n] == answer[:n]


def ngrams(text, n):
    words = text.split()
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def diversity(texts):
    product = 1.0
    for n in (2, 3, 4):
        counts = sum((ngrams(text, n) for text in texts), Counter())
        product *= len(counts) / max(1, counts.total())
    return product


def state(workdir):
    """Every file with its content and time, but those that say who is at work."""
    return {
        path.relative_to(workdir): (path.stat().st_mtime_ns, path.read_bytes())
        for path in workdir.rglob("*")
        if path.is_file() and path.name not in (".lock", "config.json")
    }


def test_a_finished_run_finds_its_work_done(complete, capsys, monkeypatch):
    workdir, config, _ = complete
    before = state(workdir)
    assert len(before) > 20
    # Nothing is trained or sampled: the functions that would are not there.
    monkeypatch.delattr("cosmos_jax.train.make_step")
    monkeypatch.delitem(MAKE_GENERATOR, "cosmos")
    monkeypatch.delattr("cosmos_jax.evaluation.held_out_sums")
    run_stages(config, workdir)
    assert state(workdir) == before
    table = capsys.readouterr().out
    evaluation = json.loads((workdir / "evaluation.json").read_text())
    metrics = tiny_lib.read_rows(workdir / "metrics.jsonl")
    (row,) = [line for line in table.splitlines() if line.startswith("autoencoder validation loss")]
    losses = [
        line["validation_loss"]
        for line in metrics
        if line["stage"] == "autoencoder" and "validation_loss" in line
    ]
    assert row.split()[-2:] == [f"{losses[0]:.4f}", f"{losses[-1]:.4f}"]
    (row,) = [line for line in table.splitlines() if line.startswith("diversity")]
    score = evaluation["scores"]["diversity"]
    assert row.split()[1] == f"{score['value']:.4f}"
    assert row.split()[-2:] == [f"{score['real']:.4f}", "offline"]
    for sample in tiny_lib.read_rows(workdir / "samples.jsonl")[:5]:
        assert sample["text"] in table
        assert sample.get("source", "") in table


@pytest.mark.parametrize(
    ("stage", "missing"),
    [
        ("diffusion", "--stage=autoencoder"),
        ("generate", "--stage=autoencoder"),
        ("evaluate", "--stage=generate"),
    ],
)
def test_a_stage_says_which_one_is_missing(tiny, tmp_path, stage, missing):
    with pytest.raises(UserError, match=f"run {missing} first"):
        run_stages(tiny.config(), tmp_path, stage)


def test_a_stage_that_is_not_finished(tiny, finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "diffusion")
    with pytest.raises(UserError, match="at step 80 of 90: finish it with --stage=autoencoder"):
        run_stages(tiny.config(autoencoder__steps=90), workdir, "diffusion")
    with pytest.raises(UserError, match="run --stage=diffusion first"):
        run_stages(tiny.config(), workdir, "generate")


def test_rows_decide_whether_texts_have_sources(tiny, tmp_path):
    for data, conditional in ((tiny.texts, False), (tiny.pairs, True)):
        run = tiny.run(tmp_path, data, data__conditional=not conditional)
        assert run.config.data.conditional is conditional


def test_a_pointer_needs_something_to_point_into(tiny, tmp_path):
    with pytest.raises(UserError, match=r"config\.diffusion\.pointer is True, .*no sources"):
        tiny.run(tmp_path, tiny.texts, diffusion__pointer=True)
    tiny.run(tmp_path, tiny.texts, diffusion__pointer=True, system="masked")
    tiny.run(tmp_path, tiny.pairs, diffusion__pointer=True)


def test_another_config_is_refused_by_its_field(tiny, finished):
    before = state(finished)
    with pytest.raises(
        UserError, match=r"another config: autoencoder\.num_latents is 4 there and 5 here"
    ):
        run_stages(tiny.config(autoencoder__num_latents=5), finished)
    assert state(finished) == before


def test_more_steps_and_other_generation_are_accepted(tiny, finished_pairs, tmp_path):
    workdir = shutil.copytree(finished_pairs, tmp_path / "run")
    first = (workdir / "samples.jsonl").read_text()
    before = state(workdir / "autoencoder")
    # Texts do not depend on the size of the batch, nor on how many there are.
    config = tiny.pairs_config(generate__batch_size=3, generate__num_texts=99)
    run_stages(config, workdir, "generate")
    second = (workdir / "samples.jsonl").read_text()
    assert second.startswith(first)
    assert len(second.splitlines()) == tiny_lib.NUM_ROWS["test"]

    run_stages(tiny.pairs_config(diffusion__steps=34), workdir)
    assert state(workdir / "autoencoder") == before
    assert (workdir / "diffusion" / "34").is_dir()
    assert len((workdir / "samples.jsonl").read_text().splitlines()) == 6
    for name in ("generation.json", "evaluation.json"):
        assert json.loads((workdir / name).read_text())["identity"]["diffusion_step"] == 34
    steps = [e["step"] for e in tiny_lib.read_rows(workdir / "metrics.jsonl")]
    assert steps[-2:] == [34, 34]


def test_another_run_lends_its_autoencoder(tiny, finished, tmp_path):
    before = state(finished)
    run_stages(tiny.config(autoencoder__pretrained=str(finished)), tmp_path / "run")
    assert state(finished) == before
    assert not (tmp_path / "run" / "autoencoder").exists()
    for name in ("samples.jsonl", "evaluation.json"):
        assert (tmp_path / "run" / name).read_text() == (finished / name).read_text()
    with pytest.raises(UserError, match=r"autoencoder\.pretrained: .* holds no checkpoint"):
        run_stages(tiny.config(autoencoder__pretrained=str(tmp_path)), tmp_path / "other")


# Command line


def command(*arguments, code):
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_jax.main", *arguments],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.diffusion.stpes=3"], "steps"),
        (["more"], "unexpected argument 'more'"),
        (["--workdir=gs://bucket/run"], "gs://bucket/run is not a folder: mount that storage"),
    ],
)
def test_bad_arguments_are_one_line(tmp_path, arguments, message):
    workdir = tmp_path / "run"
    common = ("--config=configs/wikipedia.py", f"--workdir={workdir}")
    done = command(*common, *arguments, code=2)
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not workdir.exists()


PAPER = {
    "compressor": 99_287_040,
    "decompressor": 126_266_162,
    "denoiser": 129_801_216,
}


def test_describe_on_the_command_line():
    """On eight devices, of which there is one here, as README's table says."""
    flags = ("--config=configs/wikipedia.py", "--config.mesh.fsdp=8")
    done = command(*flags, "--stage=describe", code=0)
    description = json.loads(done.stdout.splitlines()[-1])
    assert "condition_encoder" not in description["parameters"]
    assert description["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    readme = (ROOT / "README.md").read_text()
    for stage in ("autoencoder", "diffusion", "distillation"):
        held = f"{sum(description['bytes_per_device'][stage].values()) / 1e9:.2f}"
        (row,) = [line for line in readme.splitlines() if line.startswith(f"| {stage}: parameters")]
        assert row.split("|")[4].strip() == held


OTHERS = {"workdir", "benchmark"}  # are not of a task
CONFIGS = sorted(p.stem for p in (ROOT / "configs").glob("*.py") if p.stem not in OTHERS)
CONDITIONAL = {"detoxify", "question", "summarize"}


def load_config(name, *arguments):
    path = ROOT / "configs" / f"{name}.py"
    namespace: dict = {"__file__": str(path)}
    exec(path.read_text(), namespace)
    return namespace["get_config"](*arguments)


def test_the_faithful_configs_are_the_paper():
    config = load_config("faithful", "wikipedia")
    config_checks.validate(config)
    description = describe(config)
    counts = description["parameters"]
    assert {name: counts[name] for name in PAPER} == PAPER
    assert "distillation_training_step" not in description["flops"]
    assert "distillation" not in description["bytes_per_device"]
    expected = {"sampler": "euler_sde", "num_sampling_steps": 200, "guidance": 1.0}
    assert expected.items() <= config_lib.sampling(config).items()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_at_its_full_size(name):
    config = load_config(name)
    config_checks.validate(config)
    description = describe(config)
    counts, memory = description["parameters"], description["bytes_per_device"]
    assert ("condition_encoder" in counts) == (name in CONDITIONAL)
    if name == "summarize":
        assert counts["denoiser"] == 158_112_768
        assert counts["condition_encoder"] == 113_265_408
        assert counts["condition_positions"] == 512 * 768
    elif name not in CONDITIONAL | {"quickstart"}:
        assert counts["denoiser"] == PAPER["denoiser"]
    # Parameters of 4 bytes, an average of them for the diffusion, two moments and counts.
    trained = {
        "autoencoder": counts["compressor"] + counts["decompressor"],
        "diffusion": sum(
            counts.get(part, 0) for part in ("denoiser", "condition_encoder", "condition_positions")
        ),
    }
    if name != "faithful":
        trained["distillation"] = trained["diffusion"]
    for stage, number in trained.items():
        assert memory[stage]["params"] == 4 * number
        assert memory[stage]["ema"] == (0 if stage == "autoencoder" else 4 * number)
        assert 0 <= memory[stage]["optimizer"] - 8 * number < 100
    # 2 operations for each weight and token: at least the weights' share must be there.
    tokens = config.data.max_length * config.autoencoder.batch_size
    assert description["flops"]["autoencoder_training_step"] > 6 * counts["compressor"] * tokens / 4


@pytest.mark.parametrize("name", ["quickstart", "sentences", "synopses"])
def test_the_configs_of_the_demos(name):
    config, own = load_config(f"demo/{name}"), load_config("demo/sentences")
    config_checks.validate(config)
    counts = describe(config)["parameters"]
    assert ("condition_encoder" in counts) == (name == "synopses")
    if name == "quickstart":  # a denoiser of the same latents
        own.autoencoder.pretrained = config.autoencoder.pretrained
        assert describe(own)["parameters"] == counts


def test_a_shallow_decompressor():
    """3 of 12 layers, each of 6 d^2 in attention, 8 d^2 in the MLP and some vectors."""
    config = load_config("rocstories")
    counts, width = describe(config)["parameters"], config.encoder.hidden_size
    saved = PAPER["decompressor"] - 48 * width - counts["decompressor"]  # 80 positions, not 128
    assert 0.99 < saved / (9 * 14 * width**2) < 1.01
    assert counts["compressor"] == PAPER["compressor"] - 48 * width


@pytest.mark.parametrize("task", ["rocstories", "summarize"])
@pytest.mark.parametrize("system", ["autoregressive", "masked"])
def test_every_baseline_at_its_full_size(task, system):
    """Of the size class of the denoiser."""
    config = importlib.import_module(f"configs.baselines.{task}").get_config(system)
    config_checks.validate(config)
    model = BASELINES[system].build(config, config.encoder.vocab_size)
    init = BASELINES[system].stage(config, model, {}, {}, "").init
    params = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), {}))
    denoiser = PAPER["denoiser"] if task == "rocstories" else 158_112_768
    assert 0.8 * denoiser < sum(leaf.size for leaf in params) < 1.25 * denoiser


@pytest.mark.parametrize("task", ["rocstories", "summarize"])
def test_the_token_level_config_has_a_latent_for_each_token(task):
    config = importlib.import_module(f"configs.baselines.{task}").get_config("token_level")
    config_checks.validate(config)
    assert config.autoencoder.num_latents == config.data.max_length


def test_the_faithful_preset_changes_how_a_task_is_sampled_and_decoded_and_no_more():
    config, task = (
        config_lib.flatten(load_config(*name))
        for name in (("faithful", "summarize"), ("summarize",))
    )
    assert {field for field in task if config[field] != task[field]} == {
        *("autoencoder.decompressor_layers", "distillation.steps"),
        *("diffusion.sampler", "diffusion.num_sampling_steps"),
    }


def test_a_config_that_does_not_exist_is_one_line():
    for name in ("faithful.py:haiku", "baselines/rocstories.py:rnn"):
        done = command(f"--config=configs/{name}", "--stage=describe", code=2)
        assert done.stderr.startswith("error: --config")
        assert done.stderr.count("\n") == 1


def test_meshes_divide_what_a_device_holds():
    """Nearly all of it: what is left whole are small tensors."""

    def held(**sizes):
        config = load_config("quickstart")
        config.mesh.update(sizes)
        found = describe(config)["bytes_per_device"]
        return {stage: sum(found[stage].values()) for stage in ("autoencoder", "diffusion")}

    # Here is one device; an axis that is not named is -1 or 1.
    whole, data, fsdp, tensor = held(), held(data=8), held(fsdp=8), held(tensor=2)
    mixed = held(data=2, fsdp=2, tensor=2)
    assert data == whole
    for stage, size in whole.items():
        assert size / 8 <= fsdp[stage] < 1.05 * size / 8
        assert size / 2 <= tensor[stage] < 1.2 * size / 2
        assert size / 4 <= mixed[stage] < 1.2 * size / 4


def test_an_autoencoder_trained_on_does_not_fit_the_diffusion_any_more(tiny, tmp_path, finished):
    workdir = shutil.copytree(finished, tmp_path / "run")
    steps = tiny.config().autoencoder.steps + 2
    with pytest.raises(UserError, match=r"latents of the autoencoder at step \d+, but .* delete"):
        run_stages(tiny.config(autoencoder__steps=steps), workdir)
