"""Writes a trained model into one directory to be shared, which `cosmos_jax.load` reads.

    python -m cosmos_jax.export --workdir=runs/stories --out=stories --dtype=bfloat16 \
        --title="Five-sentence stories" --data="ROCStories, 90,000 stories." --command="..."

The directory holds what `exported.py` says, the scores of the run in `evaluation.json` and a model
card, `README.md`; it appears whole or not at all. No data is read. With `--pth` it holds
`autoencoder.pth` and `diffusion.pth` in the layout of the authors' PyTorch code instead, and the
config and tokenizer with which `cosmos_jax.convert` reads them back: of a run that was distilled,
the denoiser before that.
"""

import contextlib
import dataclasses
import hashlib
import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from cosmos_jax import (
    commands,
    exported,
    huggingface,
    model_card,
    pipeline,
    pth,
    samples,
    trained,
    workdir,
)
from cosmos_jax import config as config_lib
from cosmos_jax.errors import UserError
from cosmos_jax.exported import Exported
from cosmos_jax.run import Run

logger = logging.getLogger(__name__)

CARD = "README.md"
EVALUATION = "evaluation.json"
# What may lie in a directory that is replaced.
OURS = {
    "config.json",
    exported.WEIGHTS,
    exported.ENCODER,
    CARD,
    EVALUATION,
    "autoencoder.pth",
    "diffusion.pth",
    *huggingface.TOKENIZER,
    "added_tokens.json",
}


@dataclasses.dataclass(frozen=True, eq=False)
class Trained:
    """A finished run, read without its data, and its weights on the host."""

    run: Run
    finished: pipeline.Finished
    stages: dict[str, Exported]


def export(
    source: Path,
    out: Path,
    *,
    dtype: str = "float32",
    title: str = "",
    data: str = "",
    command: str = "",
    license: str = "apache-2.0",
    beside: Mapping[str, Path] | None = None,
    overwrite: bool = False,
    distilled: bool = True,
) -> None:
    """Makes the directory `out` of the workdir `source`.

    Args:
      dtype: of the parameters on the disk, of `exported.DTYPES`.
      distilled: False: the denoiser before it was distilled, if it was.
      title, data, command, license: for the model card; by default the folder's name, what
        config.data.source names, and no command.
      beside: other systems by their titles, and the evaluations (of a run, or what
        `cosmos_jax.evaluate` wrote) whose scores the card shows beside the model's.
      overwrite: replace what an earlier export left at `out`.

    Raises:
      UserError: the run is not finished, `out` cannot be written or replaced, or what is
        beside is no evaluation.
    """
    others = {name: _evaluation(path) for name, path in (beside or {}).items()}
    with _directory(out, overwrite) as partial:
        found = read(source, distilled=distilled)
        text_encoder = found.run.encoder
        exported.write(partial, found.run.config, found.stages, text_encoder, dtype=dtype)
        results = _results(source, found)
        if results["evaluation"]:
            workdir.write_json(partial / EVALUATION, results["evaluation"])
        card = model_card.render(
            partial,
            found.run.config,
            found.stages,
            text_encoder,
            results,
            name=out.name,
            title=title or out.name,
            license=license,
            data=data,
            command=command,
            beside=others,
        )
        workdir.write_text(partial / CARD, card)


def export_pth(source: Path, out: Path, *, overwrite: bool = False) -> None:
    """Makes the directory `out` with a run in the layout of the authors' checkpoints.

    Raises:
      UserError: as `export`, the release has no place for something, or PyTorch is missing.
    """
    with _directory(out, overwrite) as partial:
        found = read(source, distilled=False)
        run, text_encoder = found.run, found.run.encoder
        pth.check(found.run.config, found.stages, text_encoder)
        second = found.finished.stages["diffusion"]
        settings = ConfigDict({**second.settings.to_dict(), "ema_decay": 0.0})
        with jax.set_mesh(run.mesh):
            _, raw = trained.parameters(
                dataclasses.replace(second, settings=settings), run, run.workdir / "diffusion"
            )
        model = found.finished.model
        pth.write(partial, found.run.config, model, found.stages, jax.device_get(raw), text_encoder)
        workdir.write_text(
            partial / "config.json", config_lib.to_json(exported.portable(found.run.config))
        )
        with workdir.writing(partial):
            text_encoder.tokenizer.save_pretrained(str(partial))


def read(source: Path, *, distilled: bool = True) -> Trained:
    """A finished run from its workdir or from an exported directory."""
    run = pipeline.open_trained(source, distilled=distilled)
    source = run.workdir
    with jax.set_mesh(run.mesh):
        finished = pipeline.finished(run)
    stages = {}
    for stage_name, stage in finished.stages.items():
        directory = source / stage_name
        if stage_name == "autoencoder":
            directory = pipeline.autoencoder_directory(run)
        parts = jax.eval_shape(stage.init, run.key("shapes"), stage.frozen)
        step = finished.identity[f"{stage_name}_step"]
        stages[stage_name] = Exported(
            step=step,
            params=jax.device_get({part: finished.weights[part] for part in parts}),
            statistics={k: np.asarray(v) for k, v in stage.statistics.items()},
            provenance=trained.provenance(directory, step),
        )
    return Trained(run, finished, stages)


