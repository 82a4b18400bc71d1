"""Layouts: what divides, what follows what, and the same on several devices for real."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P
from virtual_devices import environment

from cosmos_jax import sharding
from cosmos_jax.errors import UserError

AXES = ("data", "fsdp", "tensor")


def mesh_config(*sizes):
    return dict(zip(AXES, sizes, strict=True))


@given(
    sizes=st.tuples(*[st.integers(1, 6)] * 3),
    rest=st.sampled_from((None, 0, 1, 2)),
    factor=st.integers(1, 5),
)
def test_mesh_shape_fills_in_the_rest(sizes, rest, factor):
    devices = math.prod(sizes)
    if rest is None:
        # An explicit shape may leave devices out, if it divides them.
        assert sharding.mesh_shape(mesh_config(*sizes), devices * factor) == sizes
    else:
        asked = tuple(-1 if axis == rest else size for axis, size in enumerate(sizes))
        assert sharding.mesh_shape(mesh_config(*asked), devices) == sizes


@given(sizes=st.tuples(*[st.integers(1, 6)] * 3), devices=st.integers(1, 64))
def test_mesh_shape_fits_or_says_why(sizes, devices):
    needed = math.prod(sizes)
    if devices % needed == 0:
        assert sharding.mesh_shape(mesh_config(*sizes), devices) == sizes
        return
    with pytest.raises(UserError) as error:
        sharding.mesh_shape(mesh_config(*sizes), devices)
    assert "x".join(map(str, sizes)) in str(error.value)
    assert str(devices) in str(error.value)


def test_too_few_devices_names_both_numbers():
    with pytest.raises(UserError, match=r"1x4x2, which needs 8 devices; there are 2"):
        sharding.mesh_shape(mesh_config(1, 4, 2), 2)


PATHS = (
    "blocks_0/attention/query/kernel",
    "blocks_0/attention/memory_value/kernel",
    "blocks_0/attention/out/kernel",
    "blocks_0/mlp/up/kernel",
    "blocks_0/mlp/down/kernel",
    "head/kernel",
    "positions",
    "norm/scale",
)


@given(
    path=st.sampled_from(PATHS),
    shape=st.lists(st.sampled_from((1, 3, 16, 64, 96, 384, 28_996)), min_size=1, max_size=3),
    fsdp=st.integers(1, 8),
    tensor=st.integers(1, 8),
)
def test_every_split_axis_divides(path, shape, fsdp, tensor):
    mesh = sharding.abstract_mesh(mesh_config(1, fsdp, tensor), fsdp * tensor)
    spec = sharding.spec(path, tuple(shape), mesh)
    used = [axis for axis in spec if axis is not None]
    assert len(used) == len(set(used))
    assert "data" not in used
    assert len(spec) <= len(shape)
    for length, axis in zip(shape, spec, strict=False):
        assert axis is None or length % mesh.shape[axis] == 0
    if math.prod(shape) < 2**14:
        assert not used


@pytest.mark.parametrize(
    ("path", "shape", "wanted"),
    [
        ("a/query/kernel", (768, 768), P("fsdp", "tensor")),
        ("a/memory_key/kernel", (768, 768), P("fsdp", "tensor")),
        ("a/up/kernel", (768, 3072), P("fsdp", "tensor")),
        ("a/out/kernel", (768, 768), P("tensor", "fsdp")),
        ("a/down/kernel", (3072, 768), P("tensor", "fsdp")),
        ("head/kernel", (768, 28_997), P("fsdp", None)),  # a prime number of pieces
        ("positions", (512, 768), P(None, "fsdp")),
        ("positions", (512, 769), P("fsdp", None)),
        ("a/query/kernel", (767, 769), P(None, None)),
        ("norm/scale", (768,), P()),
    ],
)
def test_rules(path, shape, wanted):
    mesh = sharding.abstract_mesh(mesh_config(2, 4, 2), 16)
    assert sharding.spec(path, shape, mesh) == wanted


def test_optimiser_state_lies_as_its_parameters_do():
    mesh = sharding.abstract_mesh(mesh_config(1, 4, 2), 8)
    shapes = {
        "block": {"query": {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)}},
        "positions": jax.ShapeDtypeStruct((128, 768), jnp.float32),
    }
    wanted = sharding.layout(shapes, mesh)
    state = sharding.layout(jax.eval_shape(optax.adam(1e-3).init, shapes), mesh)
    assert wanted["block"]["query"]["kernel"].spec == P("fsdp", "tensor")
    assert state[0].mu == wanted
    assert state[0].nu == wanted


def test_bytes_per_device_by_hand():
    tree = {
        "query": {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)},
        "head": {"kernel": jax.ShapeDtypeStruct((768, 1001), jnp.bfloat16)},
        "scale": jax.ShapeDtypeStruct((768,), jnp.float32),
    }
    mesh = sharding.abstract_mesh(mesh_config(2, 4, 2), 16)
    split = 768 * 768 * 4 // 8 + 768 * 1001 * 2 // 4 + 768 * 4
    assert sharding.bytes_per_device(tree, mesh) == split
    whole = sharding.abstract_mesh(mesh_config(1, 1, 1), 1)
    assert sharding.bytes_per_device(tree, whole) == 768 * 768 * 4 + 768 * 1001 * 2 + 768 * 4


def test_a_batch_must_split_evenly():
    mesh = sharding.abstract_mesh(mesh_config(2, 4, 2), 16)
    sharding.check_batch_size(24, mesh, "diffusion.batch_size")
    with pytest.raises(UserError, match=r"config\.diffusion\.batch_size is 20, .* 8 parts"):
        sharding.check_batch_size(20, mesh, "diffusion.batch_size")


ON_EIGHT_DEVICES = """
import jax, numpy as np
from cosmos_jax import sharding
assert jax.device_count() == 8
mesh = sharding.make_mesh({"data": -1, "fsdp": 2, "tensor": 2})
assert dict(mesh.shape) == {"data": 2, "fsdp": 2, "tensor": 2}
rows = np.arange(32, dtype=np.float32).reshape(8, 4)
batch = sharding.put_batch({"rows": rows}, mesh)["rows"]
np.testing.assert_array_equal(batch, rows)
assert batch.sharding.shard_shape(batch.shape) == (2, 4)
kernel = np.random.default_rng(0).normal(size=(256, 128)).astype(np.float32)
put = sharding.put_tree({"query": {"kernel": kernel}, "scale": kernel[0]}, mesh)
np.testing.assert_array_equal(put["query"]["kernel"], kernel)
assert put["query"]["kernel"].addressable_shards[0].data.shape == (128, 64)
assert put["scale"].addressable_shards[0].data.shape == (128,)
few = sharding.make_mesh({"data": 1, "fsdp": 2, "tensor": 1})
assert few.devices.size == 2
print("fine")
"""


def test_arrays_lie_as_the_rules_say_on_eight_devices():
    done = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=environment(8),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


def test_one_device_is_the_same_code():
    mesh = sharding.make_mesh(mesh_config(1, 1, 1))
    rows = np.arange(6.0, dtype=np.float32).reshape(3, 2)
    np.testing.assert_array_equal(sharding.put_batch({"rows": rows}, mesh)["rows"], rows)
