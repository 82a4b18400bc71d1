"""Writes texts with a trained model, to a terminal, a pipe or a file.

    python -m cosmos_jax.generate --model=runs/rocstories --num=8
    tail -f articles.txt | python -m cosmos_jax.generate --model=runs/xsum --input=-

Each line of --input is a source, or with --edit, --infill or --reconstruct a text: plain, or a JSON
object with `source` or `text`. Line i of what is written belongs to line i of what was read. It is
there as soon as its batch is finished, and a batch is what has come, up to --batch_size lines: text
i is a function of --seed, i and its source, whatever the batches. JSON objects with `source`, which
is what was given, and `text` are written if --output ends in .jsonl or --format says so.
"""

import contextlib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

import cosmos_jax
from cosmos_jax import commands
from cosmos_jax import config as config_lib
from cosmos_jax.data import incoming
from cosmos_jax.errors import UserError

if TYPE_CHECKING:
    from cosmos_jax.library import Model

logger = logging.getLogger("cosmos_jax")

# What may be done with texts instead of writing new ones, and the flags that say nothing then.
MODES = {
    "edit": ("num", "best_of"),
    "infill": ("num", "best_of"),
    "reconstruct": ("num", "best_of", "guidance", "steps", "sampler"),
}

Result = dict[str, str]
"""What was given as `source`, if anything was, and the `text`."""


class Answers:
    """Texts for the lines of an input, or for nothing.

    Attributes:
      cut: lines of which the model has not seen the end.
      empty: lines without a token, for which the text is empty.
    """

    def __init__(self, model: "Model", options: flags.FlagValues) -> None:
        self.cut = self.empty = 0
        self._model, self._options, self._mode = model, options, _mode(options)
        of_text, of_source = model.config.data.max_length, model.config.data.max_source_length
        self._fields: tuple[tuple[str, ...], ...] = (("text", "source"),)
        self._limits: tuple[int, ...] = (of_text,)
        if self._mode is None:
            self._fields, self._limits = (("source", "text"),), (of_source,)
        elif self._mode != "reconstruct" and model.conditional:
            self._fields, self._limits = (("text",), ("source",)), (of_text, of_source)

    def to_nothing(self) -> Iterator[list[Result]]:
        """As many as --num says, batch by batch."""
        for texts in self._model.stream(self._options.num, **self._how(0)):
            yield [{"text": text} for text in texts]

    def to(self, lines: incoming.Incoming) -> Iterator[list[Result]]:
        """The results of each line in order, batch by batch."""
        first = 0
        for batch in lines.batches(self._options.batch_size, *self._fields):
            usable = self._usable(batch)
            asked = [given for given, ok in zip(batch, usable, strict=True) if ok]
            texts = iter(self._texts(first, *_columns(asked)) if asked else [])
            first += len(asked)
            yield [
                {"source": given[0], "text": next(texts) if ok else ""}
                for given, ok in zip(batch, usable, strict=True)
            ]

    def _texts(self, first: int, given: list[str], *sources: list[str]) -> list[str]:
        model, options = self._model, self._options
        if self._mode == "reconstruct":
            return model.reconstruct(given)
        if self._mode is None:
            parts = model.stream(sources=given, **self._how(first))
            return [text for part in parts for text in part]
        how = self._how(first)
        if sources:
            how["sources"] = sources[0]
        if self._mode == "edit":
            return model.edit(given, options.edit, **how)
        return model.infill(given, **how)

    def _how(self, first: int) -> dict[str, Any]:
        names = ["seed", "guidance", "steps", "sampler"]
        if self._mode is None:
            names += ["best_of", "batch_size"]
        return {"first": first, **{name: self._options[name].value for name in names}}

    def _usable(self, batch: list[incoming.Texts]) -> list[bool]:
        """Of each line whether all it should have has tokens; counts what is cut or empty."""
        usable, cut = [True] * len(batch), [False] * len(batch)
        special = self._model.tokenizer.num_special_tokens_to_add()
        for column, limit in zip(_columns(batch), self._limits, strict=True):
            encoded = self._model.tokenizer(column, truncation=True, max_length=limit)
            for i, encoding in enumerate(encoded.encodings):
                usable[i] &= len(encoding.ids) > special
                cut[i] |= bool(encoding.overflowing)
        self.cut += sum(map(all, zip(usable, cut, strict=True)))
        self.empty += usable.count(False)
        return usable

    def log(self, lines: incoming.Incoming) -> None:
        """Says once what of the lines was not used as it stood there."""
        limits = " and ".join(map(str, self._limits))
        for count, what in (
            (self.cut, f"cut to the {limits} tokens that the model reads"),
            (self.empty, "without a token: their texts are empty"),
            (lines.replaced, "not UTF-8: what could not be read was replaced by U+FFFD"),
        ):
            if count:
                logger.warning("%d of %d lines were %s", count, lines.number, what)


