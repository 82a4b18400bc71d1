"""Measures how fast texts are generated and models trained, system beside system in one process.

python -m cosmos_jax.benchmark --config=configs/benchmark.py --out=benchmark.json

Weights are random, as speed does not depend on them, unless `config.workdirs` names trained ones.
The file is written again after every batch size and stage; "complete" says whether all is in it.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from cosmos_jax import commands, peaks, provenance, sharding, speed, systems, workdir
from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError

Entry = dict[str, Any]

OURS, THEIRS = ("default", "undistilled", "faithful"), ("autoregressive", "token_level", "masked")


def benchmark(config: ConfigDict, path: Path) -> Entry:
    """Measures what the config asks for and writes it to `path`; UserError if that cannot be."""
    validate(config)
    mesh = sharding.make_mesh(systems.ONE_DEVICE)
    platform = jax.devices()[0].platform
    result: Entry = {
        "complete": False,
        **provenance.versions(),
        "platform": platform,
        "cpus": len(os.sched_getaffinity(0)),
        "strings": config.base.encoder.name or "stand-in words, without a tokenizer",
        "peaks": {},
        "entries": [],
        "ratios": {},
        "training": [],
        "config": config.to_dict(),
    }
    if importlib.util.find_spec("torch"):
        result["versions"]["torch"] = importlib.metadata.version("torch")

    def write(**found: Any) -> None:
        result.update(found, peak_memory_bytes=peaks.peak_memory())
        workdir.write_json(path, result)

    write()
    load = speed.reader(config)
    with jax.set_mesh(mesh):
        models = systems.open_systems(config, mesh)
        write(peaks=peaks.measure(config.base.dtype))
        more = () if platform == "cpu" else config.accelerator_batch_sizes
        for batch_size in (*config.batch_sizes, *more):
            result["entries"] += speed.generation(config, models, batch_size, result["peaks"], mesh)
            write(ratios=ratios(result["entries"]))
        del models
        for entry in speed.training(config, load, result["peaks"], mesh):
            result["training"].append(entry)
            write()
    write(complete=True)
    return result


def ratios(entries: list[Entry]) -> dict[str, float]:
    """Texts a second, ours over theirs, wherever both were measured."""
    rates = {
        (entry["system"], entry["batch_size"]): entry["texts_per_second"]["median"]
        for entry in entries
        if "skipped" not in entry
    }
    return {
        f"{ours}_over_{theirs}_batch{batch_size}": rates[ours, batch_size]
        / rates[theirs, batch_size]
        for batch_size in dict.fromkeys(size for _, size in rates)
        for ours in OURS
        for theirs in THEIRS
        if {(ours, batch_size), (theirs, batch_size)} <= rates.keys()
    }


def validate(config: ConfigDict) -> None:
    """UserError for the first field that cannot work."""
    if "batch_sizes" not in config:
        raise UserError("--config: not a benchmark; see configs/benchmark.py")
    for field, known in (("systems", systems.CHANGES), ("training.stages", config_lib.TRAINED)):
        names = config_lib.flatten(config)[field]
        for name in filter(None, names.split(",")):
            if name not in known:
                raise UserError(
                    f"config.{field} is {names!r}; {name!r} is none of {', '.join(known)}"
                )
    if "distillation" in config.training.stages and not config.base.distillation.steps:
        raise UserError(
            f"config.training.stages is {config.training.stages!r}, but "
            "config.base.distillation.steps is 0"
        )
    for field in ("batch_sizes", "accelerator_batch_sizes"):
        sizes = config[field]
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise UserError(f"config.{field} is {sizes!r}; it must be numbers of texts")
    for field in ("rounds", "max_seconds", "skip_seconds", "training.steps", "training.batch_size"):
        value = config_lib.flatten(config)[field]
        if value <= 0:
            raise UserError(f"config.{field} is {value!r}; it must be positive")
    for name in filter(None, config.systems.split(",")):
        systems.config_of(name, config.base)


# The table


def table(result: Entry) -> str:
    """The figures to compare; the file has more."""
    peak = result["peaks"]
    text = [
        f"{result['device']['kind']}, {result['cpus']} CPUs; measured peaks: "
        f"{_giga(peak['matmul']['flops_per_second'])} GFLOP/s in {peak['matmul']['dtype']}, "
        f"{_giga(peak['triad']['bytes_per_second'])} GB/s"
    ]
    measured, skipped = _parted(result["entries"])
    text += _aligned(
        "batch system texts/s (from to) rounds seconds compile_s compiled GFLOP/text of_peak",
        [
            (
                entry["batch_size"],
                entry["system"],
                *_spread(entry["texts_per_second"]),
                entry["rounds"],
                f"{entry['seconds']['median']:.3g}",
                f"{entry['compile_seconds']:.1f}" if "compile_seconds" in entry else "-",
                f"{entry['compiled_share']:.1%}",
                _giga(entry["flops_per_text"]) if "flops_per_text" in entry else "-",
                f"{entry['flops_share']:.1%}" if "flops_share" in entry else "-",
            )
            for entry in measured
        ],
    )
    text += _aligned(
        "batch system part calls seconds/call share",
        [
            (
                entry["batch_size"],
                entry["system"],
                name.replace(" ", "_"),
                part["calls"],
                f"{part['seconds']['median']:.3g}",
                f"{part['calls'] * part['seconds']['median'] / entry['seconds']['median']:.1%}",
            )
            for entry in measured
            for name, part in entry["parts"].items()
        ],
    )
    text += [
        f"skipped: {entry['system']}, batch {entry['batch_size']}: {entry['skipped']}"
        for entry in skipped
    ]
    text += _aligned(
        "texts/s,_ours_over_theirs ratio",
        [(name, f"{value:.2f}") for name, value in result["ratios"].items()],
    )
    measured, skipped = _parted(result["training"])
    text += _aligned(
        "stage batch tokens/s (from to) of_peak input_costs over_PyTorch",
        [
            (
                entry["stage"],
                entry["batch_size"],
                *_spread(entry["tokens_per_second"]["input_off"]),
                f"{entry['flops_share']:.1%}",
                f"{entry['input_cost']:.1%}" if "input_cost" in entry else "-",
                _over_torch(entry["tokens_per_second"]),
            )
            for entry in measured
        ],
    )
    text += [f"skipped: training of {entry['stage']}: {entry['skipped']}" for entry in skipped]
    return "\n".join(text)


def _parted(entries: list[Entry]) -> tuple[list[Entry], list[Entry]]:
    return [e for e in entries if "skipped" not in e], [e for e in entries if "skipped" in e]


def _over_torch(rates: Entry) -> str:
    if "torch" not in rates:
        return "-"
    return f"{rates['input_off']['median'] / rates['torch']['median']:.2f}"


def _giga(value: float) -> str:
    return f"{value / 1e9:,.1f}"


def _spread(values: dict[str, float]) -> tuple[str, str, str]:
    return f"{values['median']:.4g}", f"({values['min']:.4g}", f"{values['max']:.4g})"


def _aligned(head: str, rows: list[tuple]) -> list[str]:
    """Columns under the words of `head`, after an empty line; nothing without rows."""
    if not rows:
        return []
    cells = [tuple(head.split()), *(tuple(map(str, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "",
        *(
            "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
            for row in cells
        ),
    ]


def main(argv: list[str]) -> None:
    config = flags.FLAGS.config
    commands.check(argv, config)
    # Else what an earlier run has compiled would pass for fast compilation.
    jax.config.update("jax_enable_compilation_cache", False)
    print(table(benchmark(config, Path(flags.FLAGS.out).absolute())))


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "configs/benchmark.py", lock_config=True)
    flags.DEFINE_string("out", None, "The JSON file to write.")
    commands.run(main, required=("config", "out"))
