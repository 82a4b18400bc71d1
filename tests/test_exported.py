"""The exported form: what is written comes back, and serves where a workdir would."""

import json
import shutil
import struct

import jax
import ml_dtypes
import numpy as np
import pytest
import tiny as tiny_lib

from cosmos_jax import config as config_lib
from cosmos_jax import exported, pipeline, trained
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.errors import UserError
from cosmos_jax.export import export
from cosmos_jax.runner import open_run, run_stages


@pytest.fixture(scope="module")
def shared(finished, tmp_path_factory):
    """The finished run as an exported directory."""
    out = tmp_path_factory.mktemp("shared") / "texts"
    export(finished, out)
    return out


@pytest.fixture
def copy(shared, tmp_path):
    return shutil.copytree(shared, tmp_path / "copy")


def checkpoint(directory, *items):
    """The items of the only or newest checkpoint, read as they were saved."""
    with Checkpoints(directory, read_only=True) as checkpoints:
        step, found, metadata = checkpoints.newest(dict.fromkeys(items))
    return step, jax.tree.map(np.asarray, found), metadata


def header_of(path):
    """The header of a safetensors file, by its specification."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def test_what_was_saved_comes_back(finished, shared):
    for stage, item, part in (
        ("autoencoder", "params", "compressor/layers_0/attention/query/kernel"),
        ("diffusion", "ema", "denoiser/layers_1/mlp/up/kernel"),
    ):
        step, items, metadata = checkpoint(finished / stage, item, "statistics")
        found = exported.read(shared, stage)
        tiny_lib.assert_trees_equal(found.params, items[item])
        tiny_lib.assert_trees_equal(found.statistics, items["statistics"])
        assert (found.step, found.provenance) == (step, metadata)
        # Its bytes in the file, without the library that wrote it.
        header, data = header_of(shared / "model.safetensors")
        entry = header[f"{stage}/params/{part}"]
        kernel = items[item]
        for name in part.split("/"):
            kernel = kernel[name]
        assert entry["dtype"] == "F32"
        assert entry["shape"] == list(kernel.shape)
        assert data[slice(*entry["data_offsets"])] == kernel.tobytes()
    raw = checkpoint(finished / "diffusion", "params")[1]["params"]["denoiser"]["layers_1"]
    assert np.abs(raw["mlp"]["up"]["kernel"] - kernel).max() > 1e-4  # the averages are others
    said = json.loads(header["__metadata__"]["cosmos_jax"])
    assert said["format"] == 1
    assert said["encoder"]["name"] == "encoder"
    assert {"jax", "cosmos-jax"} <= said["versions"].keys()
    assert not list(shared.parent.glob(".*"))


def test_int8_is_within_half_a_step_of_each_column(finished, shared, tmp_path):
    export(finished, tmp_path / "small", dtype="int8")
    whole, small = (exported.read(d, "autoencoder") for d in (shared, tmp_path / "small"))
    assert jax.tree.structure(whole.params) == jax.tree.structure(small.params)

    def compare(x, y):
        assert y.dtype == np.float32
        if x.ndim < 2:
            np.testing.assert_array_equal(x, y)
        else:
            step = np.abs(x).reshape(-1, x.shape[-1]).max(axis=0) / 127
            assert np.all(np.abs(x - y) <= step * 0.501)
            assert len(np.unique(np.round(y / np.maximum(step, 1e-12)))) <= 255

    jax.tree.map(compare, whole.params, small.params)
    size = [(d / "model.safetensors").stat().st_size for d in (shared, tmp_path / "small")]
    assert size[1] < 0.5 * size[0]


def test_bfloat16_rounds_parameters_alone(finished, shared, tmp_path):
    export(finished, tmp_path / "half", dtype="bfloat16")
    whole, half = (exported.read(d, "diffusion") for d in (shared, tmp_path / "half"))
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16).astype(np.float32), whole.params)
    tiny_lib.assert_trees_equal(half.params, rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves(half.params)} == {np.dtype(np.float32)}
    tiny_lib.assert_trees_equal(half.statistics, whole.statistics)
    sizes = [(d / "model.safetensors").stat().st_size for d in (shared, tmp_path / "half")]
    assert sizes[1] < 0.65 * sizes[0]


def test_the_text_encoder_goes_along(tiny, finished, shared):
    before, after = (
        config_lib.flatten(config_lib.from_json((directory / "config.json").read_text()))
        for directory in (finished, shared)
    )
    # All else is what it was, but for paths on this machine.
    paths = {"encoder.name": "encoder", "data.source": "jsonl:texts", "data.directory": ""}
    assert after == before | paths
    for name in ("config.json", "model.safetensors", "vocab.txt"):
        assert (shared / "encoder" / name).read_bytes() == (tiny.encoder / name).read_bytes()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-100]), "is damaged"),
        (lambda path: path.write_bytes(b""), "is damaged"),
        (lambda path: flip(path, -5), "is damaged: diffusion/statistics"),
    ],
)
def test_damage_is_told(copy, damage, message):
    damage(copy / "model.safetensors")
    with pytest.raises(UserError, match=message) as error:
        exported.read(copy, "diffusion")
    assert "model.safetensors" in str(error.value)
    assert "\n" not in str(error.value)


def flip(path, _):
    """Changes one bit of the latents' deviations, which leaves the file well-formed."""
    header, data = header_of(path)
    start, _ = header["diffusion/statistics/latents_std"]["data_offsets"]
    content = bytearray(path.read_bytes())
    content[len(content) - len(data) + start] ^= 1
    path.write_bytes(content)