def _columns(rows: list[incoming.Texts]) -> list[list[str]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _mode(options: flags.FlagValues) -> str | None:
    # 0 is a strength, though it equals False.
    asked = [mode for mode in MODES if not any(options[mode].value is no for no in (None, False))]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]}: choose one of them")
    return asked[0] if asked else None


def run(options: flags.FlagValues) -> None:
    """Does what the flags ask for; UserError for anything that does not go with the rest."""
    try:
        _check(options)
        from cosmos_jax import distributed  # takes a second: not for a wrong flag

        with contextlib.ExitStack() as stack:
            lines = stack.enter_context(incoming.opened(options.input)) if options.input else None
            distributed.keep_compiled_programs()
            model = cosmos_jax.load(options.model, distilled=options.distilled)
            _check_model(model, options)
            logger.info("%s: %s", options.model, _about(model))
            write = stack.enter_context(writing(options.output))
            answers = Answers(model, options)
            if lines is not None:
                stack.callback(answers.log, lines)
            for results in answers.to_nothing() if lines is None else answers.to(lines):
                write("".join(f"{line}\n" for line in _formatted(results, options)))
    except BrokenPipeError:
        pass  # whoever was reading has seen enough
    except KeyboardInterrupt:
        sys.exit(130)


def _check(options: flags.FlagValues) -> None:
    """Before anything is loaded."""
    if not options.model:
        raise UserError("--model=NAME is missing: a workdir, an exported directory, or a hub id")
    mode = _mode(options)
    if options.edit is not None and not 0 <= options.edit <= 1:
        raise UserError(f"--edit={options.edit}: from 0, the text itself, to 1, another text")
    if mode and not options.input:
        raise UserError(f"--{mode} needs texts: give --input=FILE, or - for standard input")
    for name in MODES[mode] if mode else ("num",) if options.input else ():
        if options[name].present:
            raise UserError(f"--{name} says nothing with --{mode or 'input'}: leave it out")
    folder = Path(options.output).expanduser().parent
    if not folder.is_dir():
        raise UserError(f"--output={options.output}: there is no folder {folder}")


def _check_model(model: "Model", options: flags.FlagValues) -> None:
    if _mode(options) is not None:
        return
    if model.conditional and not options.input:
        raise UserError(
            f"{options.model} writes a text for a source: give --input=FILE, or - for standard "
            "input"
        )
    if options.input and not model.conditional:
        modes = ", ".join(f"--{mode}" for mode in MODES)
        raise UserError(f"{options.model} takes no sources: leave out --input, or give {modes}")


def _about(model: "Model") -> str:
    """A line about a model that has just been loaded."""
    config = model.config
    about = f"{config.system}, texts of up to {config.data.max_length} tokens"
    if model.conditional:
        about += f" for sources of up to {config.data.max_source_length}"
    if config.system == "cosmos":
        about += f", {config.autoencoder.num_latents} latents of width {config.encoder.hidden_size}"
        how = config_lib.sampling(config)
        about += f", {how['num_sampling_steps']} steps of {how['sampler']}"
    return about


