"""The page `report.html` of a workdir: what its files say of a run, finished or not.

python -m cosmos_jax.report --workdir=runs/quickstart
"""

import functools
import hashlib
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import numpy as np
from absl import flags
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter
from ml_collections import ConfigDict

from cosmos_jax import __version__, commands
from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError
from cosmos_jax.workdir import read_json, write_text

Entry = dict[str, Any]
Points = tuple[tuple[float, float], ...]
"""Steps and values."""

# Macros of `templates/sections.html`.
SECTIONS = (
    "status configuration loss reconstructions samples interpolation "
    "scores time_and_memory versions"
).split()
MAX_CHARACTERS = 4_000  # of a text

# What is drawn in these colours takes those of the page, which are others in the dark.
COLOURS = {"#010101": "var(--ink)", "#020202": "var(--train)", "#030303": "var(--held-out)"}
INK, TRAIN, HELD_OUT = COLOURS

# What UTF-8 cannot hold or a browser would drop.
UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def write(workdir: Path) -> Path:
    """Writes `report.html` from the other files of a workdir, all of them optional but one.

    Raises:
      UserError: there is no `config.json`, or the page cannot be written.
    """
    notes: list[str] = []
    found = _read(workdir, notes)
    environment = _environment()
    macros, sections = environment.get_template("sections.html").module, []
    for name in SECTIONS:
        title = name.replace("_", " ").capitalize()
        try:
            if body := getattr(macros, name)(found).strip():
                sections.append((name, title, body))
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            notes.append(f"{title} left out, the file is not as expected: {error}")
    html = environment.get_template("report.html").render(
        name=workdir.resolve().name,
        where=workdir,
        sections=sections,
        notes=notes,
        version=__version__,
    )
    html, path = UNPRINTABLE.sub("\ufffd", html), workdir / "report.html"
    if _bytes(path, []) != html.encode():
        write_text(path, html)
    return path


@functools.cache  # a run writes its page many times
def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cosmos_jax"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"text": _text, "number": _number, "duration": _duration}
    environment.globals |= {"progress": _progress, "differing": _differing, "curves": _curves}
    return environment


def _read(workdir: Path, notes: list[str]) -> Entry:
    """What there is; `notes` gets what could not be read."""
    recorded = read_json(workdir / "config.json")
    if recorded is None:
        raise UserError(f"{workdir}: no config.json; give the folder of a run as --workdir")
    try:
        config = config_lib.flatten(ConfigDict(recorded))
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{workdir / 'config.json'}: not a config: {error}") from error
    generated = (workdir / "samples.jsonl").exists()
    samples = workdir / ("samples.jsonl" if generated else "samples.partial.jsonl")
    return {
        "config": config,
        "checkpoints": {stage: _newest_checkpoint(workdir / stage) for stage in _stages(config)},
        "metrics": _lines(workdir / "metrics.jsonl", notes),
        "timing": _lines(workdir / "timing.jsonl", notes),
        "samples": _lines(samples, notes),
        "generated": generated,
        "sha256": hashlib.sha256(_bytes(samples, [])).hexdigest() if generated else "",
        "examples": _object(workdir / "examples.json", notes),
        "generation": _object(workdir / "generation.json", notes),
        "evaluation": _object(workdir / "evaluation.json", notes)
        or _object(workdir / "evaluation.partial.json", notes),
        "evaluated": (workdir / "evaluation.json").exists(),
    }


def _stages(config: Entry) -> tuple[str, ...]:
    """Those that train; a run from before there were other systems names none."""
    stages = config_lib.SYSTEMS[config.get("system", "cosmos")]
    return tuple(s for s in stages if s != "distillation" or config.get("distillation.steps"))


def _object(path: Path, notes: list[str]) -> Entry:
    try:
        value = read_json(path)
        if value is None or isinstance(value, dict):
            return value or {}
        notes.append(f"{path.name}: not an object")
    except (UserError, ValueError, RecursionError) as error:
        notes.append(f"{path.name}: {str(error).removeprefix(f'{path}: ')}")
    return {}


def _bytes(path: Path, notes: list[str]) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        notes.append(f"{path.name}: cannot be read: {error.strerror}")
        return b""


def _lines(path: Path, notes: list[str]) -> list[Entry]:
    """The objects of a file; only the last line may be cut off, by a kill or a run at work."""
    lines = _bytes(path, notes).split(b"\n")
    values, damaged = [], []
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode("utf-8", "replace"))
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            values.append(value)
        elif line.strip() and number < len(lines):
            damaged.append(number)
    if damaged:
        first = f"the first is line {damaged[0]}"
        notes.append(f"{path.name}: lines without a JSON object: {len(damaged)}, {first}")
    return values


def _newest_checkpoint(directory: Path) -> int:
    """Its step; of a converted run all there is to tell how far it is."""
    steps = directory.iterdir() if directory.is_dir() else ()
    return max((int(path.name) for path in steps if path.name.isdecimal()), default=0)


def _progress(found: Entry) -> list[tuple[str, float, str]]:
    """Of each stage the name, the share that is done, and the same in words."""
    config, rows = found["config"], []
    for stage in _stages(config):
        steps = [entry["step"] for entry in found["metrics"] if entry.get("stage") == stage]
        done, total = max([found["checkpoints"][stage], *steps]), config[f"{stage}.steps"]
        source = config.get(f"{stage}.pretrained")
        if source and stage == "autoencoder":  # the others only begin with what is there
            rows.append((stage, 1.0, f"taken from {source}"))
        else:
            rows.append((stage, *_share(done, total, "steps", done >= total)))
    # A conditional run has no more texts than sources.
    done, total = len(found["samples"]), config["generate.num_texts"]
    rows.append(("generate", *_share(done, total, "texts", found["generated"])))
    done = len(found["evaluation"].get("scores", ()))
    return [*rows, ("evaluate", *_share(done, 0, "scores", found["evaluated"]))]


