"""Checkpoints: items by themselves, damage, and those of another model."""

import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils

from cosmos_jax.checkpoint import Checkpoints, shapes_on
from cosmos_jax.errors import UserError


def items(value):
    """Big enough that Orbax's files cannot lose half of themselves unnoticed."""
    rng = np.random.default_rng(value)
    return {
        "params": {"layer": {"kernel": rng.normal(size=(64, 64)).astype(np.float32)}},
        "statistics": {"mean": np.full(3, value, np.float32)},
    }


def description(shape=(64, 64)):
    return {"layer": {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}}


@pytest.fixture
def directory(tmp_path):
    """Checkpoints of steps 10 and 20."""
    with Checkpoints(tmp_path / "stage", keep=2) as checkpoints:
        for step in (5, 10, 20):
            checkpoints.save(step, items(step), {"data": f"texts {step}"})
    return tmp_path / "stage"


def damage(directory, step):
    """Truncates the largest file of a checkpoint's parameters."""
    files = [p for p in (directory / str(step) / "params").rglob("*") if p.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    assert largest.stat().st_size > 64 * 64 * 2
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def newest(directory, **shapes):
    with Checkpoints(directory, read_only=True) as checkpoints:
        return checkpoints.newest(shapes)


def test_the_last_ones_are_kept(directory):
    with Checkpoints(directory, read_only=True) as checkpoints:
        assert checkpoints.steps() == [20, 10]


def test_every_item_can_be_read_alone(directory):
    step, found, metadata = newest(directory, statistics=None)
    assert step == 20
    assert metadata == {"data": "texts 20"}
    assert list(found) == ["statistics"]
    np.testing.assert_array_equal(found["statistics"]["mean"], [20, 20, 20])
    _, found, _ = newest(directory, params=description())
    kernel = items(20)["params"]["layer"]["kernel"]
    np.testing.assert_array_equal(found["params"]["layer"]["kernel"], kernel)


def test_arrays_come_on_the_layout_asked_for(directory):
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = shapes_on(description(), {"layer": {"kernel": device}})
    kernel = newest(directory, params=shapes)[1]["params"]["layer"]["kernel"]
    assert isinstance(kernel, jax.Array)
    assert kernel.sharding == device


def test_a_damaged_checkpoint_is_passed_over(directory, caplog):
    damage(directory, 20)
    step, found, metadata = newest(directory, params=description())
    assert step == 10
    assert metadata == {"data": "texts 10"}
    kernel = items(10)["params"]["layer"]["kernel"]
    np.testing.assert_array_equal(found["params"]["layer"]["kernel"], kernel)
    assert f"checkpoint {directory}/20 cannot be read" in caplog.text


def test_nothing_is_deleted_when_all_are_damaged(directory):
    damage(directory, 10)
    damage(directory, 20)
    before = sorted(directory.rglob("*"))
    with pytest.raises(UserError, match=r"none of the checkpoints \[20, 10\] can be read"):
        newest(directory, params=description())
    assert sorted(directory.rglob("*")) == before


def test_another_model_is_refused_by_its_parameter(directory):
    with pytest.raises(UserError) as error:
        newest(directory, params=description((64, 32)))
    assert (
        "is of another model: params/layer/kernel has shape (64, 64) there and (64, 32) here"
        in str(error.value)
    )
    other = {"layer": {**description()["layer"], "bias": jax.ShapeDtypeStruct((64,), np.float32)}}
    with pytest.raises(UserError, match=r"params/layer/bias has shape None there and \(64,\) here"):
        newest(directory, params=other)
    with pytest.raises(UserError, match="has no ema: it is of another model"):
        newest(directory, ema=description())


def test_no_checkpoint(tmp_path):
    with Checkpoints(tmp_path / "new") as checkpoints:
        assert checkpoints.newest({"params": None}) is None
        assert checkpoints.steps() == []


# Damage


def files(directory):
    """Every file of the newest checkpoint."""
    return sorted(p for p in (directory / "20").rglob("*") if p.is_file())


def truncate(content, rng):
    return content[: len(content) // 2]


def flip(content, rng):
    position = rng.integers(len(content))
    flipped = content[position] ^ (1 << rng.integers(8))
    return content[:position] + bytes([flipped]) + content[position + 1 :]


@pytest.mark.parametrize("harm", [None, truncate, flip], ids=["missing", "truncated", "flipped"])
def test_no_damage_is_silent(directory, tmp_path, harm, caplog):
    """Whichever file it is: the checkpoint is whole, or the one before is used with a warning."""
    rng = np.random.default_rng()
    asked = {"params": description(), "statistics": None}
    passed_over = 0
    paths = [path for path in files(directory) if harm is None or path.stat().st_size]
    assert len(paths) > 10
    for path in paths:
        for _ in range(8 if harm is flip else 1):
            content = path.read_bytes()
            path.unlink() if harm is None else path.write_bytes(harm(content, rng))
            caplog.clear()
            step, found, metadata = newest(directory, **asked)
            assert metadata == {"data": f"texts {step}"}, path
            for name, tree in items(step).items():
                jax.tree.map(np.testing.assert_array_equal, found[name], tree)
            if step == 10:
                passed_over += 1
                (record,) = [r for r in caplog.records if r.name == "cosmos_jax.checkpoint"]
                assert f"{directory}/20 cannot be read: " in record.getMessage(), path
            path.write_bytes(content)
    assert passed_over >= 5


def test_a_checkpoint_that_could_not_be_read_is_made_again(directory):
    damage(directory, 20)
    with Checkpoints(directory, keep=2) as checkpoints:
        checkpoints.save(15, items(15), {"data": "texts 15"})
        checkpoints.save(20, items(3), {"data": "again"})
    step, found, metadata = newest(directory, params=description())
    assert (step, metadata) == (20, {"data": "again"})
    np.testing.assert_array_equal(
        found["params"]["layer"]["kernel"], items(3)["params"]["layer"]["kernel"]
    )


def test_saving_does_not_ask_whether_to_stop(tmp_path, monkeypatch):
    """JAX remembers the number of one question only, and that is `distributed.preempted`'s."""

    def asked(number):
        raise AssertionError(number)

    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", asked)
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(50_000, items(1), {})
        checkpoints.wait()
        assert checkpoints.steps() == [50_000]


def test_a_save_goes_on_in_the_background(tmp_path, monkeypatch):
    """The call returns while the file system hangs; then the arrays are no longer needed."""
    rename, released, renamed = os.rename, threading.Event(), []

    def slow(source, target):
        released.wait(20)
        renamed.append(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", slow)
    given = jax.tree.map(jnp.array, items(1))
    with Checkpoints(tmp_path / "stage") as checkpoints:
        checkpoints.save(10, given, {})
        assert not (tmp_path / "stage" / "10").exists()
        for array in jax.tree.leaves(given):
            array.delete()
        released.set()
        checkpoints.wait()
    assert str(tmp_path / "stage" / "10") in map(str, renamed)
    kernel = newest(tmp_path / "stage", params=description())[1]["params"]["layer"]["kernel"]
    np.testing.assert_array_equal(kernel, items(1)["params"]["layer"]["kernel"])


# Keeping the best


@pytest.mark.parametrize(
    ("metric", "best"), [("validation_loss", 3), ("validation_accuracy", 2), ("", None)]
)
def test_the_best_is_kept_beside_the_last(tmp_path, metric, best):
    losses = {1: 3.0, 2: 2.0, 3: 1.0, 4: None, 5: 1.5, 6: float("nan"), 7: 4.0}
    accuracies = {1: 0.1, 2: 0.9, 3: 0.5, 5: 0.5, 6: 0.2, 7: 0.2}
    folder = tmp_path / "stage"
    for steps in ((1, 2, 3, 4), (5, 6, 7)):  # the second part in a new process
        with Checkpoints(folder, keep=2, best=metric) as checkpoints:
            for step in steps:
                values = {"validation_loss": losses[step]}
                values["validation_accuracy"] = accuracies.get(step, 0.0)
                checkpoints.save(step, items(step), {}, values if losses[step] else None)
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.steps() == [7, 6, *([best] if best else [])]
        step, found, _ = checkpoints.newest({"params": description()}, best=metric)
        assert step == (best or 7)
        kernel = items(step)["params"]["layer"]["kernel"]
        np.testing.assert_array_equal(found["params"]["layer"]["kernel"], kernel)
        assert checkpoints.newest({"params": description()})[0] == 7
    if best:
        damage(folder, best)
        with Checkpoints(folder, read_only=True) as checkpoints:
            assert checkpoints.newest({"params": description()}, best=metric)[0] in (6, 7)
