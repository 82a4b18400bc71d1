"""Kills a run at random, again and again; at its end it must be the run that was never killed.

PYTHONPATH=. python tests/soak.py --kills=200

Every run goes on in a new process after each kill, by SIGTERM or SIGKILL at random, at random
moments of every stage. When it is finished, its metrics, parameters, samples and scores are
compared with those of a run that was left alone, bit by bit; then the next run begins.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import tiny as tiny_lib

# Seconds after which a process that neither ends nor gets where it is to be killed has failed.
PATIENCE = 300

# How a process kills itself: an event that Python audits, a part of the name of its file, the
# number of the time that this happens, and the signal.
Kill = tuple[str, str, int, signal.Signals]

# A server forks the processes of the runs after these imports, which would take most of the time.
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    ["jax", "orbax.checkpoint", "transformers.models.auto.tokenization_auto", "soak"]
    + ["tensorflow_datasets", "matplotlib.pyplot", "jinja2", "rouge_score.rouge_scorer"]
)


def config(tiny: tiny_lib.Tiny):
    """A conditional run of some seconds, with saves, samples and scores in many pieces."""
    return tiny.pairs_config(
        autoencoder__checkpoint_every=8,
        diffusion__checkpoint_every=3,
        diffusion__best_metric="validation_loss",
        distillation__steps=12,
        distillation__checkpoint_every=2,
        generate__num_texts=10,
        generate__batch_size=2,
        evaluate__batch_size=1,
    )


def _command(arguments: list[str], log: str, kill: Kill | None) -> None:
    """The main command, as `python -m cosmos_jax.main` runs it."""
    if kill is not None:
        _kill_itself(*kill)
    with open(log, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from cosmos_jax import commands, main

    sys.argv = ["cosmos_jax.main", *arguments]
    commands.run(main.main, required=("config",))


def _kill_itself(what: str, name: str, count: int, number: signal.Signals) -> None:
    """Kills this process before it does `what` to a file with `name` in its path again."""
    left = count

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == what and name in str(arguments[0]):
            left -= 1
            if not left:
                os.kill(os.getpid(), number)

    sys.addaudithook(hook)


def start(arguments: list[str], log: Path, kill: Kill | None = None) -> Any:
    """Starts a run in a process, which kills itself if it is told when and how."""
    process = context.Process(target=_command, args=(arguments, str(log), kill))
    process.start()
    return process


def _has_line(workdir: Path, stage: str) -> bool:
    path = workdir / "metrics.jsonl"
    return path.exists() and f'"stage": "{stage}"' in path.read_text()


# What shows from outside that a run has come to a certain point.
MOMENTS: dict[str, Callable[[Path], bool]] = {
    "start": lambda workdir: True,
    "autoencoder": lambda workdir: _has_line(workdir, "autoencoder"),
    "diffusion": lambda workdir: _has_line(workdir, "diffusion"),
    "distillation": lambda workdir: _has_line(workdir, "distillation"),
    "save": lambda workdir: any(workdir.glob("*/*.orbax-checkpoint-tmp*")),
    "generate": lambda workdir: (workdir / "samples.partial.jsonl").exists(),
    "evaluate": lambda workdir: (workdir / "evaluation.partial.json").exists(),
}


def kill_at(
    process: Any, workdir: Path, log: Path, moment: str, delay: float, number: signal.Signals
) -> bool:
    """Kills the process some time after a moment; False if it ended before by itself.

    Raises:
      AssertionError: it hangs or fails, or did not stop with status 0 on SIGTERM.
    """
    begun = time.monotonic()
    logged = log.stat().st_size if log.exists() else 0
    while not MOMENTS[moment](workdir) and process.is_alive():
        assert time.monotonic() - begun < PATIENCE, f"no {moment}: {_tail(log)}"
        time.sleep(0.002)
    process.join(delay)
    # Then it may end before it is asked whether to stop.
    ending = (workdir / "samples.jsonl").exists()
    if alive := process.is_alive():
        os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode is not None, f"hangs after {number.name} at {moment}: {_tail(log)}"
    expected = {0, -signal.SIGKILL} if number == signal.SIGKILL else {0}
    if not log.exists() or log.stat().st_size == logged:
        expected.add(-signal.SIGTERM)  # the program had not begun
    what = f"{number.name} at {moment}: exit status {process.exitcode}: {_tail(log)}"
    assert process.exitcode in expected, what
    if alive and number == signal.SIGTERM and process.exitcode == 0 and not ending:
        said = log.read_bytes()[logged:].decode()
        assert "stopped on request" in said, what
        check_saved(workdir, said)
    return alive


def check_saved(workdir: Path, said: str) -> None:
    """What a process that was told to stop says to be saved is there."""
    for stage, step in re.findall(r"stopped on request: (\w+) is saved at step (\d+)", said):
        assert (workdir / stage / step).is_dir(), said


def _tail(log: Path) -> str:
    return log.read_text()[-2000:] if log.exists() else "no log"


def run_to_the_end(arguments: list[str], log: Path) -> None:
    process = start(arguments, log)
    process.join(PATIENCE)
    assert process.exitcode == 0, _tail(log)


def differences(workdir: Path, reference: Path) -> list[str]:
    """What is not the same in two finished runs; empty if they are bit-identical."""
    found = []
    lines, expected = (_metrics(path) for path in (workdir, reference))
    twice = [key for key, count in Counter(key for key, _ in lines).items() if count > 1]
    if twice:
        found.append(f"metrics.jsonl has {twice[:3]} more than once")
    if lines != expected:
        found.append("metrics.jsonl differs")
    for name in ("samples.jsonl", "evaluation.json", "generation.json"):
        if (workdir / name).read_bytes() != (reference / name).read_bytes():
            found.append(f"{name} differs")
    for stage in ("autoencoder", "diffusion", "distillation"):
        ours, theirs = (_newest(path / stage) for path in (workdir, reference))
        if ours.keys() != theirs.keys():
            found.append(f"{stage}: {sorted(ours)} instead of {sorted(theirs)}")
        found += [
            f"{stage}: {path} differs"
            for path in ours.keys() & theirs.keys()
            if not np.array_equal(ours[path], theirs[path])
        ]
    left = [p.name for p in workdir.rglob("*") if "partial" in p.name or "tmp" in p.name]
    return found + [f"{name} is left" for name in left]


def _metrics(workdir: Path) -> list[tuple[tuple[str, int, bool], dict[str, float]]]:
    """Lines of each stage by step, the values before those of the validation."""
    lines = tiny_lib.read_rows(workdir / "metrics.jsonl")
    return [((e["stage"], e["step"], "validation_loss" in e), e) for e in lines]


def _newest(directory: Path) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint by path, read by Orbax alone."""
    step = max((p for p in directory.iterdir() if p.name.isdigit()), key=lambda p: int(p.name))
    arrays = {"step": np.int64(step.name)}
    for item in ("params", "optimizer", "ema", "statistics"):
        if (step / item).exists():
            tree = ocp.StandardCheckpointer().restore(step / item)
            leaves = ocp.tree.to_flat_dict(tree, sep="/")
            arrays |= {f"{item}/{path}": np.asarray(leaf) for path, leaf in leaves.items()}
    return arrays