def _share(done: int, total: int, unit: str, finished: bool) -> tuple[float, str]:
    """`total` is 0 where it is not known."""
    if finished:
        return 1.0, f"finished, {done:,} {unit}"
    if not done:
        return 0.0, "not begun"
    return (done / total, f"{done:,} of {total:,} {unit}") if total else (0.5, f"{done:,} {unit}")


def _differing(config: Entry) -> list[tuple[str, str, str]]:
    """The fields that differ from the paper's recipe: name, value, value there.

    Without those of stages that the run does not have.
    """
    base = {**config_lib.flatten(config_lib.base()), **config_lib.FAITHFUL}
    others = tuple(f"{s}." for s in config_lib.TRAINED if s not in _stages(config))
    return [
        (name, str(value), str(base[name]))
        for name, value in config.items()
        if name in base and base[name] != value and not name.startswith(others)
    ]


def _curves(found: Entry) -> list[Entry]:
    """Losses of each stage as a plot, and its first and last held-out figures."""
    curves = []
    for stage in _stages(found["config"]):
        entries = [entry for entry in found["metrics"] if entry.get("stage") == stage]
        held_out = [entry for entry in entries if "validation_loss" in entry]
        points = {
            "training": _points(entries, "loss"),
            "held-out": _points(held_out, "validation_loss"),
        }
        finite = {name: part[np.isfinite(part[:, 1])] for name, part in points.items()}
        said = [
            f"{name} {_number(part[0, 1])} at step {part[0, 0]:.0f}, "
            f"{_number(part[-1, 1])} at step {part[-1, 0]:.0f}"
            for name, part in finite.items()
            if len(part)
        ]
        curve = {
            "stage": stage,
            "label": f"Loss of the {stage}: {'; '.join(said)}",
            "plot": _plot(stage, *(tuple(map(tuple, f)) for f in finite.values())) if said else "",
            "lost": sum(len(points[name]) - len(finite[name]) for name in points),
            "held_out": held_out,
        }
        curves += [curve] if entries else []
    return curves


def _points(entries: list[Entry], name: str) -> np.ndarray:
    """Steps and values, [points, 2]."""
    return np.array([(e["step"], e[name]) for e in entries if name in e], float).reshape(-1, 2)


def smooth(values: np.ndarray) -> np.ndarray:
    """Means over a twentieth of the curve around each point; over less at its steep beginning."""
    count, index = len(values), np.arange(len(values))
    left = np.minimum(index, count // 40)
    right = np.minimum(left, count - 1 - index)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    return (sums[index + right + 1] - sums[index - left]) / (left + right + 1)


@functools.lru_cache(maxsize=8)  # a stage that has ended has the same curves in later pages
def _plot(stage: str, train_points: Points, held_out_points: Points) -> Markup:
    """The curves as SVG, with ids of its own and nothing that lies elsewhere."""
    train, held_out = (np.array(p).reshape(-1, 2) for p in (train_points, held_out_points))
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": stage, "font.size": 11}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(5.6, 3.3), layout="constrained")
        axes = figure.subplots()
        if len(train):
            axes.plot(*train.T, color=TRAIN, alpha=0.3, lw=1)
            style = ".-" if len(train) == 1 else "-"
            axes.plot(train[:, 0], smooth(train[:, 1]), style, color=TRAIN, lw=2, label="training")
        if len(held_out):
            axes.plot(*held_out.T, "o--", color=HELD_OUT, lw=1.5, ms=4.5, label="held-out")
        values = np.concatenate([train, held_out])[:, 1]
        if 0 < 8 * values.min() < values.max():
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.yaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("step", color=INK)
        axes.tick_params(which="both", colors=INK, length=3)
        axes.grid(color=INK, alpha=0.12, lw=0.6)
        axes.spines[:].set(color=INK, alpha=0.4)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(
            frameon=False, labelcolor=INK, ncols=2, loc="lower right", bbox_to_anchor=(1, 1)
        )
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file := io.StringIO(), format="svg", transparent=True, metadata=nothing)
    # Without the head of a file of its own, the size, which is the page's, and unused ids.
    svg = file.getvalue()
    svg = re.sub(r'(?s)^.*?<svg [^>]*(viewBox="[^"]*")[^>]*>', r"<svg \1>", svg, count=1)
    svg = re.sub(r' id="[\w.]+_\d+"', "", svg).replace("xlink:href", "href")
    for colour, variable in COLOURS.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


def _text(value: Any) -> str:
    """A text as it is shown: all of it, unless it is too long to be read."""
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not a text")
    return value if len(value) <= MAX_CHARACTERS else value[:MAX_CHARACTERS] + " …"


def _number(value: float | None, digits: int = 4) -> str:
    """So many digits, more only before the point; nothing for None."""
    if value is None:
        return ""
    whole = isinstance(value, int) or (math.isfinite(value) and abs(value) >= 1_000)
    return f"{value:,.0f}" if whole else f"{value:#.{digits}g}".rstrip(".")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 60:
        return f"{seconds:.1f} s"
    if minutes < 60:
        return f"{minutes} min {rest:02} s"
    return f"{minutes // 60:,} h {minutes % 60:02} min"


def main(argv: list[str]) -> None:
    commands.check_arguments(argv)
    print(write(Path(flags.FLAGS.workdir)))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.")
    commands.run(main, required=("workdir",))
