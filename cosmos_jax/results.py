"""What a finished run prints: a table of figures, and generated texts beside real ones."""

from pathlib import Path
from typing import Any

from cosmos_jax import config as config_lib
from cosmos_jax import metrics, workdir
from cosmos_jax.data import tokens
from cosmos_jax.run import Run
from cosmos_jax.samples import read_samples
from cosmos_jax.scores import table as score_table

NUM_EXAMPLES = 5

# Stage, its metric on held-out texts, and how the table calls it.
FIGURES = (
    ("autoencoder", "token_accuracy", "tokens reconstructed, held-out"),
    ("autoencoder", "exact_match", "texts reconstructed exactly, held-out"),
    ("autoencoder", "loss", "autoencoder validation loss"),
    ("diffusion", "loss", "diffusion validation loss"),
    ("diffusion", "self_conditioned_loss", "  with self-conditioning"),
    ("distillation", "loss", "distance from the steps of the teacher"),
    ("autoregressive", "loss", "validation loss, nats per token"),
    ("autoregressive", "token_accuracy", "next tokens guessed, held-out"),
    ("masked", "loss", "validation loss, bound in nats per token"),
)


def table(run: Run) -> str:
    """The figures of metrics.jsonl and evaluation.json, and the first samples."""
    evaluation = workdir.read_json(run.workdir / "evaluation.json")
    before, after = _validation(run.workdir, first=True), _validation(run.workdir, first=False)
    rows = [("", "before training", "after training")]
    for stage, name, label in FIGURES:
        key = f"validation_{name}"
        if key in after.get(stage, {}):
            rows.append((label, f"{before[stage][key]:.4f}", f"{after[stage][key]:.4f}"))
    width = max(len(label) for label, _, _ in rows)
    lines = [f"{label:<{width}}  {a:>15}  {b:>15}".rstrip() for label, a, b in rows]
    count = evaluation["texts"]["generated"]["count"]
    lines += ["", f"{count} texts", *score_table.lines(evaluation["scores"])]
    lines += [f"no {name}: {text}" for name, text in evaluation["problems"].items()]
    return "\n".join(["", _summary(run), "", *lines, "", *_examples(run)])


def _summary(run: Run) -> str:
    config, count = run.config, len(run.dataset.train)
    ae, df, ar, md = config.autoencoder, config.diffusion, config.autoregressive, config.masked
    texts = f"{count:,} texts of {config.data.source}, cut to {config.data.max_length} tokens"
    if config.system == "autoregressive":
        made = f"an autoregressive model\ntrained for {ar.steps:,} steps, decoding by {ar.decoding}"
    elif config.system == "masked":
        made = (
            f"masked diffusion\ntrained for {md.steps:,} steps, sampled in {md.num_sampling_steps}"
        )
    else:
        trained = f"from {ae.pretrained}" if ae.pretrained else f"trained for {ae.steps:,} steps"
        how, student = config_lib.sampling(config), config.distillation.steps
        distilled = f" and distilled for {student:,}" if student else ""
        made = (
            f"an autoencoder to {ae.num_latents} latents, {trained},\nand a denoiser trained for "
            f"{df.steps:,} steps{distilled}, sampled in {how['num_sampling_steps']} "
            f"({how['sampler']})"
        )
    return f"{texts}: {made}. Everything is in\n{run.workdir}"


def _validation(directory: Path, *, first: bool) -> dict[str, dict[str, Any]]:
    """Per stage, the first or the last line of validation."""
    found: dict[str, dict[str, Any]] = {}
    for entry in metrics.read(directory):
        if "validation_loss" in entry and not (first and entry["stage"] in found):
            found[entry["stage"]] = entry
    return found


def _examples(run: Run) -> list[str]:
    """The first samples, in conditional tasks beside their references, otherwise any real texts."""
    samples = read_samples(run.workdir / "samples.jsonl")[:NUM_EXAMPLES]
    rows = [run.dataset.test[i] for i in range(min(len(samples), len(run.dataset.test)))]
    real = tokens.round_trip(
        run.encoder.tokenizer, [row.text for row in rows], run.config.data.max_length
    )
    lines = []
    for sample, text in zip(samples, real, strict=False):
        if "source" in sample:
            lines.append(f"source     {sample['source']}")
        lines += [f"generated  {sample['text']}", f"real       {text}"]
    return lines
