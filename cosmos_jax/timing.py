"""Appends to `timing.jsonl` how long a stage worked, on what, and how much memory it took.

Times differ from run to run, so they stand apart from `metrics.jsonl`, which does not.
"""

import contextlib
import json
import logging
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from cosmos_jax import peaks
from cosmos_jax.errors import UserError
from cosmos_jax.workdir import read_json

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def recorded(workdir: Path, stage: str) -> Iterator[None]:
    """Writes a line if there are more steps, texts or scores than before, unless it is killed."""
    before, begun = _done(workdir, stage), time.perf_counter()
    try:
        yield
    finally:
        after = _done(workdir, stage)
        if after > before:
            line = {
                "stage": stage,
                "from": before,
                "to": after,
                "seconds": round(time.perf_counter() - begun, 3),
                "peak_memory_bytes": peaks.peak_memory(),
                "device": jax.devices()[0].device_kind,
                "num_devices": jax.device_count(),
                "finished_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            }
            try:
                with open(workdir / "timing.jsonl", "a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:  # no reason to end a run
                logger.warning("timing.jsonl: cannot be written: %s", error.strerror)


def _done(workdir: Path, stage: str) -> int:
    """Steps, texts or scores that are there."""
    if stage == "generate":
        for name in ("samples.partial.jsonl", "samples.jsonl"):
            if (workdir / name).exists():
                return (workdir / name).read_bytes().count(b"\n")
        return 0
    if stage == "evaluate":
        for name in ("evaluation.partial.json", "evaluation.json"):
            with contextlib.suppress(UserError):  # who needs the file will say that it is damaged
                if (state := read_json(workdir / name)) is not None:
                    return len(state.get("done", ()))
        return 0
    saved = (workdir / stage).iterdir() if (workdir / stage).exists() else ()
    return max((int(path.name) for path in saved if path.name.isdigit()), default=0)
