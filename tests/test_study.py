"""The paper's experiments at tiny size: what they measure, share and write."""

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cosmos_jax import distributed, steps, study
from cosmos_jax.errors import UserError
from cosmos_jax.runner import open_run, run_stages

ROOT = Path(__file__).parents[1]
CE = {"autoencoder.alignment_weight": 0.0, "autoencoder.latent_dropout": 0.0}


def config(tiny, name, **fields):
    config = ConfigDict({"study": name, "base": tiny.config(), **fields})
    config.runs = ("full", "ce")
    config.changes = ConfigDict({"ce": CE, "full": {}}, convert_dict=False)
    return config


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """All studies share it, and so the autoencoders are trained once."""
    return tmp_path_factory.mktemp("studies")


def rows_of(result, run):
    return [row for row in result["rows"] if row["run"] == run]


@pytest.fixture(scope="module")
def robustness(tiny, directory):
    levels = (0.0, 0.5, 20.0)
    return study.study(config(tiny, "robustness", num_texts=20, noise_levels=levels), directory)


def test_robustness_falls_with_the_noise(tiny, directory, robustness):
    assert list(dict.fromkeys(row["run"] for row in robustness["rows"])) == ["full", "ce"]
    for run in ("ce", "full"):
        clean, some, lost = rows_of(robustness, run)
        assert [clean["noise"], some["noise"], lost["noise"]] == [0.0, 0.5, 20.0]
        assert clean["bleu"] == pytest.approx(100)
        assert clean["token_accuracy"] == 1
        assert lost["token_accuracy"] < some["token_accuracy"] <= 1
        assert lost["bleu"] < some["bleu"]
        # Without noise the share of the text's own tokens is the accuracy of reconstruction.
        run = open_run(tiny.config(), directory / run)
        lines = (run.workdir / "metrics.jsonl").read_text().splitlines()
        assert 0 < clean["text_accuracy"] < 1
        assert len(lines) > 3
    assert json.loads((directory / "robustness.json").read_text()) == json.loads(
        json.dumps(robustness)
    )


def test_other_studies_use_what_is_trained(tiny, directory, robustness, monkeypatch):
    monkeypatch.delattr("cosmos_jax.train.make_step")
    fields = {"num_pairs": 4, "num_examples": 1, "weights": (0.0, 0.5, 1.0)}
    result = study.study(config(tiny, "smoothness", **fields), directory)
    for run in ("ce", "full"):
        rows = rows_of(result, run)
        assert [row["weight"] for row in rows if "weight" in row] == [0.0, 0.5, 1.0]
        assert all(row["ngram_perplexity"] > 1 for row in rows if "weight" in row)
        (example,) = [row["example"] for row in rows if "example" in row]
        assert len(example["path"]) == 7
    table = study.table(result).splitlines()
    assert table[0] == "| run | weight | ngram_perplexity | diversity |"
    assert len(table) == 2 + 6


def test_generation_is_compared_by_its_evaluation(tiny, directory, robustness):
    result = study.study(config(tiny, "recipe"), directory)
    for row in result["rows"]:
        evaluation = json.loads((directory / row["run"] / "evaluation.json").read_text())
        assert row["num_latents"] == 4
        assert row["token_accuracy"] == evaluation["held_out"]["autoencoder"]["token_accuracy"]
        for name in ("ngram_perplexity", "diversity"):
            assert row[name] == evaluation["scores"][name]["value"]
            assert row[f"{name}_real"] == evaluation["scores"][name]["real"]
        assert "encoder_mauve" not in row  # of six texts there is none
    root = xml.etree.ElementTree.parse(directory / "recipe.svg").getroot()
    assert root.tag.endswith("svg")


def steps_config(tiny, samplers="euler_sde,dpmpp_2m", num_steps=(1, 3), **fields):
    asked = config(tiny, "steps", samplers=samplers, steps=num_steps)
    asked.runs = ("full",)
    asked.base.update_from_flattened_dict(fields)
    return asked


@pytest.fixture(scope="module")
def by_steps(tiny, directory, robustness):
    return study.study(steps_config(tiny), directory)


def test_every_sampler_is_scored_with_every_number_of_steps(tiny, directory, by_steps):
    found = [(row["sampler"], row["num_sampling_steps"]) for row in by_steps["rows"]]
    assert found == [("euler_sde", 1), ("euler_sde", 3), ("dpmpp_2m", 1), ("dpmpp_2m", 3)]
    assert all(row["seconds_per_text"] > 0 for row in by_steps["rows"])
    assert len({row["latent_frechet"] for row in by_steps["rows"]}) > 2
    axis = study.figure(by_steps).axes[0]
    assert axis.get_xscale() == "log"
    assert axis.get_legend_handles_labels()[1] == ["euler_sde", "dpmpp_2m"]
    table = study.table(by_steps).splitlines()
    assert table[0].startswith("| run | sampler | num_sampling_steps | ngram_perplexity |")
    assert len(table) == 2 + 4
    assert json.loads((directory / "steps.json").read_text())["rows"] == by_steps["rows"]
    assert (directory / "steps.svg").exists()


