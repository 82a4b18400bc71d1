"""What the device can do at best, as measured here, and what a compiled program asks of it."""

import functools
import resource
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

# Rows of the square matrices: small ones fit a cache, large ones keep all units busy.
MATRIX_SIZES = (512, 1_024, 2_048, 4_096, 8_192)
# fp32 numbers of an array too large for any cache.
ARRAY_SIZE = 2**26
REPEATS = 10
# Seconds of one product after which no larger one is tried.
LONG = 0.5


def measure(
    dtype: str, matrix_sizes: Sequence[int] = MATRIX_SIZES, size: int = ARRAY_SIZE
) -> dict[str, dict[str, Any]]:
    """The most FLOP/s of a matrix product in `dtype`, and bytes/s of a + 2 b over long arrays."""
    best: dict[str, Any] = {"size": 0, "flops_per_second": 0.0}
    multiply = jax.jit(jnp.matmul)
    for n in matrix_sizes:
        # Zeros would do on a CPU, but save power, and so time, on some accelerators.
        matrix = jax.random.normal(jax.random.key(n), (n, n), jnp.dtype(dtype))
        seconds = _shortest(functools.partial(multiply, matrix, matrix))
        if 2 * n**3 / seconds > best["flops_per_second"]:
            best = {"size": n, "flops_per_second": 2 * n**3 / seconds}
        if seconds > LONG:
            break

    # In place: new memory for each answer would be slow to come by.
    triad = jax.jit(lambda a, b: a + 2 * b, donate_argnums=0)
    arrays = [jnp.zeros(size), jnp.ones(size)]

    def once() -> jax.Array:
        arrays[0] = triad(*arrays)
        return arrays[0]

    return {
        "matmul": {"dtype": dtype, **best},
        "triad": {"bytes": 12 * size, "bytes_per_second": 12 * size / _shortest(once)},
    }


def _shortest(function: Callable[[], Any]) -> float:
    """Seconds of the fastest of some calls, after one that does not count."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def flops(lowered: jax.stages.Lowered) -> float:
    """XLA's count for a program as it was written, whatever the compiler makes of it.

    2 for each multiply-add. The body of a loop counts once; of branches the dearest counts.
    """
    analysis: Any = lowered.cost_analysis()
    return float(analysis["flops"])


def bytes_accessed(compiled: jax.stages.Compiled) -> float:
    """XLA's count of what the kernels of a compiled program read and write, in caches or not."""
    analysis: Any = compiled.cost_analysis()
    return float(analysis["bytes accessed"])


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
    """Bytes of the arguments (weights above all), results and temporaries of a program."""
    found: Any = compiled.memory_analysis()
    return {
        "arguments": found.argument_size_in_bytes,
        "outputs": found.output_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }


def peak_memory() -> int:
    """Bytes at most in use so far, on the device, or by this process where that is the host."""
    statistics = jax.local_devices()[0].memory_stats() or {}
    # The system counts in units of 1,024 bytes.
    host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024
    return int(statistics.get("peak_bytes_in_use", host))
