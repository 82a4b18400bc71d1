"""The device mesh, and the layout of every array on it by rules on the array's path.

Axes: `data` and `fsdp` split the batch; `fsdp` also splits parameters, optimiser state and
EMA; `tensor` splits attention heads and MLP width. One device is a mesh of 1 x 1 x 1.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from cosmos_jax.errors import UserError

T = TypeVar("T")

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# The first rule that matches a path decides. Optimiser state and EMA carry their
# parameter's path at their end, so they follow it.
RULES = (
    (r"(query|key|value|gate|up)/kernel$", P("fsdp", "tensor")),
    (r"(out|down)/kernel$", P("tensor", "fsdp")),
    (r"head/kernel$", P("fsdp", "tensor")),
)
# Smaller tensors are copied to every device: moving them would cost more than it saves.
MIN_SPLIT_SIZE = 2**14


def mesh_shape(config: Mapping[str, int], num_devices: int) -> tuple[int, int, int]:
    """Devices along (data, fsdp, tensor) with -1 filled in; UserError if they don't fit."""
    shape = [config["data"], config["fsdp"], config["tensor"]]
    known = math.prod(n for n in shape if n != -1)
    text = "x".join(str(n) for n in shape)
    if known > num_devices:
        raise UserError(
            f"config.mesh (data x fsdp x tensor) is {text}, which needs {known} devices; "
            f"there are {num_devices}: lower it or start on more devices"
        )
    if num_devices % known:
        raise UserError(f"config.mesh is {text}, which does not divide the {num_devices} devices")
    return tuple(num_devices // known if n == -1 else n for n in shape)  # type: ignore[return-value]


def make_mesh(config: Mapping[str, int]) -> Mesh:
    """A mesh over all devices, or over the first ones if config.mesh asks for fewer."""
    shape = mesh_shape(config, jax.device_count())
    size = math.prod(shape)
    if jax.process_count() > 1 and size != jax.device_count():
        raise UserError(
            f"config.mesh uses {size} of {jax.device_count()} devices; "
            "a run of several processes must use all of them"
        )
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:size])


def abstract_mesh(config: Mapping[str, int], num_devices: int) -> AbstractMesh:
    """The same mesh without devices, to compute layouts for machines that are elsewhere."""
    return AbstractMesh(mesh_shape(config, num_devices), AXES, axis_types=(AxisType.Auto,) * 3)


def spec(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> P:
    """The layout of the array at `path`: the rule's, or the largest divisible axis over fsdp."""
    sizes = mesh.shape

    def fits(axis: str | None, length: int) -> bool:
        return axis is not None and length % sizes[axis] == 0

    if math.prod(shape) >= MIN_SPLIT_SIZE:
        for pattern, rule in RULES:
            if re.search(pattern, path) and len(rule) == len(shape):
                return P(*(a if fits(a, n) else None for a, n in zip(rule, shape, strict=True)))
        for axis in sorted(range(len(shape)), key=lambda i: -shape[i]):
            if fits("fsdp", shape[axis]):
                return P(*("fsdp" if i == axis else None for i in range(len(shape))))
    return P()


def layout(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """A NamedSharding for every leaf of a tree of arrays or shapes."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(
            mesh, spec(jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, mesh)
        ),
        tree,
    )


def batch_layout(mesh: Mesh) -> NamedSharding:
    """The first axis split over all devices but those that share a tensor axis."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """A copy on every device: what the host reads must be whole on each process."""
    return NamedSharding(mesh, P())


def batch_parts(mesh: Mesh | AbstractMesh) -> int:
    """Into how many parts the batch is split."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, field: str, accumulate: int = 1) -> None:
    """UserError if a batch, or each of the parts it is computed in, does not split evenly."""
    parts = batch_parts(mesh)
    if batch_size % (parts * accumulate):
        times = f" times {accumulate}, its `accumulate`" if accumulate > 1 else ""
        raise UserError(
            f"config.{field} is {batch_size}, not a multiple of the mesh's {parts} parts{times}"
        )


def split_batch(x: jax.Array) -> jax.Array:
    """Keeps the first axis of an activation split as the batch is, within `jax.set_mesh`.

    Without it the compiler may follow the layout of the parameters instead, and hold the
    activations of the whole batch on every device.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or x.shape[0] % batch_parts(mesh):
        return x
    free = (P.UNCONSTRAINED,) * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, P(BATCH_AXES, *free))


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's share of a batch, as one global array per field."""
    sharding = batch_layout(mesh)
    return {
        name: jax.make_array_from_process_local_data(
            sharding, value.astype(jax.dtypes.canonicalize_dtype(value.dtype))
        )
        for name, value in batch.items()
    }


def put_tree(tree: Any, mesh: Mesh) -> Any:
    """A tree of host arrays, the same on every process, laid out by the rules."""
    return jax.device_put(tree, layout(tree, mesh))


def bytes_per_device(tree: Any, mesh: AbstractMesh) -> int:
    """Bytes one device holds of a tree of shapes laid out by the rules."""
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in zip(
            jax.tree.leaves(tree), jax.tree.leaves(layout(tree, mesh)), strict=True
        )
    )


def local_rows(batch_size: int, mesh: Mesh) -> np.ndarray:
    """The rows of a global batch that this process must load, ascending.

    They need not lie together: `jax.make_mesh` orders devices by how they are connected.
    """
    indices = batch_layout(mesh).addressable_devices_indices_map((batch_size,)).values()
    return np.unique(
        np.concatenate([np.arange(batch_size)[index[0]] for index in indices if index is not None])
    )


def on_one_device(function: Callable[[], T]) -> T:
    """Calls `function` so that it computes on the first device of this process alone.

    Within the mesh of a run each program is one of all devices, which all processes must start.
    """
    axis_types = (AxisType.Auto,)
    alone = jax.make_mesh((1,), ("data",), axis_types=axis_types, devices=jax.local_devices()[:1])
    with jax.set_mesh(alone):
        return function()