def test_what_is_no_export(tiny, copy, tmp_path):
    assert exported.is_exported(copy)
    assert not exported.is_exported(tiny.encoder)  # has a model.safetensors too
    assert not exported.is_exported(tmp_path / "nowhere")
    with pytest.raises(UserError, match="is not of an exported model"):
        exported.header(tiny.encoder)
    with pytest.raises(UserError, match="no stage 'masked', only autoencoder, diffusion"):
        exported.read(copy, "masked")
    later = {"format": 2, "stages": {}}
    tensors = {"x": np.zeros(1, np.float32)}
    for said, message in ((json.dumps(later), "format 2"), ("{}", "damaged"), ("?", "damaged")):
        exported.safetensors.numpy.save_file(
            tensors, copy / "model.safetensors", metadata={"cosmos_jax": said}
        )
        with pytest.raises(UserError, match=message):
            exported.read(copy, "diffusion")


# In place of a workdir


def test_it_is_a_finished_run(finished, shared, tiny):
    config = config_lib.from_json((finished / "config.json").read_text())
    found = [pipeline.finished(open_run(config, directory)) for directory in (finished, shared)]
    assert found[0].identity == found[1].identity
    tiny_lib.assert_trees_equal(found[0].weights, found[1].weights)


def test_it_is_not_trained_further(tiny, copy):
    run = open_run(tiny.config(diffusion__steps=99), copy)
    with pytest.raises(UserError, match="is an exported model, which is not trained any further"):
        pipeline.train_stage(run, "diffusion")
    assert not (copy / "diffusion").exists()


def test_it_lends_its_autoencoder(tiny, finished, shared, tmp_path):
    config = tiny.config(autoencoder__pretrained=str(shared), diffusion__steps=2)
    run = open_run(config, tmp_path / "run")
    pipeline.train_stage(run, "autoencoder")
    assert not (tmp_path / "run").exists()
    weights = pipeline.diffusion_stage(run).weights
    params = checkpoint(finished / "autoencoder", "params")[1]["params"]
    for name in ("compressor", "decompressor"):
        tiny_lib.assert_trees_equal(jax.tree.map(np.asarray, weights[name]), params[name])


def test_other_sizes_are_told(tiny, shared, tmp_path):
    config = tiny.config(autoencoder__pretrained=str(shared), autoencoder__num_latents=5)
    with pytest.raises(
        UserError,
        match=r"autoencoder/params/compressor/queries has shape \(4, 32\) there and \(5, 32\) here",
    ):
        pipeline.trained_autoencoder(open_run(config, tmp_path / "run"))


def test_another_encoder_is_warned_of(tiny, copy, tmp_path, caplog):
    tensors = exported.safetensors.numpy.load_file(tiny.encoder / "model.safetensors")
    encoder = shutil.copytree(tiny.encoder, tmp_path / "encoder")
    tensors["embeddings.LayerNorm.bias"] += 1
    exported.safetensors.numpy.save_file(tensors, encoder / "model.safetensors")
    for name, warned in ((tiny.encoder, False), (encoder, True)):
        config = tiny.config(autoencoder__pretrained=str(copy), encoder__name=str(name))
        caplog.clear()
        pipeline.trained_autoencoder(open_run(config, tmp_path / "run"))
        assert ("other weights" in caplog.text) is warned


# A denoiser to begin with


def begun(tiny, source, **fields):
    """A config that begins with the stages of another run."""
    names = {"autoencoder__pretrained": str(source), "diffusion__pretrained": str(source)}
    return tiny.config(**{**names, **fields})


