"""What processes agree on, in processes of their own; runs of several are in test_scale.py."""

import os
import subprocess
import sys
from pathlib import Path

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


TWO = """
import sys
import numpy as np
from cosmos_jax import distributed
from cosmos_jax.errors import UserError

distributed.start(f"localhost:{sys.argv[2]}", 2, int(sys.argv[1]))
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
print("fine")
"""


def test_two_processes_agree():
    port = str(20_000 + os.getpid() % 10_000)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(i), port],
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