def soak(directory: Path, kills: int, seed: int) -> Counter:
    """Runs until there were as many kills; how many there were of each kind."""
    directory.mkdir()
    tiny = tiny_lib.Tiny(directory)
    flag = tiny.save_config(directory / "config.json", config(tiny))
    run_to_the_end([flag, f"--workdir={directory / 'reference'}"], directory / "reference.log")
    rng = random.Random(seed)
    count: Counter = Counter()
    while count.total() < kills:
        workdir, log = directory / "run", directory / "run.log"
        shutil.rmtree(workdir, ignore_errors=True)
        log.unlink(missing_ok=True)
        arguments = [flag, f"--workdir={workdir}"]
        finished = False
        while not finished and count.total() < kills:
            moment = rng.choice(list(MOMENTS))
            number = rng.choice([signal.SIGTERM, signal.SIGKILL])
            process = start(arguments, log)
            if kill_at(process, workdir, log, moment, rng.expovariate(1.0), number):
                count[number.name, moment] += 1
                print(f"{count.total()}: {number.name} at {moment}", flush=True)
            else:
                finished = process.exitcode == 0
        run_to_the_end(arguments, log)
        found = differences(workdir, directory / "reference")
        assert not found, found
        print("a run has ended and is the same", flush=True)
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(Path(__file__).parents[1]):
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/cache")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        count = soak(Path(folder) / "soak", arguments.kills, arguments.seed)
    print(json.dumps({" ".join(key): value for key, value in sorted(count.items())}, indent=1))


if __name__ == "__main__":
    main()