def _formatted(results: list[Result], options: flags.FlagValues) -> list[str]:
    form = options.format or ("jsonl" if options.output.endswith(".jsonl") else "text")
    if form == "text":
        return [result["text"] for result in results]
    objects = [json.dumps(result, ensure_ascii=False) for result in results]
    # JSON allows these within a line, but many programs end lines at them.
    return [re.sub("[\x85\u2028\u2029]", lambda c: f"\\u{ord(c[0]):04x}", o) for o in objects]


@contextlib.contextmanager
def writing(path: str) -> Iterator[Callable[[str], None]]:
    """What writes to standard output ("-") or to a file, which has its name once all is there.

    Raises:
      UserError: what the system says about writing.
      BrokenPipeError: nobody reads any more.
    """
    final = Path(path).expanduser()
    # A device or a named pipe is not to be replaced by a file.
    direct = path == incoming.STANDARD or (final.exists() and not final.is_file())
    partial = final.with_name(f".{final.name}.partial")
    target: Any = final if direct else partial
    if path == incoming.STANDARD:
        if sys.stdout is None:
            raise UserError("standard output is closed")
        target = sys.stdout.fileno()
    # Without a buffer nothing is left over when writing has failed.
    with _refused(path):
        file = open(target, "wb", buffering=0, closefd=path != incoming.STANDARD)  # noqa: SIM115

    def write(text: str) -> None:
        rest = memoryview(text.encode())
        with _refused(path):
            while rest:
                rest = rest[file.write(rest) :]

    with file:
        try:
            yield write
        except BaseException:
            if not direct:
                _leave(partial)
            raise
        if not direct:
            with _refused(path):
                os.fsync(file.fileno())
                os.replace(partial, final)


def _leave(partial: Path) -> None:
    if partial.stat().st_size:
        logger.warning("what there was until then is in %s", partial)
    else:
        partial.unlink()


@contextlib.contextmanager
def _refused(path: str) -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(f"--output={path}: cannot be written: {error.strerror}") from error


def define_flags(to: flags.FlagValues = flags.FLAGS) -> None:
    """Not at import: absl's flags are global, and other commands have some of the same names."""
    own: dict[str, Any] = {"flag_values": to}
    flags.DEFINE_string("model", None, "A workdir, an exported directory, or a hub id.", **own)
    flags.DEFINE_string("input", None, "Sources or texts, one a line; -: standard input.", **own)
    flags.DEFINE_string("output", "-", "File to write; -: standard output.", **own)
    flags.DEFINE_enum(
        "format", None, ("text", "jsonl"), "Default: jsonl if --output ends so, else text.", **own
    )
    flags.DEFINE_integer("num", 8, "Texts of a model without sources.", lower_bound=1, **own)
    flags.DEFINE_integer("seed", 0, "Of all that is random.", **own)
    flags.DEFINE_integer("batch_size", 64, "Most texts at once.", lower_bound=1, **own)
    flags.DEFINE_float("guidance", None, "Weight of the source; default: the model's.", **own)
    flags.DEFINE_integer(
        "steps", None, "Sampling steps; default: the model's.", lower_bound=1, **own
    )
    flags.DEFINE_enum("sampler", None, config_lib.SAMPLERS, "Default: the model's.", **own)
    flags.DEFINE_bool("distilled", True, "--nodistilled: the denoiser before that.", **own)
    flags.DEFINE_integer(
        "best_of",
        1,
        "Candidates, of which the one most like the others is taken.",
        lower_bound=1,
        **own,
    )
    flags.DEFINE_float(
        "edit",
        None,
        "Change each text: 0, not at all, to 1, completely; 0.4 is a paraphrase.",
        **own,
    )
    flags.DEFINE_bool("infill", False, "Write a token for each [MASK] of each text.", **own)
    flags.DEFINE_bool("reconstruct", False, "Write what the autoencoder makes of each text.", **own)


def main(argv: list[str]) -> None:
    commands.check_arguments(argv)
    run(flags.FLAGS)


if __name__ == "__main__":
    define_flags()
    commands.run(main)
