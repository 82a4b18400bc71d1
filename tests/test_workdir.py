"""Files of a run: whole or not at all, for one run at a time, and for one config."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_jax import config as config_lib
from cosmos_jax import workdir
from cosmos_jax.errors import UserError

ROOT = Path(__file__).parents[1]


def test_files_are_replaced_whole(tmp_path, monkeypatch):
    path = tmp_path / "value.json"
    workdir.write_json(path, {"größe": [1, 2.5, None]})
    assert path.read_text("utf-8") == '{\n  "größe": [\n    1,\n    2.5,\n    null\n  ]\n}\n'
    assert workdir.read_json(path) == {"größe": [1, 2.5, None]}

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(UserError, match=r"value\.json: cannot be written: No space left on device"):
        workdir.write_json(path, {"something": "else"})
    assert workdir.read_json(path) == {"größe": [1, 2.5, None]}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": \xff}'])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "evaluation.json"
    assert workdir.read_json(path) is None
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"evaluation\.json: cannot be read"):
        workdir.read_json(path)


def test_a_folder_belongs_to_its_config(tmp_path):
    config = config_lib.base()
    workdir.claim(tmp_path, config)
    assert config_lib.flatten(workdir.read_config(tmp_path)) == config_lib.flatten(config)
    config.diffusion.steps = 7
    workdir.claim(tmp_path, config)
    assert workdir.read_config(tmp_path).diffusion.steps == 7
    config.seed = 3
    with pytest.raises(UserError, match="seed is 0 there and 3 here"):
        workdir.claim(tmp_path, config)
    assert workdir.read_config(tmp_path).seed == 0


def test_checkpoints_without_a_config_are_left_alone(tmp_path):
    (tmp_path / "diffusion").mkdir()
    with pytest.raises(UserError, match=r"holds checkpoints but no config\.json"):
        workdir.claim(tmp_path, config_lib.base())
    assert not (tmp_path / "config.json").exists()


HOLD = """
import sys, time
from pathlib import Path
from cosmos_jax.workdir import locked
with locked(Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_lock_dies_with_its_process(tmp_path):
    folder = tmp_path / "deep" / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"is in use by process {other.pid} on "):
            workdir.locked(folder).__enter__()
        other.kill()
    with workdir.locked(folder):
        pass
    with workdir.locked(folder):
        assert str(os.getpid()) in (folder / ".lock").read_text()


def test_a_workdir_that_cannot_be_one(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as --workdir"):
        workdir.locked(tmp_path / "file").__enter__()
