"""Sharing a model: the page about it, checkpoints for PyTorch, nothing half done."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny as tiny_lib

from cosmos_jax import exported, pth
from cosmos_jax.convert import convert
from cosmos_jax.encoder import TextEncoder
from cosmos_jax.errors import UserError
from cosmos_jax.export import export, export_pth
from cosmos_jax.models.bert import RobertaConfig
from cosmos_jax.models.torch_files import load_torch_file

ROOT = Path(__file__).parents[1]
FIXTURE = tiny_lib.FIXTURE


def files(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def rows(page, heading):
    """The tables of a section, as lists of cells."""
    section = page.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# The model card


def test_the_page_of_an_unconditional_model(finished, tmp_path):
    out = tmp_path / "words"
    command = "python -m cosmos_jax.main --config=words"
    export(finished, out, title="Words & [more]", data="*Random* words.", command=command)
    page = (out / "README.md").read_text()
    front, page = page.removeprefix("---\n").split("---\n", 1)
    assert front.splitlines()[:3] == [
        "license: apache-2.0",
        "library_name: cosmos-jax",
        "language: en",
    ]
    assert page.startswith("\n# Words \\& \\[more\\]\n")
    assert f"```\n{command}\n```" in page
    assert "\n*Random* words.\n" in page
    assert 'cosmos_jax.load("words")' in page
    arrays = exported.safetensors.numpy.load_file(out / "model.safetensors")
    count = sum(a.size for name, a in arrays.items() if name.split("/")[1] == "params")
    assert f"| trained parameters | {count:,}: " in page
    assert rows(page, "Training")[2:] == [
        ["autoencoder", "80", "8", "0.005", "none", "random weights"],
        ["diffusion", "30", "8", "0.005", "0.9999", "random weights"],
    ]

    evaluation = json.loads((finished / "evaluation.json").read_text())
    assert json.loads((out / "evaluation.json").read_text()) == evaluation
    scores = {row[0]: row[1:] for row in rows(page, "Scores")[2:]}
    assert set(scores) == {name.replace("_", " ") for name in evaluation["scores"]}
    entry = evaluation["scores"]["unigram_entropy"]
    assert scores["unigram entropy"] == [f"{entry[k]:.4f}" for k in ("value", "real")] + ["offline"]
    assert "- unigram entropy: `words:regex|" in page
    assert "encoder\\_mauve: " in page
    accuracy = evaluation["held_out"]["autoencoder"]["token_accuracy"]
    assert f"| share of tokens that the autoencoder gives back | {accuracy:.4f} |" in page
    samples = tiny_lib.read_rows(finished / "samples.jsonl")
    section = page.split("## Samples")[1]
    for number, sample in enumerate(samples, 1):
        assert f"\n{number}. {sample['text'] or '(empty)'}\n" in section.replace("\\", "")
    assert "sampler=euler_sde num_sampling_steps=3" in page
    assert "Source" not in page
    assert str(finished.parent) not in page
    assert "/tmp" not in page
    assert not re.search(r"\n{3}|\{\{|\{%", page)


def test_the_page_of_a_conditional_model(finished_pairs, tmp_path):
    workdir = shutil.copytree(finished_pairs, tmp_path / "run")
    samples = tiny_lib.read_rows(workdir / "samples.jsonl") * 3
    samples[0] |= {"text": "a|b\n# <b>*c*</b>\x00 `$1`", "source": ""}
    tiny_lib.write_rows(workdir / "samples.jsonl", samples)
    # Scores of other samples are not these samples'.
    export(workdir, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    first = page.split("## Samples")[1].split("\n2. ")[0]
    assert "**Source:** (empty)\\\n" in first
    assert f"**Reference:** {samples[0]['reference']}\\\n" in first
    assert "**Generated:** a\\|b # \\<b\\>\\*c\\*\\</b\\>\ufffd \\`\\$1\\`" in first
    assert page.count("**Generated:**") == 12
    assert "Not scored." in page
    assert not (tmp_path / "out" / "evaluation.json").exists()
    assert "| sources | up to 10 tokens |" in page
    assert "model.generate(sources=" in page


def test_other_systems_stand_beside_it(finished, tmp_path):
    evaluation = json.loads((finished / "evaluation.json").read_text())
    other = tmp_path / "other.json"
    scores = {
        "diversity": {"value": 0.25, "spread": 0.125, "protocol": "offline"},
        "ngram_perplexity": {"value": 7.0, "protocol": "offline(block_size=7)"},
        "bleu": {"value": 1.0, "protocol": "bleu"},
    }
    other.write_text(json.dumps({"scores": scores}))
    export(finished, tmp_path / "out", beside={"theirs": other})
    table = rows((tmp_path / "out" / "README.md").read_text(), "Scores")
    assert table[0] == ["score", "generated", "theirs", "real", "protocol"]
    cells = {row[0]: row[2] for row in table[2:]}
    assert cells["diversity"] == "0.2500 ± 0.1250"
    # What was scored by another protocol does not compare.
    assert cells["ngram perplexity"] == ""
    assert len(cells) == len(evaluation["scores"])

    other.write_text("{}")
    with pytest.raises(UserError, match="is no evaluation"):
        export(finished, tmp_path / "again", beside={"theirs": other})
    assert not (tmp_path / "again").exists()


def test_results_of_other_weights_are_left_out(finished, tmp_path):
    workdir = shutil.copytree(finished, tmp_path / "run")
    for name in ("evaluation.json", "generation.json"):
        content = json.loads((workdir / name).read_text())
        content["identity"]["diffusion_step"] = 29
        (workdir / name).write_text(json.dumps(content))
    export(workdir, tmp_path / "out")
    page = (tmp_path / "out" / "README.md").read_text()
    assert "Not scored." in page
    assert "## Samples" not in page


# The directory


def test_it_appears_whole_or_not_at_all(finished, tmp_path, monkeypatch):
    out = tmp_path / "out"
    export(finished, out)
    before = files(out)
    with pytest.raises(UserError, match="exists; give --overwrite"):
        export(finished, out)
    with monkeypatch.context() as patch:
        patch.setattr("cosmos_jax.model_card.render", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            export(finished, out, overwrite=True)
        with pytest.raises(ZeroDivisionError):
            export(finished, tmp_path / "other")
    assert files(out) == before
    assert list(tmp_path.iterdir()) == [out]
    export(finished, out, overwrite=True, title="Another")
    assert {name for name, content in files(out).items() if content != before[name]} == {
        "README.md"
    }
    assert list(tmp_path.iterdir()) == [out]
    # An export of an export is the same.
    export(out, tmp_path / "again")
    for name in ("config.json", "encoder/vocab.txt", "evaluation.json"):
        assert (tmp_path / "again" / name).read_bytes() == before[name]
    for stage in ("autoencoder", "diffusion"):
        one, two = (exported.read(d, stage) for d in (out, tmp_path / "again"))
        tiny_lib.assert_trees_equal(one.params, two.params)
        tiny_lib.assert_trees_equal(one.statistics, two.statistics)
        assert (one.step, one.provenance) == (two.step, two.provenance)


def test_what_is_not_ours_is_not_replaced(tiny, finished, tmp_path):
    out = tmp_path / "out"
    for make, message in (
        (lambda: out.mkdir(), "is no export"),
        (lambda: out.write_text(""), "is no export"),
        (lambda: shutil.copytree(finished, out), "is no export"),
        (lambda: shutil.copytree(tiny.encoder, out), "is no export"),
    ):
        make()
        with pytest.raises(UserError, match=message):
            export(finished, out, overwrite=True)
        assert out.exists()
        shutil.rmtree(out) if out.is_dir() else out.unlink()
    export(finished, out)
    (out / ".git").mkdir()
    with pytest.raises(UserError, match=r"holds \.git, which no export does"):
        export(finished, out, overwrite=True)


def test_only_what_is_finished(tiny, finished, tmp_path):
    with pytest.raises(UserError, match="is neither a workdir nor an exported model"):
        export(tmp_path, tmp_path / "out")
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "diffusion")
    with pytest.raises(UserError, match="holds no checkpoint: run --stage=diffusion first"):
        export(workdir, tmp_path / "out")
    assert list(tmp_path.iterdir()) == [workdir]


# Checkpoints for PyTorch


def assert_same(ours, theirs, path=""):
    """Types, keys and their order, and arrays bit for bit."""
    assert type(ours) is type(theirs), path
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), path
        for key in theirs:
            assert_same(ours[key], theirs[key], f"{path}/{key}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), path
        for i, pair in enumerate(zip(ours, theirs, strict=True)):
            assert_same(*pair, f"{path}/{i}")
    elif isinstance(theirs, np.ndarray):
        assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), path
        assert ours.tobytes() == theirs.tobytes(), path
    else:
        assert ours == theirs, path


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"system": "masked"}, r"no layout for config\.system 'masked'"),
        ({"autoencoder__compress": False, "autoencoder__num_latents": 12}, "without compression"),
        ({"diffusion__latent_positions": True}, r"config\.diffusion\.latent_positions"),
        ({"diffusion__time_gains": True}, r"config\.diffusion\.time_gains"),
        ({"diffusion__pointer": True}, r"config\.diffusion\.pointer"),
        ({"encoder__vocab_size": 70}, r"say 60 of the encoder's 70 tokens"),
        ({"encoder__vocab_size": 60}, "another text encoder than BERT"),
    ],
)
def test_what_the_release_has_no_place_for(tiny, fields, message):
    config = tiny.config(**fields)
    vocabulary = {"vocabulary": np.arange(60)}
    stages = {"autoencoder": exported.Exported(1, {}, vocabulary, {})}
    sizes = {field.name: 1 for field in dataclasses.fields(RobertaConfig)}
    encoder = TextEncoder("other", RobertaConfig(**sizes | {"activation": "gelu"}), {}, None, "")
    with pytest.raises(UserError, match=message):
        pth.check(config, stages, encoder)


@pytest.mark.parametrize("conditional", [False, True])
def test_the_releases_checkpoints_come_back(tiny, tmp_path, conditional):
    torch = pytest.importorskip("torch", reason="PyTorch writes the checkpoints")
    theirs = {
        "autoencoder": FIXTURE / "autoencoder.pth",
        "diffusion": FIXTURE / f"diffusion{'_conditional' * conditional}.pth",
    }
    config = tiny.config(encoder__num_heads=4, autoencoder__num_heads=2)
    if conditional:
        # The fixture's BERT has 14 positions, fewer than its sources; this one has enough.
        checkpoint = torch.load(theirs["autoencoder"], weights_only=True)
        name = "text_encoder.embeddings.position_embeddings.weight"
        checkpoint["encoder"][name] = checkpoint["encoder"][name].repeat(3, 1)
        theirs["autoencoder"] = tmp_path / "autoencoder.pth"
        torch.save(checkpoint, theirs["autoencoder"])
        config.data.source = f"jsonl:{tiny.pairs}"
    convert(config, *theirs.values(), str(tiny.encoder), tmp_path / "run")
    out = tmp_path / "out"
    export_pth(tmp_path / "run", out)
    for name, path in theirs.items():
        expected = load_torch_file(path)
        if name == "diffusion":
            # The fixture says 0 of averages after 200 steps; `convert` has no use for it.
            assert expected["ema"]["num_updates"] == 0
            expected["ema"]["num_updates"] = 200
        assert_same(load_torch_file(out / f"{name}.pth"), expected, name)
        loaded = torch.load(out / f"{name}.pth", weights_only=True)
        assert list(loaded) == list(expected)
    query = "encoder.output_blocks.0.self_attn.query.weight"
    tensor = loaded["score_estimator"][query]
    assert tensor.dtype == torch.float32
    np.testing.assert_array_equal(tensor.numpy(), expected["score_estimator"][query])

    # And what is there beside them is all that the way back needs.
    recorded = exported.config_lib.from_json((out / "config.json").read_text())
    both = (out / "autoencoder.pth", out / "diffusion.pth")
    convert(recorded, *both, str(out), tmp_path / "back")
    export_pth(tmp_path / "back", out, overwrite=True)
    assert_same(load_torch_file(both[1]), expected)


def test_trained_weights_for_pytorch(finished, tmp_path):
    """Of a run of ours, the raw weights and the averaged ones."""
    pytest.importorskip("torch", reason="PyTorch writes the checkpoints")
    export_pth(finished, tmp_path / "raw")
    export(finished, tmp_path / "shared")
    found = load_torch_file(tmp_path / "raw" / "diffusion.pth")
    names = list(found["score_estimator"])
    name = "encoder.input_blocks.0.mlp.down_proj.weight"
    average = found["ema"]["shadow_params"][names.index(name)]
    params = exported.read(tmp_path / "shared", "diffusion").params
    np.testing.assert_array_equal(
        average, params["denoiser"]["layers_0"]["mlp"]["down"]["kernel"].T
    )
    assert np.abs(found["score_estimator"][name] - average).max() > 1e-4
    assert found["step"] == found["ema"]["num_updates"] == 30


# The command


def test_the_command(finished, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "cosmos_jax.export", f"--workdir={finished}", *arguments],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )

    out = tmp_path / "deep" / "out"
    done = command(f"--out={out}", "--dtype=bfloat16", "--title=Ours", "--license=mit")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f'MB: cosmos_jax.load("{out}")\n')
    page = (out / "README.md").read_text()
    assert page.startswith("---\nlicense: mit\n")
    assert "\n# Ours\n" in page
    assert "parameters in bfloat16" in page
    refused = command(f"--out={out}")
    assert refused.returncode == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: {out} exists; give --overwrite")
