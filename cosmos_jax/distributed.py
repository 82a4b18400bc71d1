"""Starting JAX on one or several processes, in one place, and what they agree on."""

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from cosmos_jax.errors import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Seconds that a process which is done waits for the others before it gives them up.
SHUTDOWN_TIMEOUT = 60
# Seconds without a sign of life after which a process is given up. One on its own may be as
# long asleep as the machine it runs on.
HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_ALONE = 100, 10**8


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the cluster this process belongs to; call before anything touches a device.

    With a `coordinator` ("host:port") the three arguments are used. Otherwise TPU, SLURM,
    Kubernetes and Open MPI are detected by JAX. A process on its own becomes a cluster of
    one: only within a cluster is SIGTERM turned into a checkpoint.
    """
    # Until JAX listens for it.
    signal.signal(signal.SIGTERM, lambda *_: _stop_early())
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator:
        _join(coordinator, num_processes, process_id)
    else:
        try:
            _join()
        except ValueError:  # no cluster was found
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            _join(f"localhost:{port}", 1, 0, heartbeat_timeout=HEARTBEAT_TIMEOUT_ALONE)
    logger.info(
        "process %d of %d, %d of %d devices (%s)",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )
    keep_compiled_programs()
    if not is_first():
        logging.getLogger(__package__).setLevel(logging.WARNING)
    # Processes connect at the first thing they do together, and do not wait long for each other.
    barrier("all processes have started")


def keep_compiled_programs() -> None:
    """So that a run that goes on need not compile again; JAX_COMPILATION_CACHE_DIR is elsewhere."""
    if jax.config.jax_compilation_cache_dir is None:  # type: ignore[attr-defined]
        root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        # Homes are shared, and a program for the CPU of one machine may not run on another's.
        machine = socket.gethostname() if jax.default_backend() == "cpu" else "accelerators"
        directory = os.path.join(root, "cosmos_jax", machine)
        jax.config.update("jax_compilation_cache_dir", directory)


def _join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    heartbeat_timeout: int = HEARTBEAT_TIMEOUT,
) -> None:
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=heartbeat_timeout,
            shutdown_timeout_seconds=SHUTDOWN_TIMEOUT,
        )
    except RuntimeError as error:
        raise UserError(
            f"the processes of this run did not find each other ({str(error).splitlines()[0]}): "
            "start all of them, with one --coordinator and --num_processes"
        ) from error


def _stop_early() -> None:
    print("stopped on request before anything began", file=sys.stderr, flush=True)
    os._exit(0)


def is_first() -> bool:
    """Whether this is the process that writes logs and texts."""
    return jax.process_index() == 0


class Preempted(Exception):
    """The machine was told to stop (SIGTERM) and everything worth keeping is saved."""


_calls = itertools.count()
_told = False


def preempted() -> bool:
    """Whether it is time to save and stop; once it is, it stays so.

    All processes must call it at the same points of the program: it numbers its calls, and
    they agree through the cluster on the call at which all of them are told.
    """
    global _told
    _told = _told or multihost_utils.reached_preemption_sync_point(next(_calls))
    return _told


def on_first(function: Callable[[], T]) -> T:
    """What `function`, called by the first process alone, returns or raises as UserError.

    Every process must call this; the others wait. The value goes through JSON. What the system
    says about a file is a UserError too.
    """
    value: Any = None
    failure: Exception | None = None
    if is_first():
        try:
            value = function()
        except OSError as error:
            failure = UserError(f"{error.filename or 'a file'}: {error.strerror or error}")
        except Exception as error:
            failure = error
    if jax.process_count() > 1:
        text = json.dumps({"value": value, "failure": failure and str(failure)}).encode()
        length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
        padded = np.frombuffer(text[:length].ljust(length, b" "), np.uint8)
        answer = json.loads(multihost_utils.broadcast_one_to_all(padded).tobytes())
        value = answer["value"]
        if failure is None and answer["failure"] is not None:
            failure = UserError(answer["failure"] or "process 0 of this run failed; it says why")
    if failure is not None:
        raise failure
    return value


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Ends a part in which a process may fail alone: a UserError of one stops all of them."""
    failure: UserError | None = None
    try:
        yield
    except UserError as error:
        failure = error
    failed = np.array([failure is not None])
    if jax.process_count() > 1:
        failed = multihost_utils.process_allgather(failed, tiled=True)
    if failure is not None:
        raise failure
    if failed.any():
        raise UserError(f"process {int(np.argmax(failed))} of this run failed; it says why")


def in_turn(function: Callable[[], T]) -> T:
    """Calls `function` in the first process, then in the others, and returns its value.

    What the first one downloads or prepares, the others find.
    """
    results = []
    for turn in (True, False):
        with together():
            if is_first() is turn:
                results.append(function())
    return results[0]


def barrier(name: str) -> None:
    """Waits until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def gather(tree: Any) -> Any:
    """Global arrays of one leading axis as host arrays on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def add_up(array: np.ndarray) -> np.ndarray:
    """The sum over the processes of an array that each has its own of, exact for int64."""
    if jax.process_count() == 1:
        return array
    # Without 64-bit mode JAX would cut integers to 32 bits; halves of them it leaves alone.
    halves = np.ascontiguousarray(array, np.int64).view(np.int32)
    return multihost_utils.process_allgather(halves).view(np.int64).sum(axis=0)
