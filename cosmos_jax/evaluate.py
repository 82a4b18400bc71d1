"""Scores the texts of any system by named protocols.

python -m cosmos_jax.evaluate --texts=FILE --references=FILE --protocol=offline --out=FILE.json

A file whose name ends in .jsonl holds objects with `text`, one in .txt a text a line; of others the
first line tells. All may be compressed by gzip. The `samples.jsonl` of a run has its references and
sources within.
"""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from absl import flags

from cosmos_jax import commands, config_checks, encoder, provenance, workdir
from cosmos_jax import config as config_lib
from cosmos_jax.data import files, incoming, tokens
from cosmos_jax.errors import UserError
from cosmos_jax.scores import protocols, table

logger = logging.getLogger("cosmos_jax")

_TEXTS = flags.DEFINE_string("texts", "", "The texts to score.")
_REFERENCES = flags.DEFINE_string("references", "", "Real texts; default: those in --texts.")
_SOURCES = flags.DEFINE_string("sources", "", "What each text was generated from.")
_TRAINING = flags.DEFINE_string("training", "", "Training texts, for memorisation.")
_PROTOCOL = flags.DEFINE_string("protocol", "offline", ", ".join(protocols.PROTOCOLS))
_OUT = flags.DEFINE_string("out", "", "The JSON file to write.")
_PAIRED = flags.DEFINE_bool(
    "paired", None, "Reference i is the answer to what text i answers; default: where it must be."
)
_ENCODER = flags.DEFINE_string("encoder", "minilm", "The text encoder: it cuts texts to length.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 128, "Tokens that texts are cut to.")

# Every field of `config.evaluate` that a protocol rests on is a flag too.
_SETTINGS = {
    name: value
    for name, value in config_lib.base().evaluate.items()
    if name not in ("num_texts", "batch_size", "protocols")
}
_DEFINE: dict[type, Callable[..., Any]] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    str: flags.DEFINE_string,
}
for _name, _value in _SETTINGS.items():
    _DEFINE[type(_value)](_name, _value, "As config.evaluate has it; see cosmos_jax/config.py.")


def evaluate(texts: protocols.Texts) -> dict[str, Any]:
    """Scores by name, problems, and what they are scores of: the content of `evaluation.json`."""
    state: dict[str, Any] = {"scores": {}, "done": [], "problems": {}}
    for name, piece in protocols.pieces(texts).items():
        logger.info("%s", name)
        state = protocols.compute(state, name, piece)
    names = protocols.parse(texts.settings.protocols)
    return {
        **state,
        "protocols": [protocols.full_name(name, texts) for name in names],
        "texts": protocols.summary(texts),
        "settings": texts.settings.to_dict(),
        **provenance.versions(),
    }


def read(path: Path, *fields: str) -> list[str]:
    """The texts of a file, with objects of one line the first of the `fields` there is.

    Raises:
      UserError: with file and line, what is not as it should be; a file without texts.
    """
    texts, objects = [], _of_objects(path)
    for number, line in files.lines(path):
        if not objects:
            texts.append(line.strip())
            continue
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from error
        found = [value[f] for f in fields if isinstance(value, dict) and f in value]
        if not found or not isinstance(found[0], str):
            raise UserError(f"{path}:{number}: needs an object with the text {fields[0]!r}")
        texts.append(found[0].strip())
    if not any(texts):
        raise UserError(f"{path}: holds no texts")
    return texts


def _first(path: Path) -> str:
    """The first line that says something."""
    return next((line for _, line in files.lines(path) if line.strip()), "")


def _of_objects(path: Path) -> bool:
    kind, looks = incoming.kind_of(path.name), incoming.is_object(_first(path))
    if looks and kind is False:
        logger.warning("%s: looks like JSON lines, and is scored as plain text", path)
    return looks if kind is None else kind


def _within(path: Path, field: str) -> list[str]:
    """A field that the objects of the texts may have beside the text, or nothing."""
    if not _of_objects(path):
        return []
    first = _first(path)
    return read(path, field) if f'"{field}"' in first else []


def open_texts() -> protocols.Texts:
    """What the flags name; UserError for anything that cannot be scored."""
    config = config_lib.base()
    settings = config.evaluate
    settings.update({name: flags.FLAGS[name].value for name in _SETTINGS})
    settings.protocols = _PROTOCOL.value
    config_checks.validate(config)
    names = protocols.parse(settings.protocols)
    if not names:
        raise UserError(f"--protocol= names none: there are {', '.join(protocols.PROTOCOLS)}")
    path = Path(_TEXTS.value)
    texts = read(path, "text")
    of_texts = [] if _REFERENCES.value else _within(path, "reference")
    references = of_texts or (
        read(Path(_REFERENCES.value), "text", "reference", "target") if _REFERENCES.value else []
    )
    if not references:
        raise UserError(f"{path} has no 'reference' of each text: give --references=FILE")
    sources = (
        read(Path(_SOURCES.value), "source", "text") if _SOURCES.value else _within(path, "source")
    )
    paired = _PAIRED.value
    if paired is None:
        paired = bool(of_texts or sources) or any(protocols.PROTOCOLS[n].paired for n in names)
    where = _REFERENCES.value or str(path)
    for number, text in enumerate(references, 1):
        if paired and not text:
            raise UserError(f"{where}:{number}: an empty reference; remove it, and its text")
    for what, group in (("references", references if paired else texts), ("sources", sources)):
        if group and len(group) != len(texts):
            raise UserError(
                f"{path} has {len(texts)} texts, but there are {len(group)} {what}: line i of one "
                "must belong to line i of the other"
            )
    text_encoder = encoder.load(_ENCODER.value)
    length = _MAX_LENGTH.value
    if not 3 <= length <= text_encoder.config.max_positions:
        raise UserError(
            f"--max_length={length}: from 3 to {text_encoder.config.max_positions}, the encoder's"
        )

    def normalise(some: list[str]) -> list[str]:
        return tokens.round_trip(text_encoder.tokenizer, some, length)

    return protocols.Texts(
        generated=texts,
        references=references,
        sources=sources,
        paired=paired,
        training=(lambda: read(Path(_TRAINING.value), "text", "target"))
        if _TRAINING.value
        else None,
        normalise=normalise,
        form=f"{length} tokens of {text_encoder.name}",
        encoder=text_encoder,
        settings=settings,
    )


def main(argv: list[str]) -> None:
    commands.check_arguments(argv)
    for flag in (_TEXTS, _OUT):
        if not flag.value:
            raise UserError(f"--{flag.name}=FILE is missing")
    out = Path(_OUT.value)
    if not out.parent.is_dir():
        raise UserError(f"--out={out}: there is no folder {out.parent}")
    result = evaluate(open_texts())
    workdir.write_json(out, result)
    for name, problem in result["problems"].items():
        logger.warning("no %s: %s", name, problem)
    empty = result["texts"]["generated"]["empty"]
    if empty:
        logger.warning("%d of the texts say nothing", empty)
    print("\n".join(table.lines(result["scores"])))
    if not result["scores"]:
        raise UserError(f"no score could be had; {out} says why")


if __name__ == "__main__":
    commands.run(main)
