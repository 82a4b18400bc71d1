"""Nothing is lost: real processes that are killed, run into a full disk or into each other.

`soak.py` does the same two hundred times, at random, outside the tests.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soak
import tiny as tiny_lib

from cosmos_jax import feature_cache
from cosmos_jax.errors import UserError

ROOT = Path(__file__).parents[1]

TERM, KILL = signal.SIGTERM, signal.SIGKILL
# A save takes milliseconds: these kills come from within, before one of the first files of a
# checkpoint is opened, or before a folder of one of its 6 items or its own gets its last name.
SAVING = (("open", 9, KILL), ("os.rename", 7, KILL), ("os.rename", 7, TERM))
# So does what comes after, when one of these files is opened.
AFTERWARDS = ("samples.partial", "evaluation.partial")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("interrupted")


@pytest.fixture(scope="module")
def flag(tiny, folder):
    return tiny.save_config(folder / "config.json", soak.config(tiny))


@pytest.fixture(scope="module", autouse=True)
def on_cpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_PLATFORMS", "cpu")
        yield


@pytest.fixture(scope="module")
def reference(flag, folder):
    """A run that was left alone."""
    soak.run_to_the_end([flag, f"--workdir={folder / 'reference'}"], folder / "reference.log")
    return folder / "reference"


def test_a_run_killed_in_every_stage_is_the_run_never_killed(flag, folder, reference):
    workdir, log = folder / "killed", folder / "killed.log"
    arguments = [flag, f"--workdir={workdir}"]
    rng = random.Random()
    process = soak.start(arguments, log)
    delay = rng.uniform(0, 0.3)
    assert soak.kill_at(process, workdir, log, "autoencoder", delay, TERM), log.read_text()
    steps = sorted(rng.sample(range(3, 24, 3), len(SAVING)))
    for step, (event, times, number) in zip(steps, SAVING, strict=True):
        name = f"diffusion/{step}.orbax-checkpoint-tmp"
        process = soak.start(arguments, log, (event, name, rng.randint(1, times), number))
        process.join(soak.PATIENCE)
        assert process.exitcode == (-KILL if number == KILL else 0), log.read_text()
        if number == KILL:
            # It is left half made; the complete ones are those before it.
            assert {p.name for p in (workdir / "diffusion").glob("*tmp*")} == {Path(name).name}
            assert not (workdir / "diffusion" / str(step)).exists()
        else:
            assert "stopped on request" in log.read_text().splitlines()[-1]
            soak.check_saved(workdir, log.read_text().splitlines()[-1])
    for name, number in zip(AFTERWARDS, rng.sample((KILL, TERM), 2), strict=True):
        texts = _lines(workdir / "samples.partial.jsonl")
        finished = (workdir / "evaluation.json").exists()
        process = soak.start(arguments, log, ("open", name, rng.randint(1, 3), number))
        process.join(soak.PATIENCE)
        # A SIGTERM may be noticed too late to stop what is nearly done.
        assert process.exitcode == (-KILL if number == KILL and not finished else 0), (
            log.read_text()
        )
        if number == TERM and not (workdir / "evaluation.json").exists():
            assert "stopped on request" in log.read_text().splitlines()[-1]
        # Generation goes on: what was written before is still there.
        if not (workdir / "samples.jsonl").exists():
            assert _lines(workdir / "samples.partial.jsonl")[: len(texts)] == texts
    soak.run_to_the_end(arguments, log)
    assert soak.differences(workdir, reference) == []


def _lines(path):
    """Whole lines, in whole batches."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    whole = [line for line in lines if line.endswith("\n")]
    return whole[: len(whole) // 2 * 2]


def test_the_comparison_sees_what_differs(reference, tmp_path):
    """The comparison that the other tests rest on can fail."""
    assert soak.differences(shutil.copytree(reference, tmp_path / "same"), reference) == []
    other = shutil.copytree(reference, tmp_path / "other")
    lines = tiny_lib.read_rows(other / "metrics.jsonl")
    tiny_lib.write_rows(other / "metrics.jsonl", [*lines, lines[-1]])
    shutil.rmtree(other / "diffusion" / "30")
    (other / "autoencoder" / "88.orbax-checkpoint-tmp").mkdir()
    (other / "samples.jsonl").write_text("")
    found = soak.differences(other, reference)
    for part in ("more than once", "metrics.jsonl differs", "samples.jsonl differs", "is left"):
        assert any(part in line for line in found), part
    assert any("diffusion: params/" in line for line in found)
    assert any("diffusion: step differs" in line for line in found)


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "cosmos_jax.main", *arguments],
        **{"cwd": ROOT, "capture_output": True, "text": True, "timeout": 300},
        check=False,
    )


def test_the_second_run_in_a_folder_is_refused(flag, folder):
    workdir, log = folder / "shared", folder / "shared.log"
    first = soak.start([flag, f"--workdir={workdir}"], log)
    while not soak.MOMENTS["autoencoder"](workdir):
        assert first.is_alive(), log.read_text()
    os.kill(first.pid, signal.SIGSTOP)  # holds the folder as long as the second one takes
    try:
        second = command(flag, f"--workdir={workdir}")
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
    assert second.returncode == 2, second.stderr
    assert f"is in use by process {first.pid} on" in second.stderr.splitlines()[-1]
    # The lock of the dead one does not keep anyone out.
    soak.run_to_the_end([flag, f"--workdir={workdir}", "--stage=autoencoder"], log)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB, and a way to make it larger."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)],
            capture_output=True,
            check=False,
        )
        if done.returncode:
            pytest.skip(f"no right to mount a small disk: {done.stderr.decode().strip()}")

    mount("size=2m")
    yield disk, lambda: mount("remount,size=64m")
    subprocess.run(["umount", str(disk)], check=True)


def test_a_full_disk_is_noticed_before_features_are_mapped(small_disk):
    """Later the system would end the process where it writes into the mapped file."""
    disk, enlarge = small_disk
    with pytest.raises(UserError, match=r"states\.npy: its 6,000,000 bytes .* No space left"):
        feature_cache._create(disk / "states.npy", np.float16, (1000, 3000))
    enlarge()
    array = feature_cache._create(disk / "states.npy", np.float16, (1000, 3000))
    array[:] = 1
    assert np.load(disk / "states.npy").all()


def test_a_full_disk_stops_training_and_costs_nothing(small_disk, flag, reference, tmp_path):
    disk, enlarge = small_disk
    arguments, log = [flag, f"--workdir={disk / 'run'}"], tmp_path / "full.log"
    process = soak.start(arguments, log)
    process.join(soak.PATIENCE)
    output = log.read_text()
    assert process.exitcode == 2, output
    (message,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in message
    complete = [p for p in (disk / "run" / "autoencoder").iterdir() if p.name.isdigit()]
    assert complete
    enlarge()
    soak.run_to_the_end(arguments, log)
    assert "autoencoder: continuing from step" in log.read_text()
    assert soak.differences(disk / "run", reference) == []
