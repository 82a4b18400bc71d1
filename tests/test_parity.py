"""The parity command on outputs of the authors' code, and whether it can fail."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from cosmos_jax import parity
from cosmos_jax.errors import UserError
from cosmos_jax.models import weights
from cosmos_jax.models.torch_files import load_torch_file

FIXTURE = Path(__file__).parent / "fixtures" / "official_tiny"


@pytest.fixture
def copy(tmp_path):
    """A fixture that may be changed."""
    return shutil.copytree(FIXTURE, tmp_path / "fixture")


def change(directory: Path, **arrays: np.ndarray | None) -> None:
    """Sets arrays of `expected.npz`, or removes those that are None."""
    path = directory / "expected.npz"
    with np.load(path) as file:
        content = {**file, **arrays}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})


def keep(directory: Path, *names: str) -> None:
    """Removes all arrays of `expected.npz` but these."""
    with np.load(directory / "expected.npz") as file:
        content = {name: file[name] for name in names}
    np.savez(directory / "expected.npz", **content)


def command(directory: Path, out: Path) -> int:
    return parity.main(["parity", f"--fixture={directory}", f"--out={out}"])


def test_all_outputs_of_the_release(tmp_path, capsys):
    out = tmp_path / "out.npz"
    assert command(FIXTURE, out) == 0
    with np.load(out) as ours, np.load(FIXTURE / "expected.npz") as theirs:
        assert set(ours) == set(theirs)
        assert len(theirs) == 36
        for name in theirs:
            np.testing.assert_allclose(ours[name], theirs[name], rtol=0, atol=2e-5)
            assert ours[name].dtype == theirs[name].dtype
    assert "23 of 23 outputs agree to 2e-05" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [out]


def test_a_changed_weight_is_noticed(copy, tmp_path):
    torch = pytest.importorskip("torch", reason="PyTorch rewrites the checkpoint")
    keep(copy, "token_ids", "token_mask", "latents", "bert_last_hidden")
    checkpoint = torch.load(copy / "autoencoder.pth", weights_only=True)
    checkpoint["encoder"]["latent_layers.1.latent_attn.latents_to_Q.weight"][3, 5] += 0.01
    torch.save(checkpoint, copy / "autoencoder.pth")
    assert command(copy, tmp_path / "out.npz") == 1


def test_sampling_weights_are_the_averages(copy):
    torch = pytest.importorskip("torch", reason="PyTorch rewrites the checkpoint")
    for name in ("diffusion.pth", "diffusion_conditional.pth"):
        path = copy / name
        averages = weights.ema_weights(load_torch_file(path), name)
        checkpoint = torch.load(path, weights_only=True)
        assert list(averages) == list(checkpoint["score_estimator"])
        floating = [k for k, v in checkpoint["score_estimator"].items() if v.is_floating_point()]
        for key, average in zip(floating, checkpoint["ema"]["shadow_params"], strict=True):
            np.testing.assert_array_equal(averages[key], average.numpy())
        raw = checkpoint["score_estimator"]["time_emb.0.weight"].numpy()
        assert np.abs(averages["time_emb.0.weight"] - raw).max() > 1e-3
        checkpoint["ema"]["shadow_params"].pop()
        torch.save(checkpoint, path)
        with pytest.raises(UserError, match="do not fit"):
            weights.ema_weights(load_torch_file(path), name)
    with pytest.raises(UserError, match="is not a diffusion checkpoint"):
        weights.ema_weights({"score_estimator": {}}, "x.pth")


def test_without_the_conditional_checkpoint(copy, tmp_path, capsys):
    (copy / "diffusion_conditional.pth").unlink()
    inputs = ("denoiser_x_t", "denoiser_t", "denoiser_self_cond", "cond_states", "cond_mask")
    keep(copy, *inputs, "denoiser_x0")
    assert command(copy, tmp_path / "out.npz") == 0
    shutil.copy(FIXTURE / "expected.npz", copy)
    keep(copy, *inputs, "denoiser_x0", "cond_denoiser_x0")
    assert command(copy, tmp_path / "out.npz") == 1
    printed = capsys.readouterr().out
    assert "1 of 2 outputs agree" in printed
    assert "not computed" in printed
    with np.load(tmp_path / "out.npz") as ours:
        assert "cond_denoiser_x0" not in ours
        assert "cond_mask" in ours


def test_other_lengths_batches_and_schedules(copy, tmp_path):
    with np.load(FIXTURE / "expected.npz") as file:
        theirs = dict(file)
    # Texts are independent, and padding at the end does not matter.
    lengths = theirs["token_mask"].sum(axis=1)
    shortest = int(lengths.argmin())
    texts, length = slice(shortest, shortest + 1), int(lengths[shortest])
    assert 0 < length < theirs["token_ids"].shape[1]
    cut = {
        name: theirs[name][texts, :length]
        for name in ("token_ids", "token_mask", "bert_last_hidden", "encodings_normalized")
    }
    cut |= {name: theirs[name][texts] for name in theirs if name.startswith(("lat", "dec", "den"))}
    # tan-d schedules by hand, with u = tan(pi t / 2).
    t = np.linspace(0.01, 0.9, 23, dtype=np.float32)
    u = np.tan(np.pi / 2 * t.astype(float))
    cut |= {
        "schedule_d2.5_t": t,
        "schedule_d2.5_alpha": 1 / np.sqrt(1 + (2.5 * u) ** 2),
        "schedule_d2.5_sigma": 2.5 * u / np.sqrt(1 + (2.5 * u) ** 2),
        "schedule_d2.5_beta": np.pi * 2.5**2 * u * (1 + u**2) / (1 + (2.5 * u) ** 2),
    }
    np.savez(copy / "expected.npz", **{k: v.astype(theirs.get(k, t).dtype) for k, v in cut.items()})
    assert command(copy, tmp_path / "out.npz") == 0


def test_another_number_of_sampling_steps(copy):
    """One step of DDIM reveals x_0; from it follows by hand what one Euler step must give."""
    fixture = parity.read_fixture(copy)
    given = fixture.inputs
    short = {
        **{k: v for k, v in given.items() if k.startswith(("denoiser", "sampler"))},
        "sampler_timesteps": given["sampler_timesteps"][:2],
        "sampler_noise": given["sampler_noise"][:1],
    }
    np.savez(copy / "expected.npz", **short)
    outputs = parity.compute(parity.read_fixture(copy))
    t, s = given["sampler_timesteps"][:2].astype(float)
    alpha_t, alpha_s = (1 / np.sqrt(1 + (5 * np.tan(np.pi / 2 * x)) ** 2) for x in (t, s))
    x_T = given["sampler_x_T"]
    sigma_t, sigma_s = np.sqrt(1 - alpha_t**2), np.sqrt(1 - alpha_s**2)
    x_0 = (outputs["sampler_ddim"] - sigma_s / sigma_t * x_T) / (
        alpha_s - sigma_s / sigma_t * alpha_t
    )
    u = np.tan(np.pi / 2 * 0.95)
    beta = np.pi * 25 * u * (1 + u**2) / (1 + 25 * u**2)
    score = (alpha_t * x_0 - x_T) / sigma_t**2
    euler = x_T - (s - t) * beta * (x_T / 2 + score)
    np.testing.assert_allclose(outputs["sampler_euler_sde"], euler, atol=1e-4)


@pytest.mark.parametrize("size", ["num_layers", "num_heads", "hidden_size", "bert_intermediate"])
def test_sizes_come_from_the_config(copy, tmp_path, capsys, size):
    config = json.loads((copy / "config.json").read_text())
    config[size] = config[size] * 2
    (copy / "config.json").write_text(json.dumps(config))
    keep(copy, "token_ids", "token_mask", "latents")
    assert command(copy, tmp_path / "out.npz") == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out.npz").exists()


def test_comparison_sees_every_kind_of_difference():
    expected = {
        "equal": np.array([1.0, np.inf, np.nan]),
        "off": np.array([1.0, 2.0]),
        "nan": np.array([1.0, 2.0]),
        "shape": np.zeros((2, 3)),
        "missing": np.zeros(1),
    }
    computed = {
        "equal": np.array([1.0, np.inf, np.nan]),
        "off": np.array([1.0, 2.5]),
        "nan": np.array([1.0, np.nan]),
        "shape": np.zeros((1, 3)),
    }
    differences = {name: value for name, value, _ in parity.compare(expected, computed)}
    assert differences["equal"] == 0
    assert differences["off"] == 0.5
    for name in ("nan", "shape", "missing"):
        assert not differences[name] <= parity.TOLERANCE


def test_an_unknown_output_is_a_failure(copy, tmp_path):
    keep(copy, "schedule_d5_t", "schedule_d5_alpha")
    change(copy, sampler_of_tomorrow=np.zeros(3))
    assert command(copy, tmp_path / "out.npz") == 1


def test_bad_input(copy, tmp_path, capsys):
    out = tmp_path / "out.npz"

    def expect(message: str, arguments: list[str] | None = None) -> None:
        arguments = arguments or [f"--fixture={copy}", f"--out={out}"]
        assert parity.main(["parity", *arguments]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.iterdir()) == [copy]

    expect("--fixture", [f"--out={out}"])
    expect("unexpected argument 'more'", [f"--fixture={copy}", f"--out={out}", "more"])
    expect("is not a fixture", [f"--fixture={tmp_path / 'nowhere'}", f"--out={out}"])
    config = (copy / "config.json").read_text()
    for damaged, message in (
        ("{", "damaged"),
        ("[]", "is not a JSON object"),
        (config.replace('"num_latents": 4', '"num_latents": 0'), "num_latents is 0"),
        (config.replace("10000.0", "500.0"), "rope_theta is 500.0; only 10000.0 is supported"),
    ):
        (copy / "config.json").write_text(damaged)
        expect(message)
    (copy / "config.json").write_text(config)
    content = (copy / "autoencoder.pth").read_bytes()
    (copy / "autoencoder.pth").write_bytes(content[: len(content) // 2])
    expect("truncated or damaged")
    shutil.copy(copy / "diffusion.pth", copy / "autoencoder.pth")
    expect("no 'encoder'; is this a checkpoint of Cosmos?")
    (copy / "expected.npz").write_bytes(b"")
    expect("damaged")


def test_output_that_cannot_be_written(copy, tmp_path, capsys):
    keep(copy, "schedule_d5_t", "schedule_d5_alpha")
    assert command(copy, tmp_path / "nowhere" / "out.npz") == 2
    assert "cannot be written" in capsys.readouterr().err
