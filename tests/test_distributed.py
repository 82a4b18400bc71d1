"""What processes agree on, in processes of their own; runs of several are in test_scale.py."""

import os
import subprocess
import sys
from pathlib import Path

import jax

from cosmos_jax import distributed

ROOT = Path(__file__).parents[1]


def test_once_told_to_stop_always_told(monkeypatch):
    """JAX says so at one call only; whoever could not stop there must still learn of it."""
    monkeypatch.setattr(distributed, "_told", False)
    asked = []

    def reached(number):
        asked.append(number)
        return len(asked) == 2

    monkeypatch.setattr(distributed.multihost_utils, "reached_preemption_sync_point", reached)
    assert [distributed.preempted() for _ in range(4)] == [False, True, True, True]
    assert asked[1] == asked[0] + 1


def test_compiled_programs_are_kept_unless_the_user_says_where(monkeypatch, tmp_path):
    name = "jax_compilation_cache_dir"
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    try:
        jax.config.update(name, None)
        distributed.keep_compiled_programs()
        assert Path(jax.config.jax_compilation_cache_dir).parent == tmp_path / "cosmos_jax"
        jax.config.update(name, str(tmp_path / "mine"))
        distributed.keep_compiled_programs()
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    finally:
        jax.config.update(name, before)


TWO = """
import sys
import jax
import numpy as np
from cosmos_jax import distributed, sharding
from cosmos_jax.errors import UserError

distributed.start()
assert jax.process_count() == 2
assert jax.process_index() == int(sys.argv[1])
first, called = distributed.is_first(), []


def fail(message):
    raise UserError(message)


value = distributed.on_first(lambda: called.append(1) or {"größe": [1, 0.1, None]})
assert value == {"größe": [1, 0.1, None]} and len(called) == first
try:
    distributed.on_first(lambda: fail("the first one's mistake"))
except UserError as error:
    assert str(error) == "the first one's mistake"
else:
    raise AssertionError
for failing in (0, 1):
    try:
        with distributed.together():
            first == (failing == 0) and fail("mine")
    except UserError as error:
        expected = "mine" if first == (failing == 0) else f"process {failing} of this run failed"
        assert expected in str(error), error
    else:
        raise AssertionError
with distributed.together():
    pass
large = np.array([2**40 + 1, -5, 0]) * (1 + first)
assert distributed.add_up(large).tolist() == [3 * (2**40 + 1), -15, 0]
assert distributed.in_turn(lambda: first) == first
for sizes in ((2, 1, 1), (1, 2, 1), (1, 1, 2)):
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, sizes)))
    mine = [0, 1, 2] if first else [3, 4, 5]
    # Devices that share the tensor axis share all rows.
    assert sharding.local_rows(6, mesh).tolist() == (list(range(6)) if sizes[2] == 2 else mine)
print("fine")
"""


def test_two_processes_agree():
    """One finds itself in a job of SLURM, the other one in one of Open MPI, with one address."""
    job = os.getpid()
    variables = [
        {
            "SLURM_JOB_ID": f"{job}",
            "SLURM_STEP_NODELIST": "localhost",
            "SLURM_NTASKS": "2",
            "SLURM_PROCID": "0",
            "SLURM_LOCALID": "0",
        },
        {
            "OMPI_MCA_orte_hnp_uri": f"{job * 2**12}.0;tcp://127.0.0.1:1",
            "OMPI_COMM_WORLD_SIZE": "2",
            "OMPI_COMM_WORLD_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_RANK": "0",
        },
    ]
    around = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "OMPI_"))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(i)],
            env=around | {"JAX_PLATFORMS": "cpu", **variables[i]},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert output.endswith("fine\n")
