"""Starting JAX on one or several processes, in one place."""

import itertools
import logging
import os
import socket

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)


def start(coordinator: str = "", num_processes: int = 0, process_id: int = -1) -> None:
    """Joins the cluster this process belongs to; call before anything touches a device.

    With a `coordinator` ("host:port") the three arguments are used. Otherwise TPU, SLURM,
    Kubernetes and Open MPI are detected by JAX. A process on its own becomes a cluster of
    one: only within a cluster is SIGTERM turned into a checkpoint.
    """
    if "cpu" in os.environ.get("JAX_PLATFORMS", ""):
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    if coordinator:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    else:
        try:
            jax.distributed.initialize()
        except ValueError:  # no cluster was found
            with socket.socket() as probe:
                probe.bind(("localhost", 0))
                port = probe.getsockname()[1]
            jax.distributed.initialize(f"localhost:{port}", 1, 0)
    logger.info(
        "process %d of %d, %d of %d devices (%s)",
        jax.process_index(),
        jax.process_count(),
        jax.local_device_count(),
        jax.device_count(),
        jax.devices()[0].device_kind,
    )


def is_first() -> bool:
    """Whether this is the process that writes logs and texts."""
    return jax.process_index() == 0


class Preempted(Exception):
    """The machine was told to stop (SIGTERM) and everything worth keeping is saved."""


_calls = itertools.count()


def preempted() -> bool:
    """Whether it is time to save and stop.

    All processes must call it at the same points of the program: it numbers its calls, and
    they agree through the cluster on the call at which all of them are told.
    """
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def gather(tree):
    """Global arrays of one leading axis as host arrays on every process."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return multihost_utils.process_allgather(tree, tiled=True)