def test_the_runs_own_sampler_has_the_scores_of_its_evaluation(tiny, directory, by_steps):
    """Texts and scores are those of the stages that write and read files."""
    run_stages(tiny.config(), directory / "full")
    evaluation = json.loads((directory / "full" / "evaluation.json").read_text())
    expected = {
        name + end: score[part]
        for name, score in evaluation["scores"].items()
        for end, part in (("", "value"), ("_spread", "spread"), ("_real", "real"))
        if part in score
    }
    assert {"ngram_perplexity", "diversity", "memorisation", "latent_frechet"} <= expected.keys()
    own = by_steps["rows"][1]
    assert {name: own[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_what_is_measured_is_not_measured_again(tiny, directory, by_steps, monkeypatch):
    measured = []
    generate = steps.generate

    def counted(run, finished, config):
        how = config.diffusion
        measured.append((how.sampler, how.num_sampling_steps, how.time_grid))
        return generate(run, finished, config)

    monkeypatch.setattr(steps, "generate", counted)
    part = study.study(steps_config(tiny, "dpmpp_2m", (3,)), directory)
    assert part["rows"] == by_steps["rows"][3:]
    assert measured == []
    asked = steps_config(tiny, "dpmpp_2m,ddim", (3,))
    assert study.study(asked, directory)["rows"][0] == by_steps["rows"][3]
    assert measured == [("ddim", 3, "time")]
    asked = steps_config(tiny, "dpmpp_2m", (3,), **{"diffusion.time_grid": "logsnr"})
    assert study.study(asked, directory)["rows"][0]["time_grid"] == "logsnr"
    assert measured[1:] == [("dpmpp_2m", 3, "logsnr")]
    asked = steps_config(tiny, "dpmpp_2m", (3,), **{"generate.num_texts": 5})
    study.study(asked, directory)
    assert measured[2:] == [("dpmpp_2m", 3, "time")]
    assert study.study(steps_config(tiny), directory)["rows"] == by_steps["rows"]
    assert len(measured) == 3


def test_a_stopped_study_goes_on(tiny, directory, by_steps, tmp_path, monkeypatch):
    """SIGTERM while the second row is scored: the first one is kept."""
    shutil.copytree(directory / "full", tmp_path / "full")
    (tmp_path / "full" / "steps.json").unlink(missing_ok=True)
    rows = tmp_path / "full" / "steps.json"
    monkeypatch.setattr(distributed, "preempted", rows.exists)
    with pytest.raises(distributed.Preempted, match="every finished row is saved"):
        study.study(steps_config(tiny), tmp_path)
    assert not (tmp_path / "steps.json").exists()
    (kept,) = json.loads(rows.read_text())
    monkeypatch.undo()
    result = study.study(steps_config(tiny), tmp_path)
    assert result["rows"][0] == {"run": "full", **kept["row"]}
    for row, whole in zip(result["rows"], by_steps["rows"], strict=True):
        same = row.keys() - {"seconds_per_text"}
        assert {name: row[name] for name in same} == {name: whole[name] for name in same}


def test_texts_of_sources_are_scored_beside_their_references(tiny, finished_pairs, tmp_path):
    shutil.copytree(finished_pairs, tmp_path / "full")
    asked = steps_config(tiny, "dpmpp_2m_sde", (2,))
    asked.base = tiny.pairs_config()
    (row,) = study.study(asked, tmp_path)["rows"]
    assert {"rougeL", "bleu", "encoder_bertscore_f1", "latent_frechet"} <= row.keys()
    assert (tmp_path / "full" / "samples.jsonl").read_text() == (
        finished_pairs / "samples.jsonl"
    ).read_text()


def test_what_cannot_be_sampled_is_refused_before_training(tiny, tmp_path):
    with pytest.raises(UserError, match=r"diffusion.sampler is 'dpm'; it must be one of euler_sde"):
        study.study(steps_config(tiny, "ddim,dpm"), tmp_path)
    with pytest.raises(UserError, match=r"num_sampling_steps is 0; it must be at least 1"):
        study.study(steps_config(tiny, num_steps=(4, 0)), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samplers_and_steps_are_chosen_by_flags(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "cosmos_jax.study", "--config=configs/studies/steps.py"),
            *("--config.samplers=ddim", "--config.steps=(8, 0)", f"--workdir={tmp_path}"),
        ],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        check=False,
    )
    assert done.returncode == 2
    expected = "error: config.diffusion.num_sampling_steps is 0; it must be at least 1"
    assert done.stderr.splitlines()[-1] == expected


@pytest.mark.parametrize("name", ["robustness", "smoothness", "compression", "recipe", "steps"])
def test_configs_of_studies_are_valid(name):
    code = (
        "from cosmos_jax import config_checks, study; from ml_collections import ConfigDict\n"
        f"from configs.studies import {name} as module\n"
        "asked = module.get_config()\n"
        "assert asked.study in study.STUDIES and set(asked.runs) == set(asked.changes) != set()\n"
        "for changes in asked.changes.values():\n"
        "    run = ConfigDict(asked.base.to_dict())\n"
        "    run.update_from_flattened_dict(changes)\n"
        "    config_checks.validate(run)\n"
        "    study.STUDIES[asked.study].check(asked, run)\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_config_that_is_no_study_is_refused():
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_jax.study", "--config=configs/quickstart.py"],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --config: not a study; there are")
