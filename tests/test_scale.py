"""One seed, one result: on every mesh, on several processes, and going on elsewhere.

The reference runs on the one device of this process. The others run in processes of their
own: on 8 virtual devices, and as 2 real processes of 4 devices each that talk to each other.
"""

import itertools
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny as tiny_lib
from virtual_devices import environment

from cosmos_jax import distributed
from cosmos_jax.runner import run_stages

ROOT = Path(__file__).parents[1]
STEPS = {"autoencoder": 20, "diffusion": 20, "distillation": 4}
TWO_PROCESSES = ["bash", str(ROOT / "launch" / "local_processes.sh"), "2"]


def config(tiny, data=1, fsdp=1, tensor=1, **fields):
    """A conditional run with dropout; the last batches of its texts are not full."""
    steps = {f"{stage}__steps": count for stage, count in STEPS.items()}
    every = {f"{stage}__log_every": 1 for stage in STEPS}
    mesh = {"mesh__data": data, "mesh__fsdp": fsdp, "mesh__tensor": tensor}
    return tiny.pairs_config(
        **{**steps, **every, **mesh, "generate__num_texts": 10, "generate__batch_size": 8},
        **{"autoencoder__dropout": 0.1, "autoencoder__vocabulary": "corpus", **fields},
    )


@pytest.fixture(scope="module")
def reference(tiny, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("scale") / "one"
    run_stages(config(tiny), workdir)
    return workdir


def assert_same_results(workdir, reference):
    """The same losses and scores to 1e-5 and the same texts."""
    found, expected = (
        {
            (line["stage"], line["step"], name): value
            for line in tiny_lib.read_rows(path / "metrics.jsonl")
            for name, value in line.items()
            if name == "loss" or name == "validation_loss"
        }
        for path in (workdir, reference)
    )
    assert found.keys() == expected.keys()
    assert len(expected) == sum(STEPS.values()) + 2 * len(STEPS)
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=1e-5, err_msg=str(key))
    for name in ("samples.jsonl", "generation.json"):
        ours, theirs = ((path / name).read_text() for path in (workdir, reference))
        if name == "generation.json":
            ours, theirs = (json.loads(text)["identity"] for text in (ours, theirs))
        assert ours == theirs
    ours, theirs = (
        json.loads((path / "evaluation.json").read_text()) for path in (workdir, reference)
    )
    assert ours["texts"] == theirs["texts"]
    assert ours["problems"] == theirs["problems"]
    assert ours["scores"].keys() == theirs["scores"].keys()
    for name, score in theirs["scores"].items():
        np.testing.assert_allclose(ours["scores"][name]["value"], score["value"], rtol=1e-4)
    for stage, values in theirs["held_out"].items():
        for name, value in values.items():
            np.testing.assert_allclose(ours["held_out"][stage][name], value, rtol=1e-5)


ON_EIGHT_DEVICES = """
import sys
sys.path[:0] = ["tests"]
from pathlib import Path
import saved_config
from cosmos_jax.runner import run_stages
for path in sys.argv[1:]:
    run_stages(saved_config.get_config(path), Path(path).with_suffix(""))
"""

# All three axes at once are those of the two processes below.
MESHES = {"data": (8, 1, 1), "fsdp": (1, 8, 1)}


@pytest.fixture(scope="module")
def on_eight_devices(tiny, tmp_path_factory):
    """The folder with a run on each of MESHES."""
    folder = tmp_path_factory.mktemp("eight")
    for name, sizes in MESHES.items():
        tiny.save_config(folder / f"{name}.json", config(tiny, *sizes))
    command = [sys.executable, "-c", ON_EIGHT_DEVICES]
    done = subprocess.run(
        [*command, *(str(folder / f"{name}.json") for name in MESHES)],
        **{"env": environment(8), "cwd": ROOT, "capture_output": True, "text": True},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", list(MESHES))
def test_meshes_give_the_same_results(on_eight_devices, reference, name):
    assert_same_results(on_eight_devices / name, reference)


def start_two(tiny, folder, workdir, **fields):
    flag = tiny.save_config(folder / "two.json", config(tiny, 2, 2, 2, **fields))
    return subprocess.Popen(
        [*TWO_PROCESSES, flag, f"--workdir={workdir}"],
        **{"env": environment(4, COSMOS_VENV=sys.prefix), "cwd": ROOT, "text": True},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_a_run_goes_on_elsewhere(tiny, tmp_path, reference, monkeypatch):
    """One device begins, two processes go on, are stopped in stage two and go on again to the
    end; what they left when they were stopped, one device takes to the same end."""
    workdir, calls = tmp_path / "run", itertools.count()
    # One call for the vocabulary, 6 for the statistics, one for each step.
    monkeypatch.setattr(distributed, "preempted", lambda: next(calls) == 1 + 6 + 9)
    with pytest.raises(distributed.Preempted, match="autoencoder is saved at step 10"):
        run_stages(config(tiny), workdir)
    monkeypatch.undo()
    with start_two(tiny, tmp_path, workdir) as processes:
        deadline = time.monotonic() + 300
        while '"diffusion", "step": 3,' not in (workdir / "metrics.jsonl").read_text():
            assert processes.poll() is None, processes.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        processes.send_signal(signal.SIGTERM)
        output, _ = processes.communicate(timeout=300)
    assert processes.returncode == 0, output
    assert "process 1 of 2, 4 of 8 devices" in output
    (step,) = re.findall(r"diffusion is saved at step (\d+)", output)
    assert (workdir / "diffusion" / step).is_dir()
    assert not (workdir / "samples.jsonl").exists()

    on_one_device = shutil.copytree(workdir, tmp_path / "copy")
    with start_two(tiny, tmp_path, workdir) as processes:
        output, _ = processes.communicate(timeout=500)
    assert processes.returncode == 0, output
    # Only the first one reports.
    assert output.count("] 10 texts\n") == 1
    assert_same_results(workdir, reference)
    run_stages(config(tiny), on_one_device)
    assert_same_results(on_one_device, reference)


def test_all_processes_stop_for_the_error_of_the_first(tiny, tmp_path, reference):
    workdir = shutil.copytree(reference, tmp_path / "run")
    with start_two(tiny, tmp_path, workdir, autoencoder__num_latents=5) as processes:
        output, _ = processes.communicate(timeout=300)
    assert processes.returncode == 2, output
    assert "autoencoder.num_latents is 4 there and 5 here" in output
