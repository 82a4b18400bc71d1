"""Makes a data set of summarisation from the package lists of a Debian or Ubuntu machine.

python demo/debian_synopses.py DIRECTORY [--packages=FILE ...]

Writes DIRECTORY/train.jsonl, valid.jsonl and test.jsonl. Each line is a JSON object: `source` is
the prose of a package's description, `target` its one-line synopsis. Train with them by
`--config.data.source=jsonl:DIRECTORY`. Needs Python alone; the same lists give the same files.

The lists are apt's: its packages, and their descriptions, which are files of their own. Where there
are none, as in most containers, get them once, as root:

    apt-get update -o Acquire::Languages=en

Or name files, on any machine: `--packages` is a Packages or Translation-en file, plain, .gz or .xz,
and may be given several times. Translation-en has the descriptions; Packages says which packages
are made from one source package, otherwise that is guessed from their names.

A source is the first paragraph if it has 20 words or more, else all of them, without those that
hold lists. Left out are packages for debugging or for transition, very short and very long
descriptions, and what would be there twice: packages whose descriptions begin with the same
paragraph, or that have one synopsis within one source package. All packages of one source package,
and all with the same synopsis, are in one split.
"""

import argparse
import contextlib
import gzip
import hashlib
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

# Of 25 groups of packages the first is for validation, the second for tests.
GROUPS = 25
SPLITS = {0: "valid", 1: "test"}
# In words: a first paragraph that says enough, and a source.
ENOUGH, SHORTEST, LONGEST = 20, 8, 200

ENGLISH = ("-o", "Acquire::Languages=en")  # images of containers turn descriptions off
GET_LISTS = f"run apt-get update {' '.join(ENGLISH)} as root, or give --packages=FILE"
NOT_OF_USE = re.compile(r"transitional|dummy package|meta-?package|debug(ging)? symbols", re.I)
BULLET = re.compile(r"\s|[*+-]\s")
PART = re.compile(
    r"-(dev|doc|docs|dbg|data|common|bin|utils?|tools?|examples?|server|client|plugins?|modules?)$"
)


class Problem(Exception):
    """What the user can set right, in one line."""


class Package(NamedTuple):
    """A description as it is in the lists; `family` is the name of the source package."""

    name: str
    family: str
    synopsis: str
    description: str


class Row(NamedTuple):
    family: str
    source: str
    target: str


# Reading


def read(path: Path) -> str:
    """The text of a file; .gz and .xz are unpacked."""
    opener: Callable[..., Any] = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    try:
        with opener(path, "rb") as file:
            return file.read().decode()
    except UnicodeDecodeError as error:
        raise Problem(f"{path}: not a package list in UTF-8 (plain, .gz or .xz)") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise Problem(f"{path}: cannot be read: {reason}") from error


def call(*command: str) -> str:
    """What a program of apt says."""
    try:
        done = subprocess.run(command, capture_output=True, check=True)
    except FileNotFoundError as error:
        raise Problem(f"there is no {command[0]} here: give --packages=FILE") from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.decode(errors="replace").split())
        raise Problem(f"{command[0]} failed: {said or f'status {error.returncode}'}") from error
    return done.stdout.decode(errors="replace")


def of_apt() -> Iterator[tuple[str, str]]:
    """Apt's lists as (name, text): the packages, and the files with their descriptions."""
    yield "apt-cache dumpavail", call("apt-cache", *ENGLISH, "dumpavail")
    wanted = ("Created-By: Translations", "Language: en")
    paths = call("apt-get", "indextargets", *ENGLISH, "--format", "$(FILENAME)", *wanted).split()
    if paths:
        # Apt packs them with what Python does not know.
        helper = shutil.which("apt-helper", path=f"{os.environ['PATH']}:/usr/lib/apt")
        yield "apt's Translation-en", call(helper or "apt-helper", "cat-file", *paths)


def stanzas(text: str, where: str) -> Iterator[dict[str, str]]:
    """The fields of each entry of a list; lines that go on begin with a space.

    Raises:
      Problem: a line of another form, with its number.
    """
    fields: dict[str, str] = {}
    name = ""
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            if fields:
                yield fields
            fields, name = {}, ""
        elif line[0] in " \t" and name:
            fields[name] += "\n" + line
        elif re.match(r"[!-9;-~]+:", line):
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        else:
            raise Problem(f"{where}:{number}: not a line of a package list: {line.strip()[:40]}")
    if fields:
        yield fields


def packages(lists: Iterable[tuple[str, str]]) -> list[Package]:
    """All that have a description, by name; of several descriptions of a package the first."""
    families: dict[str, str] = {}
    described: dict[str, tuple[str, str]] = {}
    for where, text in lists:
        for fields in stanzas(text, where):
            if "Package" not in fields:
                raise Problem(f"{where}: an entry without Package: not a package list")
            name = fields["Package"]
            # Entries of Packages have a version; the name of the source may be followed by its own.
            if "Version" in fields:
                families.setdefault(name, fields.get("Source", name).partition(" ")[0])
            whole = fields.get("Description-en", fields.get("Description", ""))
            synopsis, _, description = whole.partition("\n")
            if description:
                described.setdefault(name, (synopsis, description))
    return [Package(n, families.get(n) or guess(n), *described[n]) for n in sorted(described)]


