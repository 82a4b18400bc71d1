"""The benchmark at tiny size: what it measures, counts and writes. Nothing here looks at times."""

import dataclasses
import functools
import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny as tiny_sizes
from ml_collections import ConfigDict

from cosmos_jax import benchmark, decoding, peaks, sharding, speed, systems, torch_gpt2
from cosmos_jax import config as config_lib
from cosmos_jax.baselines import BASELINES
from cosmos_jax.errors import UserError
from cosmos_jax.models import masked
from cosmos_jax.models.denoiser import Denoiser, DenoiserConfig
from cosmos_jax.parts import parts_of
from cosmos_jax.stages.base import row_keys

ROOT = Path(__file__).parents[1]
OF_JAX = [name for name in systems.CHANGES if name != systems.EAGER]
LENGTH = 12


def config(base, **fields):
    base.encoder.update(dataclasses.asdict(tiny_sizes.BERT))
    return ConfigDict(
        {
            "base": base,
            "systems": ",".join(systems.CHANGES),
            "batch_sizes": (2,),
            "accelerator_batch_sizes": (),
            "rounds": 2,
            "max_seconds": 1e6,
            "skip_seconds": 1e6,
            "workdirs": {},
            "training": {
                "stages": ",".join((*config_lib.training(base), "autoregressive", "masked")),
                "batch_size": 4,
                "steps": 2,
            },
            **fields,
        }
    )


@pytest.fixture(scope="module", autouse=True)
def small_peaks():
    with pytest.MonkeyPatch.context() as patch:
        small = functools.partial(peaks.measure, matrix_sizes=(64, 128), size=2**12)
        patch.setattr(peaks, "measure", small)
        yield


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(systems.ONE_DEVICE)


