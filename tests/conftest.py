"""What holds for all tests, and what they share."""

import os
import shutil
import subprocess
import sys
import tempfile

import pytest

# No test may reach for the network; read once, when huggingface_hub is imported.
os.environ["HF_HUB_OFFLINE"] = "1"

# Tests spend their time compiling: do that fast, as what they run is over in a moment, and keep
# the programs, which many tests share, also those in processes of their own. Read once, when JAX
# is imported.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
_FIRST = "PYTEST_XDIST_WORKER" not in os.environ


def _jax_starts(xla_flags):
    command = [sys.executable, "-c", "import jax; jax.devices('cpu')"]
    environment = {**os.environ, "XLA_FLAGS": xla_flags}
    return not subprocess.run(command, env=environment, capture_output=True, check=False).returncode


if _FIRST:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="cosmos-tests-")
    # XLA's older way to make kernels for CPUs takes half the time. One that does not know the
    # flag any more would not start.
    older = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_use_fusion_emitters=false".strip()
    if _jax_starts(older):
        os.environ["XLA_FLAGS"] = older
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


# Begun last, one of these would keep one core busy and leave the others idle. All tests of a file
# run on one worker (launch/test.sh), as they share what takes long to make.
LONGEST_FIRST = """
test_scale test_compiled test_interrupted test_train test_baselines test_main test_notebook
test_study test_benchmark test_distillation test_generate test_export test_exported test_library
""".split()


def pytest_collection_modifyitems(items):
    place = {name: number for number, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))  # keeps the order otherwise


def pytest_unconfigure():
    if _FIRST:
        shutil.rmtree(os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Encoder, texts and configuration of a tiny model; see `tiny.py`."""
    from tiny import Tiny

    return Tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def finished(tiny, tmp_path_factory):
    """The workdir of an unconditional run that was never stopped; copy it to change it."""
    from cosmos_jax.runner import run_stages

    workdir = tmp_path_factory.mktemp("runs") / "texts"
    run_stages(tiny.config(), workdir)
    return workdir


@pytest.fixture(scope="session")
def finished_pairs(tiny, tmp_path_factory):
    """The same of a conditional run with guidance."""
    from cosmos_jax.runner import run_stages

    workdir = tmp_path_factory.mktemp("runs") / "pairs"
    run_stages(tiny.pairs_config(), workdir)
    return workdir
