"""The authors' checkpoints as a workdir: the right weights, from which texts come."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny as tiny_lib

from cosmos_jax import config as config_lib
from cosmos_jax import encoder, pipeline
from cosmos_jax.convert import convert
from cosmos_jax.errors import UserError
from cosmos_jax.models.torch_files import load_torch_file
from cosmos_jax.runner import open_run, run_stages

FIXTURE = tiny_lib.FIXTURE


@pytest.fixture
def config(tiny):
    """What the files do not tell; sizes that they do tell are wrong here."""
    return tiny.config(
        encoder__num_heads=4,
        autoencoder__num_heads=2,
        autoencoder__num_latents=7,
        autoencoder__num_layers=5,
        data__max_length=9,
        generate__num_texts=3,
        diffusion__num_layers=6,
    )


def test_unconditional_checkpoints(tiny, config, tmp_path):
    workdir = tmp_path / "deep" / "released"
    workdir.parent.mkdir()
    returned = convert(
        config,
        FIXTURE / "autoencoder.pth",
        FIXTURE / "diffusion.pth",
        str(tiny.encoder),
        workdir,
    )
    assert list(workdir.parent.iterdir()) == [workdir]
    recorded = config_lib.from_json((workdir / "config.json").read_text())
    assert config_lib.flatten(recorded) == config_lib.flatten(returned)
    for field, value in {
        "autoencoder.num_latents": 4,
        "autoencoder.num_layers": 2,
        "autoencoder.num_heads": 4,
        "diffusion.num_layers": 2,
        "data.max_length": 14,
        "encoder.vocab_size": 60,
        "data.conditional": False,
    }.items():
        assert config_lib.flatten(recorded)[field] == value, field

    # The encoder inside is the one the tiny encoder was made from.
    ours, theirs = encoder.load(str(workdir / "encoder")), encoder.load(str(tiny.encoder))
    tiny_lib.assert_trees_equal(ours.params, theirs.params)
    assert ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()

    run = open_run(recorded, workdir)
    weights = pipeline.finished(run).weights
    first, second = (load_torch_file(FIXTURE / f"{n}.pth") for n in ("autoencoder", "diffusion"))
    names = list(second["score_estimator"])
    name = "encoder.input_blocks.0.self_attn.query.weight"
    average = second["ema"]["shadow_params"][names.index(name)]
    assert np.abs(average - second["score_estimator"][name]).max() > 1e-4
    for found, expected in (
        (weights["denoiser"]["layers_0"]["attention"]["query"]["kernel"], average.T),
        (
            weights["compressor"]["layers_1"]["attention"]["query"]["kernel"],
            first["encoder"]["latent_layers.1.latent_attn.latents_to_Q.weight"].T,
        ),
        (weights["decompressor"]["head"]["kernel"], first["decoder"]["lm_head.weight"].T),
        (weights["states_mean"], first["encodings_mean"]),
        (weights["states_std"], first["encodings_std"]),
        (weights["latents_mean"], second["latent_mean"]),
        (weights["latents_std"], second["latent_std"]),
    ):
        np.testing.assert_array_equal(found, expected)

    run_stages(recorded, workdir, "generate")
    samples = tiny_lib.read_rows(workdir / "samples.jsonl")
    assert len(samples) == 3
    assert any(sample["text"] for sample in samples)
    with pytest.raises(UserError, match="exists; choose a new --workdir"):
        convert(config, *(FIXTURE / "autoencoder.pth",) * 2, str(tiny.encoder), workdir)


def test_conditional_checkpoints(tiny, config, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch rewrites the checkpoint")
    # The fixture's BERT has 14 positions, fewer than its sources; this one has enough.
    checkpoint = torch.load(FIXTURE / "autoencoder.pth", weights_only=True)
    name = "text_encoder.embeddings.position_embeddings.weight"
    checkpoint["encoder"][name] = checkpoint["encoder"][name].repeat(3, 1)
    torch.save(checkpoint, tmp_path / "autoencoder.pth")
    config.data.source = f"jsonl:{tiny.pairs}"
    # As in the quickstart's config; the release has neither.
    config.diffusion.update(latent_positions=True, time_gains=True)
    workdir = tmp_path / "released"
    conditional = FIXTURE / "diffusion_conditional.pth"
    config = convert(config, tmp_path / "autoencoder.pth", conditional, str(tiny.encoder), workdir)
    assert config.data.conditional is True
    assert config.data.max_source_length == 32
    assert config.diffusion.condition_layers == 2
    assert config.diffusion.latent_positions is config.diffusion.time_gains is False
    config.diffusion.guidance = 2.0
    run_stages(config, workdir, "generate")
    rows = tiny_lib.read_rows(tiny.pairs / "test.jsonl")
    samples = tiny_lib.read_rows(workdir / "samples.jsonl")
    assert [s["reference"] for s in samples] == [row["target"] for row in rows[:3]]
    weights = pipeline.finished(open_run(config, workdir)).weights
    second = load_torch_file(conditional)
    name = "conditional_encoder.blocks.1.mlp.down_proj.weight"
    average = second["ema"]["shadow_params"][list(second["score_estimator"]).index(name)]
    kernel = weights["condition_encoder"]["layers_1"]["mlp"]["down"]["kernel"]
    np.testing.assert_array_equal(kernel, average.T)


def test_nothing_is_left_of_what_fails(tiny, config, tmp_path):
    autoencoder, diffusion = FIXTURE / "autoencoder.pth", FIXTURE / "diffusion.pth"
    content = autoencoder.read_bytes()
    cut = tmp_path / "cut.pth"
    cut.write_bytes(content[: len(content) // 2])
    tokenizer = str(tiny.encoder)
    no_tokenizer = shutil.copytree(tiny.encoder, tmp_path / "encoder")
    (no_tokenizer / "vocab.txt").unlink()
    before = sorted(tmp_path.iterdir())
    for files, tokens, message in (
        ((diffusion, diffusion), tokenizer, r"diffusion\.pth: no 'encoder'; is this a checkpoint"),
        ((autoencoder, autoencoder), tokenizer, r"autoencoder\.pth: no 'score_estimator'"),
        ((cut, diffusion), tokenizer, r"cut\.pth"),
        ((tmp_path / "nowhere.pth", diffusion), tokenizer, r"nowhere\.pth"),
        ((autoencoder, diffusion), str(no_tokenizer), "holds no tokenizer"),
        ((autoencoder, diffusion), str(tmp_path / "nowhere"), "there is no such directory"),
        (
            (autoencoder, FIXTURE / "diffusion_conditional.pth"),
            tokenizer,
            "max_source_length is 32",
        ),
    ):
        with pytest.raises(UserError, match=message) as error:
            convert(config, *files, tokens, tmp_path / "run")
        assert "\n" not in str(error.value)
        assert sorted(tmp_path.iterdir()) == before


def test_the_command(tiny, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "cosmos_jax.convert", *arguments],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=300,
        )

    arguments = [
        "--config=configs/rocstories.py",
        "--config.encoder.num_heads=4",
        "--config.diffusion.num_heads=4",
        "--config.data.max_source_length=14",
        f"--autoencoder={FIXTURE / 'autoencoder.pth'}",
        f"--diffusion={FIXTURE / 'diffusion.pth'}",
        f"--tokenizer={tiny.encoder}",
        f"--workdir={tmp_path / 'released'}",
    ]
    done = command(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path}/released is ready: 4 latents of width 32. Now:\n")
    refused = command(*arguments)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "exists; choose a new --workdir" in refused.stderr
