"""What a run reports while it works: metrics.jsonl, TensorBoard files, a progress bar."""

import functools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from cosmos_jax import distributed
from cosmos_jax.workdir import write_text, writing

logger = logging.getLogger(__name__)

Values = dict[str, float]


class MetricWriter:
    """Appends to `metrics.jsonl`, one object a line, and to TensorBoard if that is installed.

    A line holds `stage`, `step` and values that are the same whenever the run is repeated;
    rates and times are not, and go to the progress bar alone.
    """

    def __init__(self, workdir: Path, stage: str, step: int, *, active: bool = True) -> None:
        """`step` is the last one that stays: later lines of the stage are taken back."""
        self._stage = stage
        self._active = active
        self._tensorboard = None
        if not active:
            return
        self._path = workdir / "metrics.jsonl"
        _forget(self._path, stage, step)
        with writing(self._path):
            self._file = open(self._path, "a", encoding="utf-8")  # noqa: SIM115
        self._tensorboard = _tensorboard(workdir / "tensorboard" / stage)

    def write(self, step: int, values: Values) -> None:
        """Every process must call this and `sync`: what one cannot write stops all of them."""
        with distributed.together():
            if self._active:
                line = json.dumps({"stage": self._stage, "step": step, **values})
                with writing(self._path):
                    self._file.write(line + "\n")
                    self._file.flush()
                if self._tensorboard is not None:
                    self._tensorboard.write_scalars(step, values)

    def sync(self) -> None:
        """Puts all lines on disk; a checkpoint must not be newer than they are."""
        with distributed.together():
            if self._active:
                self._sync()

    def _sync(self) -> None:
        with writing(self._path):
            os.fsync(self._file.fileno())
        if self._tensorboard is not None:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._active:
            with writing(self._path):
                self._sync()
                self._file.close()


def read(workdir: Path, stage: str = "") -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one stage or of all; a line cut off by a kill is left out."""
    path = workdir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if not stage or entry["stage"] == stage:
            lines.append(entry)
    return lines


def _forget(path: Path, stage: str, step: int) -> None:
    """Takes back lines of the stage after `step`: what they report will be computed again."""
    if path.exists():
        entries = read(path.parent)
        kept = [e for e in entries if e["stage"] != stage or e["step"] <= step]
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def _tensorboard(directory: Path):
    writers = _tensorboard_writers()
    return writers and writers.SummaryWriter(str(directory))


@functools.cache  # says once that there are none
def _tensorboard_writers():
    try:
        from clu import metric_writers
    except ImportError:  # clu's writers need TensorFlow
        logger.info("TensorFlow is not installed: no TensorBoard files, metrics.jsonl has it all")
        return None
    return metric_writers


def write_report(workdir: Path) -> None:
    """Writes `report.html` from within a run, which must not end because of how it is reported."""
    try:
        from cosmos_jax import report  # loads matplotlib

        report.write(workdir)
    except ImportError as error:
        _say_once(f"no report.html: {error}; pip install -r requirements.txt")
    except Exception:
        logger.warning("report.html could not be written", exc_info=True)


def report_writer(workdir: Path) -> Callable[[], None]:
    """`write_report` for many calls: some write nothing, so that it takes a tenth of the time at
    most. A run writes its last report itself."""
    due = 0.0

    def write() -> None:
        nonlocal due
        begun = time.monotonic()
        if begun >= due:
            write_report(workdir)
            due = time.monotonic() + 10 * (time.monotonic() - begun)

    return write


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def progress(
    total: int, name: str, *, start: int = 0, unit: str = "step", active: bool = True
) -> tqdm:
    """A bar with count, rate and time left; a log gets a line now and then."""
    terminal = sys.stderr.isatty()
    return tqdm(
        total=total,
        initial=start,
        desc=name,
        unit=unit,
        disable=not active,
        dynamic_ncols=terminal,
        mininterval=0.5 if terminal else 15,
        file=sys.stderr,
    )


def counted(items: Iterator[Any], bar: tqdm) -> Iterator[Any]:
    """The items, moving the bar by one for each."""
    with bar:
        for item in items:
            yield item
            bar.update()
