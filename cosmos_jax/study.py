"""Runs an experiment of the paper: trains what it compares, measures, writes a table and a figure.

python -m cosmos_jax.study --config=configs/studies/robustness.py --workdir=runs/studies

Every run trains in a folder of its own in --workdir and goes on where it stopped; studies that
compare the same run share it. The results are NAME.json and NAME.svg beside these folders.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from matplotlib.figure import Figure
from ml_collections import ConfigDict, config_flags

from cosmos_jax import (
    commands,
    config_checks,
    distributed,
    examples,
    latents,
    measure,
    pipeline,
    provenance,
    runner,
    workdir,
)
from cosmos_jax import steps as steps_lib
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import first_texts
from cosmos_jax.errors import UserError
from cosmos_jax.run import Run
from cosmos_jax.scores import ngrams
from cosmos_jax.scores.ngram_model import NgramModel
from cosmos_jax.scores.table import number
from cosmos_jax.steps import PARTS, Row

logger = logging.getLogger("cosmos_jax")

# Scores of generated texts that studies compare, where an evaluation has them.
SCORES = ("encoder_mauve", "ngram_perplexity", "diversity", "memorisation")


def robustness(config: ConfigDict, run: Run) -> list[Row]:
    """How much of a text is decoded from its noised latents.

    z' = z + sigma eps in standardised latents; BLEU and the share of equal tokens are against what
    the clean latents decode to, and `text_accuracy` is the share of the text's own tokens.
    """
    model, weights = pipeline.trained_autoencoder(run)
    statistics = measure.latents(run, model, weights)
    texts = first_texts(run.dataset.test, config.num_texts)
    encoded = tokens.encode(run.encoder.tokenizer, texts, run.config.data.max_length)
    clean = latents.encode(run, model, weights, texts)
    clean_ids = latents.decode(run, model, weights, clean)
    wanted = tokens.decode(run.encoder.tokenizer, clean_ids)
    noise = np.random.default_rng(run.config.seed).standard_normal(clean.shape, np.float32)
    rows = []
    for level in config.noise_levels:
        noised = clean + level * noise * statistics["latents_std"]
        ids = latents.decode(run, model, weights, noised)
        mask = encoded.mask_BxL
        rows.append(
            {
                "noise": level,
                "bleu": ngrams.bleu(tokens.decode(run.encoder.tokenizer, ids), wanted).value,
                "token_accuracy": float((ids == clean_ids)[mask].mean()),
                "text_accuracy": float((ids == encoded.ids_BxL)[mask].mean()),
            }
        )
    return rows


def smoothness(config: ConfigDict, run: Run) -> list[Row]:
    """How fluent the texts between two texts are, with a few of them to read.

    Fluency is the perplexity of an n-gram model of the training texts; `real` that of the
    held-out texts themselves.
    """
    model, weights = pipeline.trained_autoencoder(run)
    length, tokenizer = run.config.data.max_length, run.encoder.tokenizer
    train = first_texts(run.dataset.train, len(run.dataset.train))
    fluency = NgramModel().fit(tokens.round_trip(tokenizer, train, length))
    texts = first_texts(run.dataset.test, 2 * config.num_pairs)
    if len(texts) < 2 * max(config.num_pairs, config.num_examples):
        raise UserError(f"{config.num_pairs} pairs of {len(texts)} held-out texts: ask for fewer")
    ends = latents.encode(run, model, weights, texts)
    starts, stops = ends[::2], ends[1::2]
    real = fluency.perplexity(tokens.round_trip(tokenizer, texts, length))
    rows = []
    for weight in config.weights:
        ids = latents.decode(run, model, weights, starts + weight * (stops - starts))
        decoded = [text for text in tokens.decode(tokenizer, ids) if text]
        rows.append(
            {
                "weight": weight,
                "ngram_perplexity": fluency.perplexity(decoded),
                "empty": len(ids) - len(decoded),
                "diversity": ngrams.diversity(decoded),
                "real": real,
            }
        )
    paths = [
        examples.path_between(run, model, weights, texts[2 * i], texts[2 * i + 1])
        for i in range(config.num_examples)
    ]
    return [*rows, *({"example": path} for path in paths)]


def generation(config: ConfigDict, run: Run) -> list[Row]:
    """Reconstruction of held-out texts, and the scores of generated ones."""
    del config
    evaluation = workdir.read_json(run.workdir / "evaluation.json")
    row = {
        "num_latents": run.config.autoencoder.num_latents,
        "token_accuracy": evaluation["held_out"]["autoencoder"]["token_accuracy"],
    }
    for name in SCORES:
        score = evaluation["scores"].get(name, {})
        row |= {name + end: score[key] for end, key in PARTS.items() if key in score}
    return [row]


def steps(config: ConfigDict, run: Run) -> list[Row]:
    """Scores and seconds of a text with every sampler and number of steps."""
    return steps_lib.measure(run, config.samplers, config.steps)


def check_steps(config: ConfigDict, run_config: ConfigDict) -> None:
    """UserError, before anything is trained, if there is no such sampler or number of steps."""
    steps_lib.configs(run_config, config.samplers, config.steps)


@dataclasses.dataclass(frozen=True)
class Study:
    """What a study needs of its runs, measures in each, and shows.

    Attributes:
      stages: what each run goes through.
      measure: (the study's config, run) -> rows.
      x: what stands on the x axis.
      panels: the values that get a panel each.
      line: the rows that make one line; None: all of them.
      log: whether the x axis is logarithmic.
      check: refuses a config that cannot be measured with that of a run.
    """

    stages: tuple[str, ...]
    measure: Callable[[ConfigDict, Run], list[Row]]
    x: str
    panels: tuple[str, ...]
    line: str | None = "run"
    log: bool = False
    check: Callable[[ConfigDict, ConfigDict], None] = lambda config, run_config: None


ROBUSTNESS = Study(
    ("autoencoder",), robustness, "noise", ("bleu", "token_accuracy", "text_accuracy")
)
STUDIES = {
    "robustness": ROBUSTNESS,
    "decompressor": ROBUSTNESS,
    "smoothness": Study(("autoencoder",), smoothness, "weight", ("ngram_perplexity", "diversity")),
    "compression": Study(
        ("all",), generation, "num_latents", ("token_accuracy", *SCORES), line=None
    ),
    "recipe": Study(("all",), generation, "run", ("token_accuracy", *SCORES)),
    "steps": Study(
        ("autoencoder", "diffusion"),
        steps,
        "num_sampling_steps",
        (*SCORES, "latent_frechet", "rougeL", "seconds_per_text"),
        line="sampler",
        log=True,
        check=check_steps,
    ),
}


def study(config: ConfigDict, directory: Path) -> dict[str, Any]:
    """Trains what is not trained yet, measures, and writes NAME.json and NAME.svg.

    Raises:
      UserError: something the user can mend.
      distributed.Preempted: SIGTERM came; the same call goes on from there.
    """
    asked = STUDIES[config.study]
    configs = {}
    for name in config.runs:
        configs[name] = ConfigDict(config.base.to_dict())
        configs[name].update_from_flattened_dict(config.changes[name])
        config_checks.validate(configs[name])
        asked.check(config, configs[name])
    rows = []
    for name, run_config in configs.items():
        logger.info("%s: run %s", config.study, name)
        for stage in asked.stages:
            runner.run_stages(run_config, directory / name, stage)
        run = runner.open_run(run_config, directory / name)
        with jax.set_mesh(run.mesh):
            rows += [{"run": name, **row} for row in asked.measure(config, run)]
    result = {
        "study": config.study,
        "rows": rows,
        "data": run.dataset.fingerprint,
        "config": config.to_dict(),
        **provenance.versions(),
    }
    workdir.write_json(directory / f"{config.study}.json", result)
    figure(result).savefig(directory / f"{config.study}.svg", bbox_inches="tight")
    return result


# Tables and figures


def figure(result: dict[str, Any]) -> Figure:
    """A panel for each value, a line for each run, or a bar where a run has one value."""
    shown = STUDIES[result["study"]]
    x, rows = shown.x, [row for row in result["rows"] if shown.x in row]
    panels = _panels(result)
    lines: dict[str, list[Row]] = {}
    for row in rows:
        lines.setdefault(row[shown.line] if shown.line else "", []).append(row)
    picture = Figure(figsize=(3.4 * len(panels), 3.0), layout="constrained")
    axes = np.atleast_1d(picture.subplots(1, len(panels)))
    for axis, name in zip(axes, panels, strict=True):
        for label, points in lines.items():
            points = sorted((row for row in points if name in row), key=lambda row: row[x])
            xs, ys = [row[x] for row in points], [row[name] for row in points]
            spreads = [row.get(f"{name}_spread", 0.0) for row in points]
            if x == "run":
                axis.bar(xs, ys, yerr=spreads, capsize=4)
            else:
                axis.errorbar(xs, ys, yerr=spreads, marker="o", markersize=3, label=label)
        real = [row.get("real" if x == "weight" else f"{name}_real") for row in rows]
        if (any(real) and name != "diversity") or (any(real) and x != "weight"):
            axis.axhline(next(value for value in real if value), color="gray", linestyle=":")
        axis.set_title(name.replace("_", " "), fontsize=10)
        axis.set_xlabel(x.replace("_", " "))
        if shown.log:
            axis.set_xscale("log")
    if shown.line and shown.line != x:
        axes[0].legend(fontsize=8)
    return picture


def _panels(result: dict[str, Any]) -> list[str]:
    """The values that there are; a score may need more texts than there were."""
    panels = STUDIES[result["study"]].panels
    return [name for name in panels if any(name in row for row in result["rows"])]


def table(result: dict[str, Any]) -> str:
    """The rows in Markdown."""
    shown = STUDIES[result["study"]]
    names = [name for name in ("run", shown.line, shown.x) if name]
    columns = list(dict.fromkeys([*names, *_panels(result)]))
    lines = [columns, ["---"] * len(columns)]
    for row in result["rows"]:
        if shown.x in row:
            lines.append([str(row[n]) if n in names else _cell(row, n) for n in columns])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(row: Row, name: str) -> str:
    value, spread = row.get(name, ""), row.get(f"{name}_spread")
    if not isinstance(value, float):
        return str(value)
    return number(value) + (f" ± {number(spread)}" if spread else "")


def main(argv: list[str]) -> None:
    config = flags.FLAGS.config
    commands.check(argv, config)
    if config.get("study") not in STUDIES:
        raise UserError(f"--config: not a study; there are {', '.join(STUDIES)}")
    distributed.start("", 1, 0)
    if jax.process_count() > 1:
        raise UserError("a study runs in one process; its runs alone can train in several")
    directory = Path(flags.FLAGS.workdir).absolute()
    try:
        print(table(study(config, directory)))
    except distributed.Preempted as stopped:
        logger.info("stopped on request: %s; run the same command to continue", stopped)


if __name__ == "__main__":
    config_flags.DEFINE_config_file("config", None, "A file in configs/studies/.", lock_config=True)
    flags.DEFINE_string("workdir", "runs/studies", "Folder of all studies and their runs.")
    commands.run(main, required=("config",))
