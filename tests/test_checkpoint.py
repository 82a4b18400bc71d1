"""Checkpoints: items by themselves, damage, and those of another model."""

import jax
import numpy as np
import pytest

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