def _evaluation(path: Path) -> dict[str, Any]:
    content = workdir.read_json(path)
    if not content or "scores" not in content:
        raise UserError(
            f"{path} is no evaluation: an evaluation.json, or what evaluate --out wrote"
        )
    return content


def _titles(values: list[str]) -> dict[str, Path]:
    """TITLE=FILE, each a title and the evaluation it stands for."""
    pairs = [value.partition("=") for value in values]
    for value, (title, equals, path) in zip(values, pairs, strict=True):
        if not (title and equals and path):
            raise UserError(f"--beside={value}: needs TITLE=FILE")
    return {title: Path(path) for title, _, path in pairs}


def _results(source: Path, found: Trained) -> dict[str, Any]:
    """What the run's folder has that was made with these weights, and not with others."""

    def of_these(name: str) -> dict[str, Any]:
        content = workdir.read_json(source / name) or {}
        if content and _steps(content.get("identity", {})) != _steps(found.finished.identity):
            logger.warning("%s is left out: it is of other weights", source / name)
            return {}
        return content

    evaluation, generation = of_these(EVALUATION), of_these("generation.json")
    path = source / "samples.jsonl"
    texts = samples.read_samples(path) if generation else []
    if evaluation and texts:
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        if evaluation["identity"].get("samples_sha256") != sha256:
            logger.warning("%s is left out: it is of other samples", source / EVALUATION)
            evaluation = {}
    # As the texts were sampled, which the config need not say any longer.
    sampling = config_lib.sampling(found.run.config)
    if identity := generation.get("identity"):
        sampling = {name: identity[name] for name in sampling if name in identity}
    return {"evaluation": evaluation, "samples": texts, "sampling": sampling}


def _steps(identity: Mapping[str, Any]) -> dict[str, int]:
    """The step of each stage that something was made with."""
    return {name: step for name, step in identity.items() if name.endswith("_step")}


@contextlib.contextmanager
def _directory(out: Path, overwrite: bool) -> Iterator[Path]:
    """An empty folder that is given the name `out` at the end, unless anything was raised."""
    out = out.absolute()
    _require_free(out, overwrite)
    partial, old = (out.with_name(f".{out.name}.{what}") for what in ("partial", "old"))
    with workdir.writing(out):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    try:
        yield partial
        with workdir.writing(out):
            if out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.rename(out, old)
            os.rename(partial, out)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        if old.exists() and not out.exists():
            os.rename(old, out)
        shutil.rmtree(partial, ignore_errors=True)


def _require_free(out: Path, overwrite: bool) -> None:
    """UserError if there is something at `out` that may not be replaced."""
    if not out.exists():
        return
    made = out.is_dir() and (
        exported.is_exported(out) or {"autoencoder.pth", "diffusion.pth"} <= set(os.listdir(out))
    )
    if not made:
        raise UserError(f"{out} exists and is no export; choose another --out")
    if not overwrite:
        raise UserError(f"{out} exists; give --overwrite to replace it, or choose another --out")
    foreign = sorted(set(os.listdir(out)) - OURS)
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which no export does and --overwrite would delete; move it "
            "away or choose another --out"
        )


def define_flags() -> None:
    """Not at import: absl's flags are global, and other commands have some of the same names."""
    flags.DEFINE_string("workdir", None, "Folder of a finished run.")
    flags.DEFINE_string("out", None, "Folder to make.")
    flags.DEFINE_enum("dtype", "float32", list(exported.DTYPES), "Type of the parameters.")
    flags.DEFINE_string("title", "", "Title of the model card; empty: the name of --out.")
    flags.DEFINE_string("data", "", "What the card says of the data, in Markdown.")
    flags.DEFINE_string("command", "", "How it was trained, for the card.")
    flags.DEFINE_string("license", "apache-2.0", "License of the weights, for the card.")
    flags.DEFINE_multi_string(
        "beside", [], "TITLE=FILE: another system's evaluation.json, for the card's scores."
    )
    flags.DEFINE_bool("overwrite", False, "Replace an earlier export.")
    flags.DEFINE_bool("distilled", True, "--nodistilled: the denoiser before it was distilled.")
    flags.DEFINE_bool("pth", False, "Write checkpoints in the layout of the authors' PyTorch code.")


def main(argv: list[str]) -> None:
    commands.check_arguments(argv)
    options = flags.FLAGS
    source, out = Path(options.workdir), Path(options.out).absolute()
    if options.pth:
        export_pth(source, out, overwrite=options.overwrite)
        print(
            f"{out} is ready. PyTorch reads its autoencoder.pth and diffusion.pth; back to JAX:\n"
            f"python -m cosmos_jax.convert --config=configs/workdir.py:{out} --tokenizer={out} "
            f"--autoencoder={out}/autoencoder.pth --diffusion={out}/diffusion.pth --workdir=DIR"
        )
        return
    export(
        source,
        out,
        dtype=options.dtype,
        title=options.title,
        data=options.data,
        command=options.command,
        license=options.license,
        beside=_titles(options.beside),
        overwrite=options.overwrite,
        distilled=options.distilled,
    )
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) / 1e6
    print(f'{out} is ready, {size:.1f} MB: cosmos_jax.load("{out}")')


if __name__ == "__main__":
    define_flags()
    commands.run(main, required=("workdir", "out"))
