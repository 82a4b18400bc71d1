"""What the command lines of this package share: logs, and errors as one line."""

import logging
import sys
from collections.abc import Callable, Sequence

from absl import app, flags
from absl import logging as absl_logging

from cosmos_jax.errors import UserError

logger = logging.getLogger("cosmos_jax")


def run(main: Callable[[list[str]], None], required: Sequence[str] = ()) -> None:
    """Runs `main` on absl's flags; a UserError is printed as one line with exit status 2."""
    # This package speaks for itself; the libraries under it only if something is wrong.
    absl_logging.set_verbosity(absl_logging.ERROR)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    flags.mark_flags_as_required(required)
    try:
        app.run(main, flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def refuse_arguments(argv: Sequence[str]) -> None:
    """UserError if anything but flags was given."""
    if len(argv) > 1:
        raise UserError(f"unexpected argument {argv[1]!r}; flags begin with --")


def _parse(argv: Sequence[str]) -> list[str]:
    """Flags, with whatever is wrong about them as a UserError of one line."""
    try:
        return flags.FLAGS(list(argv), known_only=False)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise UserError(" ".join(str(error).split())) from error