@pytest.mark.parametrize("exported_one", [False, True])
def test_training_begins_with_the_averaged_weights(tiny, finished, shared, tmp_path, exported_one):
    source = shared if exported_one else finished
    workdir = tmp_path / "run"
    # Other data, whose latents would have other means.
    rows = [{"text": "a slow horse finds the old bridge"}] * 12
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid", "test"):
        tiny_lib.write_rows(data / f"{split}.jsonl", rows)
    fields = {"data__source": f"jsonl:{data}", "diffusion__steps": 0}
    run_stages(begun(tiny, source, **fields), workdir, "diffusion")
    step, items, _ = checkpoint(workdir / "diffusion", "params", "ema", "statistics")
    expected = checkpoint(finished / "diffusion", "ema", "statistics")[1]
    assert step == 0
    tiny_lib.assert_trees_equal(items["params"], expected["ema"])
    tiny_lib.assert_trees_equal(items["ema"], expected["ema"])
    tiny_lib.assert_trees_equal(items["statistics"], expected["statistics"])

    # It is trained from there, all of it, and is a run like any other.
    fields["diffusion__steps"] = 3
    run_stages(begun(tiny, source, **fields), workdir, "diffusion")
    params = checkpoint(workdir / "diffusion", "params")[1]["params"]
    changes = jax.tree.map(lambda a, b: np.abs(a - b).max(), params, expected["ema"])
    assert min(jax.tree.leaves(changes)) > 0
    assert max(jax.tree.leaves(changes)) < 0.05
    with pytest.raises(UserError, match=r"another config: diffusion\.pretrained is '.*' there"):
        run_stages(begun(tiny, source, **fields, diffusion__pretrained=""), workdir, "diffusion")


def test_an_older_workdir_goes_on(tiny, finished, tmp_path):
    """A config.json from before there was the field."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    recorded = json.loads((workdir / "config.json").read_text())
    for stage in ("diffusion", "autoregressive", "masked"):
        assert recorded[stage].pop("pretrained") == ""
    (workdir / "config.json").write_text(json.dumps(recorded))
    run_stages(tiny.config(diffusion__steps=32), workdir, "diffusion")
    assert (workdir / "diffusion" / "32").is_dir()
    pipeline.diffusion_stage(open_run(config_lib.from_json(json.dumps(recorded)), workdir))


def test_it_needs_the_autoencoder_it_learned_from(tiny, finished, shared, tmp_path):
    with pytest.raises(UserError, match=r"autoencoder\.pretrained is ''; it must be the run whose"):
        run_stages(tiny.config(diffusion__pretrained=str(finished)), tmp_path / "run")
    # A rounded copy of it is the same.
    export(finished, tmp_path / "half", dtype="bfloat16")
    fields = {"diffusion__steps": 0, "autoencoder__pretrained": str(tmp_path / "half")}
    run_stages(begun(tiny, finished, **fields), tmp_path / "rounded", "diffusion")

    for name, fields, message in (
        ("longer", {"autoencoder__steps": 84}, "at step 80, but that of .* is at step 84"),
        ("other", {"autoencoder__optimizer__learning_rate": 6e-3}, "is another autoencoder"),
        ("seed", {"seed": 1}, r"is another autoencoder \(in states_mean\)"),
    ):
        run_stages(tiny.config(**fields), tmp_path / name, "autoencoder")
        config = begun(tiny, shared, autoencoder__pretrained=str(tmp_path / name), **fields)
        config.autoencoder.steps = 80
        with pytest.raises(UserError, match=message) as error:
            run_stages(config, tmp_path / f"{name}_run", "diffusion")
        assert "config.diffusion.pretrained: " in str(error.value)
        assert not (tmp_path / f"{name}_run" / "diffusion").exists()


def test_a_denoiser_of_other_sizes_is_refused(tiny, finished, shared, tmp_path):
    for name, source, fields, message in (
        ("layers", finished, {"diffusion__num_layers": 4}, r"denoiser/layers_2/\S+ has shape None"),
        ("shared", shared, {"diffusion__num_layers": 4}, r"denoiser/layers_2/\S+ has shape None"),
        ("pairs", shared, {"data__source": f"jsonl:{tiny.pairs}"}, "condition_encoder/"),
    ):
        with pytest.raises(UserError, match=rf"config\.diffusion\.pretrained: .*{message}"):
            run_stages(begun(tiny, source, **fields), tmp_path / name, "diffusion")
    nowhere = begun(tiny, finished, diffusion__pretrained=str(tmp_path))
    with pytest.raises(UserError, match=r"diffusion\.pretrained: \S+/diffusion holds no checkp"):
        run_stages(nowhere, tmp_path / "none", "diffusion")


def test_a_baseline_begins_with_another(tiny, tmp_path):
    fields = {"system": "autoregressive", "autoregressive__steps": 3}
    run_stages(tiny.config(**fields), tmp_path / "first", "autoregressive")
    fields = {"system": "autoregressive", "autoregressive__steps": 0}
    config = tiny.config(**fields, autoregressive__pretrained=str(tmp_path / "first"))
    run_stages(config, tmp_path / "second", "autoregressive")
    first, second = (
        checkpoint(tmp_path / name / "autoregressive", "ema", "statistics")[1]
        for name in ("first", "second")
    )
    tiny_lib.assert_trees_equal(first, second)
    assert trained.newest_step(tmp_path / "second" / "autoregressive") == 0