def guess(name: str) -> str:
    """The source package by the name of one of its packages: libfoo2-dev is of foo."""
    while (shorter := PART.sub("", name)) != name:
        name = shorter
    return re.sub(r"^lib(?=.)|[0-9.]+$", "", name) or name


# Making rows


def paragraphs(description: str) -> list[str]:
    """Those of prose, each in one line; paragraphs that hold lists or code are left out."""
    found: list[list[str]] = [[]]
    for line in description.split("\n"):
        line = line[1:]  # of a space that says that it goes on
        if line.strip() == ".":
            found.append([])
        elif line.strip():
            found[-1].append(line)
    return [
        " ".join(" ".join(lines).split())
        for lines in found
        if lines and not any(map(BULLET.match, lines))
    ]


def joined(prose: list[str]) -> str:
    """The first paragraph if it says enough, else all, as far as there is room."""
    source = prose[0]
    if len(source.split()) < ENOUGH:
        for paragraph in prose[1:]:
            if len(source.split()) + len(paragraph.split()) > LONGEST:
                break
            source += f" {paragraph}"
    return source


def rows(found: Iterable[Package]) -> list[Row]:
    """A row for each package that adds one, in the order of the packages."""
    made: list[Row] = []
    known: set[tuple[str, str]] = set()
    for package in found:
        prose = paragraphs(package.description)
        # In brackets at its end stands which of several packages of one description it is.
        target = re.sub(r"\s*\([^()]*\)$", "", " ".join(package.synopsis.split()))
        whole = f"{package.synopsis} {' '.join(prose)}"
        of_use = not NOT_OF_USE.search(whole) and not package.name.endswith(("-dbg", "-dbgsym"))
        if not (prose and target and of_use):
            continue
        source = joined(prose)
        if not SHORTEST <= len(source.split()) <= LONGEST or source.strip(".") == target:
            continue
        # Variants begin with the same paragraph, or are called the same.
        keys = {("", prose[0].lower()), ("", source.lower()), (package.family, target.lower())}
        if not keys & known:
            known |= keys
            made.append(Row(package.family, source, target))
    return made


def split(made: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of train, valid and test; what shares a family or a target stays together."""
    made = list(made)
    above: dict[str, str] = {}

    def top(key: str) -> str:
        while (parent := above.setdefault(key, key)) != key:
            above[key] = above[parent]
            key = parent
        return key

    for row in made:
        one, other = sorted((top(f"family {row.family}"), top(f"target {row.target.lower()}")))
        above[other] = one  # the first in the alphabet stands for the group, whatever the order
    parts: dict[str, list[Row]] = {"train": [], "valid": [], "test": []}
    for row in made:
        digest = hashlib.sha256(top(f"family {row.family}").encode()).digest()
        parts[SPLITS.get(int.from_bytes(digest[:8]) % GROUPS, "train")].append(row)
    return parts


# Writing


def check_new(directory: Path) -> None:
    if directory.exists() and not (directory.is_dir() and not any(directory.iterdir())):
        raise Problem(f"{directory} is there already: delete it or name another directory")


def write(directory: Path, parts: dict[str, list[Row]]) -> None:
    """All files or none."""
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # what a kill left
        partial.mkdir(parents=True)
        for name, part in parts.items():
            with open(partial / f"{name}.jsonl", "w", encoding="utf-8") as file:
                for row in part:
                    pair = {"source": row.source, "target": row.target}
                    file.write(json.dumps(pair, ensure_ascii=False) + "\n")
                file.flush()
                os.fsync(file.fileno())
        os.rename(partial, directory)
    except OSError as error:
        raise Problem(f"{directory}: cannot be written: {error.strerror}") from error
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial)


def make(directory: Path, lists: Iterable[tuple[str, str]], remedy: str) -> dict[str, int]:
    """Writes the files; how many rows each has."""
    check_new(directory)
    found = packages(lists)
    if not found:
        raise Problem(f"no package has a description: {remedy}")
    parts = split(rows(found))
    for name, part in parts.items():
        if not part:
            raise Problem(f"too few packages, none for {name}: {remedy}")
    write(directory, parts)
    return {name: len(part) for name, part in parts.items()}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Problem(f"{message}; --help says more")


def main() -> None:
    assert __doc__
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="where to; must be new or empty")
    parser.add_argument("--packages", type=Path, action="append", metavar="FILE")
    arguments = parser.parse_args()
    lists, remedy = of_apt(), GET_LISTS
    if arguments.packages:
        lists = ((str(path), read(path)) for path in arguments.packages)
        remedy = "give a Translation-en file of a whole distribution"
    counts = make(arguments.directory.absolute(), lists, remedy)
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    try:
        main()
    except Problem as problem:
        print(f"error: {problem}", file=sys.stderr)
        sys.exit(2)