@pytest.fixture(scope="module")
def measured(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "out.json"
    result = benchmark.benchmark(config(tiny.config(distillation__steps=1)), path)
    assert json.loads(path.read_text()) == json.loads(json.dumps(result))
    return result


def test_all_systems_are_measured(measured):
    assert measured["complete"] is True
    assert measured["device"]["kind"] == jax.devices()[0].device_kind
    assert measured["peaks"]["matmul"]["size"] in (64, 128)
    found = [(entry["batch_size"], entry["system"]) for entry in measured["entries"]]
    assert found == [(2, name) for name in systems.CHANGES]
    for entry in measured["entries"]:
        if entry["system"] == systems.EAGER:
            continue
        assert entry["weights"] == "random"
        assert entry["rounds"] == 2
        assert 0 < entry["compiled_share"] < 1
        assert entry["memory"]["arguments"] > 0
        assert entry["flops_per_text"] > 0
        low, middle, high = (entry["seconds"][name] for name in ("min", "median", "max"))
        assert 0 < low <= middle <= high
        assert entry["texts_per_second"]["max"] == pytest.approx(entry["batch_size"] / low)
        parts = entry["parts"]
        assert entry["flops_per_text"] * entry["batch_size"] == pytest.approx(
            sum(part["calls"] * part.get("flops", 0) for part in parts.values())
        )
    calls = {
        entry["system"]: {name: part["calls"] for name, part in entry["parts"].items()}
        for entry in measured["entries"]
    }
    assert calls["default"] == calls["token_level"] == {"denoiser": 2, "decoder": 1, "strings": 1}
    assert calls["undistilled"] == {"denoiser": 3, "decoder": 1, "strings": 1}
    assert calls["faithful"] == {"denoiser": 200, "decoder": 1, "strings": 1}
    assert calls["autoregressive"] == {"token": LENGTH - 1, "draw": LENGTH - 1, "strings": 1}


def test_pytorch_is_measured_beside_them(measured):
    pytest.importorskip("torch", reason="its row is there only with PyTorch")
    for entry in measured["entries"]:
        if entry["system"] == systems.EAGER:
            assert entry["texts_per_second"]["median"] > 0
            assert "compile_seconds" not in entry
    assert "torch" in measured["versions"]


def test_ratios_are_those_of_the_entries(measured):
    # The median of two rounds is their mean.
    rates = {
        entry["system"]: (2 / entry["seconds"]["min"] + 2 / entry["seconds"]["max"]) / 2
        for entry in measured["entries"]
    }
    pairs = [
        (ours, theirs)
        for ours in ("default", "undistilled", "faithful")
        for theirs in ("autoregressive", "token_level", "masked")
    ]
    assert measured["ratios"] == pytest.approx(
        {f"{ours}_over_{theirs}_batch2": rates[ours] / rates[theirs] for ours, theirs in pairs}
    )


def test_ratios_are_of_one_batch_size_and_of_what_was_measured():
    def entry(system, batch_size, rate):
        return {
            "system": system,
            "batch_size": batch_size,
            "texts_per_second": {"median": rate, "min": 0.0, "max": 9.0},
        }

    assert benchmark.ratios(
        [
            entry("default", 1, 6.0),
            entry("masked", 1, 2.0),
            entry("token_level", 1, 4.0),
            {"system": "faithful", "batch_size": 1, "skipped": "too long"},
            entry("default", 64, 5.0),
            entry("autoregressive", 64, 10.0),
            entry(systems.EAGER, 64, 1.0),
        ]
    ) == {
        "default_over_token_level_batch1": 1.5,
        "default_over_masked_batch1": 3.0,
        "default_over_autoregressive_batch64": 0.5,
    }


def test_training_is_measured_with_and_without_reading(measured):
    stages = ["autoencoder", "diffusion", "distillation", "autoregressive", "masked"]
    assert [entry["stage"] for entry in measured["training"]] == stages
    for entry in measured["training"]:
        seconds = {way: entry["seconds_per_step"][way] for way in ("input_on", "input_off")}
        for way, found in seconds.items():
            rate = entry["tokens_per_second"][way]
            assert rate["max"] == pytest.approx(4 * LENGTH / found["min"])
        on, off = (seconds[way]["median"] for way in ("input_on", "input_off"))
        assert entry["input_cost"] == pytest.approx(on / off - 1)
        assert entry["flops_per_step"] > 0
        assert ("torch" in entry["tokens_per_second"]) == (entry["stage"] == "autoregressive")


def test_the_model_in_pytorch_is_as_large_as_ours(tiny):
    of_system = systems.config_of("autoregressive", tiny.config())
    baseline = BASELINES["autoregressive"]
    model = baseline.build(of_system, of_system.encoder.vocab_size)
    ours = jax.eval_shape(baseline.stage(of_system, model, {}, {}, "").init, jax.random.key(0), {})
    theirs, _ = torch_gpt2._model(of_system, "float32")
    size = sum(parameter.numel() for parameter in theirs.parameters())
    assert size == sum(leaf.size for leaf in jax.tree.leaves(ours))


def test_the_table_shows_all(measured):
    table = benchmark.table(measured)
    for name in (*systems.CHANGES, *measured["ratios"], "denoiser", "diffusion"):
        assert name in table


def test_what_is_measured_is_kept_when_it_stops(tiny, tmp_path, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(speed, "training", stop)
    path = tmp_path / "out.json"
    with pytest.raises(KeyboardInterrupt):
        benchmark.benchmark(config(tiny.config(), systems="default", batch_sizes=(2,)), path)
    found = json.loads(path.read_text())
    assert found["complete"] is False
    assert [entry["system"] for entry in found["entries"]] == ["default"]


def test_what_would_take_too_long_is_skipped(tiny, mesh, monkeypatch):
    monkeypatch.delattr(speed.Program, "times")  # nothing is generated
    asked = config(tiny.config(), skip_seconds=1e-9)
    with jax.set_mesh(mesh):
        models = systems.open_systems(asked, mesh)
        entries = speed.generation(asked, models, 2, {}, mesh)
    assert [entry["system"] for entry in entries] == list(systems.CHANGES)
    assert all("texts_per_second" not in entry for entry in entries)
    why = {entry["system"]: entry["skipped"] for entry in entries}
    assert "200 x denoiser" in why["faithful"]
    assert benchmark.ratios(entries) == {}


def test_a_long_system_is_timed_less_often():
    asked = ConfigDict({"rounds": 5, "max_seconds": 10.0})
    assert [speed.rounds_within(s, asked) for s in (0.1, 2.0, 2.6, 9.0, 11.0)] == [5, 5, 3, 1, 1]


def test_systems_take_turns():
    assert "".join(speed.interleaved({"a": 4, "b": 2, "c": 3})) == "abcbcaaca"
    assert list(speed.interleaved({})) == []


def test_with_sources_too(tiny, mesh):
    names = ",".join(name for name in systems.CHANGES if name != "faithful")
    base = tiny.pairs_config(data__conditional=True)
    asked = config(base, systems=names, rounds=1)
    with jax.set_mesh(mesh):
        models = systems.open_systems(asked, mesh)
        roof = peaks.measure("float32")
        entries = {e["system"]: e for e in speed.generation(asked, models, 2, roof, mesh)}
    assert "source" in entries[systems.EAGER]["skipped"]
    for name in ("default", "autoregressive", "token_level", "masked"):
        assert next(iter(entries[name]["parts"])) == "source"
    # With guidance each call of the denoiser is one of both halves.
    parts = parts_of(models["default"], jax.random.key(0), models["default"].batch(2))
    assert parts[1].name == "denoiser"
    assert len(parts[1].state) == 4


def test_what_is_decoded_in_parts_is_counted_whole(tiny, mesh):
    """200 texts are two parts and a rest here, 50 are one."""
    asked = config(tiny.config(), systems="default")
    with jax.set_mesh(mesh):
        model = systems.open_systems(asked, mesh)["default"]
        per_text = []
        for num_texts in (50, 200):
            parts = parts_of(model, jax.random.key(0), model.batch(num_texts))
            decoder = speed.TimedPart(next(part for part in parts if part.name == "decoder"))
            per_text.append(decoder.flops / num_texts)
    # What starts all texts alike is computed once.
    assert per_text[1] == pytest.approx(per_text[0], rel=0.02)


@pytest.mark.parametrize("name", OF_JAX)
def test_random_weights_write_texts_of_full_length(tiny, mesh, name):
    asked = config(tiny.config(), systems=name)
    with jax.set_mesh(mesh):
        model = systems.open_systems(asked, mesh)[name]
        key, batch = jax.random.key(1), model.batch(64)
        ids = np.asarray(jax.jit(model.generate)(model.weights, key, batch))
    assert ids.shape == (64, LENGTH)
    assert not np.any(ids == tiny_sizes.SEP)
    assert len(model.decode(ids)) == 64


def test_the_autoregressive_model_goes_through_all_positions(tiny, mesh):
    asked = config(tiny.config(), systems="autoregressive")
    with jax.set_mesh(mesh):
        model = systems.open_systems(asked, mesh)["autoregressive"]
        decode = jax.jit(decoding.make_decoder(model.config, model.model))
        for seed in range(20):
            keys = row_keys(jax.random.key(seed), np.arange(1))
            assert int(decode(model.weights, keys, None)[1]) == LENGTH - 1


@pytest.mark.parametrize("num_steps", [4, 11, 40])
def test_calls_of_masked_diffusion_are_counted(tiny, mesh, monkeypatch, num_steps):
    counts = Counter()

    def count_calls_of(name: str) -> None:
        inner = getattr(masked.Masked, name)

        def counted(self, *inputs):
            jax.debug.callback(lambda: counts.update([name]))
            return inner(self, *inputs)

        monkeypatch.setattr(masked.Masked, name, counted)

    count_calls_of("hidden")
    count_calls_of("logits")
    base = tiny.config(masked__num_sampling_steps=num_steps)
    with jax.set_mesh(mesh):
        model = systems.open_systems(config(base, systems="masked"), mesh)["masked"]
        key, batch = jax.random.key(3), model.batch(5)
        jax.block_until_ready(jax.jit(model.generate)(model.weights, key, batch))
        jax.effects_barrier()
        monkeypatch.undo()
        found = {part.name: part.calls for part in parts_of(model, key, batch)}
    assert found == {"pass": counts["hidden"], "head": counts["logits"]}


def test_flops_are_those_of_the_matrix_products():
    """A loop over the layers would count as one of them, and this would tell."""
    batch, latents, width, layers = 3, 16, 256, 4
    module = Denoiser(DenoiserConfig(width, num_heads=4, num_layers=layers))
    x = jax.ShapeDtypeStruct((batch, latents, width), np.float32)
    inputs = (x, jax.ShapeDtypeStruct((batch,), np.float32), x)
    params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    found = peaks.flops(jax.jit(module.apply).lower(params, *inputs))
    square = 2 * width**2
    layer = latents * (4 + 12 + 1) * square + 4 * latents**2 * width + square
    assert found == pytest.approx(batch * (layers * layer + 4 * square), rel=0.03)


def test_trained_weights_are_taken(tiny, finished, mesh):
    base = tiny.config(diffusion__num_sampling_steps=5)
    asked = config(base, systems="default", workdirs={"default": str(finished)})
    with jax.set_mesh(mesh):
        (entry,) = speed.generation(
            asked, systems.open_systems(asked, mesh), 2, peaks.measure("float32"), mesh
        )
    assert entry["weights"] == str(finished)
    assert entry["sampling"]["num_sampling_steps"] == 5
    with pytest.raises(UserError, match="has system 'cosmos', not 'masked'"):
        systems.trained("masked", finished, base)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"systems": "default,fast"}, "config.systems"),
        ({"batch_sizes": (1, 0)}, "config.batch_sizes"),
        ({"rounds": 0}, "config.rounds"),
        (
            {"training": {"stages": "distillation", "steps": 1, "batch_size": 4}},
            "config.training.stages is 'distillation', but config.base.distillation.steps is 0",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(tiny, tmp_path, fields, message):
    with pytest.raises(UserError, match=message):
        benchmark.benchmark(config(tiny.config(), **fields), tmp_path / "out.json")
    assert not list(tmp_path.iterdir())


def test_a_vocabulary_too_small_for_the_tokenizer_is_refused(tiny):
    base = config(tiny.config()).base
    base.encoder.vocab_size = 59
    with pytest.raises(UserError, match="vocab_size is 59"):
        systems.load_tokenizer(base)


@pytest.mark.parametrize("size", ["", "small"])
def test_configs_are_valid(size, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from configs import benchmark as configs

    found = configs.get_config(*([size] if size else []))
    benchmark.validate(found)
    assert found.base.data.max_length == 128
    assert found.base.autoencoder.num_latents == 16


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--config=configs/benchmark.py:tiny"], "the sizes are paper and small"),
        (["--config=configs/quickstart.py"], "not a benchmark"),
        (["--config=configs/benchmark.py", "--config.round=3"], "did you mean 'rounds'"),
    ],
)
def test_a_bad_flag_is_one_line(tmp_path, flags, message):
    done = subprocess.run(
        [sys.executable, "-m", "cosmos_jax.benchmark", *flags, f"--out={tmp_path / 'out.json'}"],
        **{"cwd": ROOT, "capture_output": True, "text": True},
        check=False,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert not list(tmp_path.iterdir())
