"""The paper's experiments at tiny size: what they measure, share and write."""

import json
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cosmos_jax import study
from cosmos_jax.runner import open_run

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


@pytest.mark.parametrize("name", ["robustness", "smoothness", "compression", "recipe"])
def test_configs_of_studies_are_valid(name):
    code = (
        "from cosmos_jax import config, study; from ml_collections import ConfigDict\n"
        f"from configs.studies import {name} as module\n"
        "asked = module.get_config()\n"
        "assert asked.study in study.STUDIES and len(asked.runs) > 1\n"
        "for changes in asked.changes.values():\n"
        "    run = ConfigDict(asked.base.to_dict())\n"
        "    run.update_from_flattened_dict(changes)\n"
        "    config.validate(run)\n"
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
