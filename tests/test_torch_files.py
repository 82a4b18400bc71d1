"""The reader of PyTorch's files against PyTorch itself, and against files made to do harm."""

import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_jax.errors import UserError
from cosmos_jax.models.torch_files import load_torch_file

torch = pytest.importorskip("torch", reason="PyTorch writes the files that are read here")

DTYPES = (
    "float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 complex64 complex128"
    " int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool"
).split()


def as_bytes(tensor) -> bytes:
    """The elements in row-major order; a view as bytes has no unknown dtypes."""
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def save(path: Path, value) -> Path:
    torch.save(value, path)
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_bit_by_bit(tmp_path, dtype):
    numbers = torch.tensor([[0, 1, 1], [1, 0, 7]], dtype=torch.float32)
    tensor = numbers.to(getattr(torch, dtype))
    loaded = load_torch_file(save(tmp_path / "x.pt", {"x": tensor}))["x"]
    assert loaded.dtype.name == dtype
    assert loaded.shape == (2, 3)
    assert loaded.tobytes() == as_bytes(tensor)


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    data=st.data(),
)
def test_views_keep_shape_and_content(tmp_path_factory, shape, data):
    tensor = torch.arange(int(np.prod(shape, dtype=int)), dtype=torch.int32).reshape(shape)
    tensor = tensor.permute(data.draw(st.permutations(range(len(shape)))))
    if shape and tensor.shape[0]:
        tensor = tensor[data.draw(st.integers(0, tensor.shape[0] - 1)) :]
    tensor = tensor[..., ::2] if shape else tensor
    path = tmp_path_factory.mktemp("views") / "x.pt"
    np.testing.assert_array_equal(load_torch_file(save(path, tensor)), tensor.numpy(), strict=True)


def test_what_shared_memory_shares_it_still(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    views = {"base": base, "row": base[1], "turned": base.T, "spread": base[0].expand(5, 4)}
    loaded = load_torch_file(save(tmp_path / "x.pt", views))
    for name, tensor in views.items():
        np.testing.assert_array_equal(loaded[name], tensor.numpy(), strict=True)
        assert np.shares_memory(loaded[name], loaded["base"])
    assert not loaded["base"].flags.writeable


def test_containers_parameters_and_scalars(tmp_path):
    value = {
        "state": OrderedDict(a=torch.nn.Parameter(torch.ones(2)), b=torch.tensor(3)),
        "list": [1, 2.5, None, True, "text", b"bytes", (1, 2), {3}, 1j],
        "size": torch.Size([2, 3]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
    }
    loaded = load_torch_file(save(tmp_path / "x.pt", value))
    np.testing.assert_array_equal(loaded["state"]["a"], [1, 1])
    assert loaded["state"]["b"].shape == ()
    assert loaded["state"]["b"] == 3
    assert loaded["list"] == value["list"]
    assert loaded["size"] == (2, 3)
    assert loaded["device"] == "cpu"
    assert loaded["dtype"] == np.float16


def test_state_dict_of_a_module(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    expected = module.state_dict()
    loaded = load_torch_file(save(tmp_path / "x.pt", expected))
    assert list(loaded) == list(expected)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(loaded[name], tensor.numpy(), strict=True)


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def touch(path) -> None:
    Path(path).touch()


@pytest.mark.parametrize("function", [os.mkdir, touch, os.system, eval, getattr, print])
def test_refuses_to_call_functions(tmp_path, function, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(Path("evil.pt"), {"weights": Call(function, "made")})
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match="refused to run"):
        load_torch_file(path)
    assert sorted(tmp_path.iterdir()) == before
    torch.load(path, weights_only=False) if function is touch else None
    assert Path("made").exists() == (function is touch)  # The file would have done harm.


def archive(path: Path, pickled: bytes, **files: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("x/data.pkl", pickled)
        for name, content in files.items():
            file.writestr(f"x/{name}", content)
    return path


@pytest.mark.parametrize(
    "pickled",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",  # GLOBAL and REDUCE
        b"(S'1'\nibuiltins\neval\n.",  # INST
        b"(cbuiltins\neval\nS'1'\no.",  # OBJ
        b"\x80\x02cbuiltins\nobject\n)\x81.",  # NEWOBJ
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x011\x85R.",  # STACK_GLOBAL
        b"\x80\x04\x8c\x05torch\x8c\x0aload.x.y.z\x93.",  # attributes of an allowed module
        b"\x80\x02cbuiltins\nset\n)R}X\x01\x00\x00\x00aK\x01sb.",  # BUILD on a set
    ],
)
def test_refuses_every_way_of_naming_a_function(tmp_path, pickled):
    with pytest.raises(UserError, match="refused to run"):
        load_torch_file(archive(tmp_path / "evil.pt", pickled))


def test_refuses_a_tensor_that_reaches_past_its_storage(tmp_path):
    class Reference:
        def __init__(self, size):
            self.size = size

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if isinstance(value, Reference):
                return ("storage", torch.FloatStorage, "0", "cpu", value.size)
            return None

    for size, offset, shape, strides in [
        (4, 1, (4,), (1,)),
        (4, 0, (2, 4), (4, 1)),
        (4, -1, (2,), (1,)),
        (4, 0, (4,), (-1,)),
        (9, 0, (9,), (1,)),
    ]:
        tensor = Call(
            torch._utils._rebuild_tensor_v2,
            Reference(size),
            offset,
            shape,
            strides,
            False,
            OrderedDict(),
        )
        path = tmp_path / "x.pkl"
        with path.open("wb") as file:
            Pickler(file, protocol=2).dump(tensor)
        evil = archive(tmp_path / "evil.pt", path.read_bytes(), **{"data/0": bytes(16)})
        with pytest.raises(UserError, match="truncated or damaged"):
            load_torch_file(evil)


def test_truncated_files_are_told_of_in_one_line(tmp_path):
    path = save(tmp_path / "x.pt", {"x": torch.arange(100.0)})
    content = path.read_bytes()
    for length in range(0, len(content), 97):
        path.write_bytes(content[:length])
        with pytest.raises(UserError) as caught:
            load_torch_file(path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_damaged_content_is_noticed(tmp_path):
    path = save(tmp_path / "x.pt", torch.arange(100.0))
    content = bytearray(path.read_bytes())
    at = content.index(np.arange(100, dtype=np.float32).tobytes())
    content[at + 7] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(UserError, match="truncated or damaged"):
        load_torch_file(path)


@pytest.mark.parametrize("pickled", [b"", b"\x80\x02", b"garbage", b"\x80\x02K\x01K\x02", b"0."])
def test_damaged_pickles(tmp_path, pickled):
    with pytest.raises(UserError, match="truncated or damaged"):
        load_torch_file(archive(tmp_path / "x.pt", pickled))


def test_other_formats(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        load_torch_file(path)
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"before version 1\.6"):
        load_torch_file(path)
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match=r"not a checkpoint written by torch\.save"):
        load_torch_file(path)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("readme.txt", "nothing")
    with pytest.raises(UserError, match=r"not one written by torch\.save"):
        load_torch_file(path)
    archive(path, pickle.dumps({}, protocol=2), byteorder=b"big")
    with pytest.raises(UserError, match="big-endian"):
        load_torch_file(path)
