"""The demo's data set: what becomes of entries of Debian's package lists."""

import gzip
import json
import lzma
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cosmos_jax.data import jsonl, sources
from demo import debian_synopses as demo

ROOT = Path(__file__).parents[1]

LISTS = """\
Package: editor
Version: 1.2
Description: small editor for texts
 This editor opens texts of any length at once, because it reads
 only what is  shown, and keeps what was changed in a file of its own.
 .
 A second paragraph, which is not needed.
Section: editors

Package: libeditor-dev
Source: editor (1.1)
Version: 1.2
Description: small editor for texts (development files)
 This editor opens texts of any length at once, because it reads only
 what is shown, and keeps what was changed in a file of its own.
 .
 These are the files to build others with it.

Package: editor-plugins
Source: editor
Version: 1.2
Description: Small editor for texts (plugins)
 Plugins for a small editor that count words and lines of all
 texts that are open, or of the one in front.

Package: editor-dbg
Source: editor
Version: 1.2
Description: what the editor is made of
 With these files a debugger says where in the editor's own code it is.

Package: painter
Version: 3
Description: draws pictures (for X)
 Paints with brushes of many kinds:
 .
  * round ones
  * square ones
 .
 Some can:
 - blend
 - blur
 .
 Pictures may be as large as the disk.

Package: painter-doc
Source: painter
Version: 3
Description: manual of a program that draws
 Paints with brushes of many kinds:
 .
 These are the pages to read about it, one for each brush.

Package: paint
Version: 3
Description: transitional package for painter
 This package only sees to it that the new one is there after an upgrade.

Package: tiny
Version: 1
Description: tiny
 It is tiny.

Package: short-only
Version: 1
Description: no description at all
"""

EXPECTED = [
    (
        "editor",
        "This editor opens texts of any length at once, because it reads only what is shown, "
        "and keeps what was changed in a file of its own.",
        "small editor for texts",
    ),
    (
        "painter",
        "Paints with brushes of many kinds: Pictures may be as large as the disk.",
        "draws pictures",
    ),
]


def test_rows_by_hand():
    assert demo.rows(demo.packages([("list", LISTS)])) == [demo.Row(*row) for row in EXPECTED]


def test_descriptions_come_from_another_list_than_sources():
    packages = "Package: libfoo3\nVersion: 1\nSource: bar (2)\nDescription: a bar\n"
    texts = "\n".join(
        f"Package: {name}\nDescription-md5: 0\nDescription-en: a bar\n {text}\n"
        for name, text in (("libfoo3", "First."), ("libfoo3", "Second."), ("libother2-dev", "It."))
    )
    for lists in ((packages, texts), (texts, packages)):
        found = demo.packages([(str(i), text) for i, text in enumerate(lists)])
        assert found == [
            demo.Package("libfoo3", "bar", "a bar", " First."),
            demo.Package("libother2-dev", "other", "a bar", " It."),
        ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Package: a\n<html>", "list:2: not a line of a package list: <html>"),
        (" goes on", "list:1: not a line"),
        ("Origin: Debian", "list: an entry without Package"),
    ],
)
def test_what_is_no_list_is_refused(text, message):
    with pytest.raises(demo.Problem, match=message):
        demo.packages([("list", text)])


# Whole files

NUM_FAMILIES = 300


def lists(count=NUM_FAMILIES):
    """Families of two packages with texts of their own; every tenth has the synopsis of another."""
    packages, texts = [], []
    for i in range(count):
        synopsis = f"tool number {i if i % 10 else i + 1}"
        for part in ("", "-extra"):
            name = f"tool{i}x{part}"
            packages.append(f"Package: {name}\nSource: tools-{i}\nVersion: 1\nSize: 7\n")
            words = f"{part.strip('-') or 'main'} part of number {i} which does what others do not"
            texts.append(
                f"Package: {name}\nDescription-md5: 0\n"
                f"Description-en: {synopsis}{part and ', more of it'}\n The {words}.\n"
            )
    return "\n".join(packages), "\n".join(texts)


def run(*arguments, code=0, **variables):
    done = subprocess.run(
        [sys.executable, str(ROOT / "demo" / "debian_synopses.py"), *map(str, arguments)],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def made(tmp_path):
    """A data set made of a .gz and a .xz file."""
    packages, texts = (text.encode() for text in lists())
    (tmp_path / "Packages.gz").write_bytes(gzip.compress(packages, mtime=0))
    (tmp_path / "Translation-en.xz").write_bytes(lzma.compress(texts))
    flags = [f"--packages={tmp_path / name}" for name in ("Packages.gz", "Translation-en.xz")]
    out = tmp_path / "deep" / "synopses"
    said = run(out, *flags).stdout
    counts = {path.stem: len(list(jsonl.rows(path))) for path in out.iterdir()}
    order = ("train", "valid", "test")
    assert said == ", ".join(f"{name}: {counts[name]}" for name in order) + "\n"
    return out


def read(directory):
    return {path.stem: list(jsonl.rows(path)) for path in directory.iterdir()}


def test_families_and_synopses_stay_in_one_split(made):
    found = read(made)
    assert found.keys() == {"train", "valid", "test"}
    assert sum(map(len, found.values())) == 2 * NUM_FAMILIES
    for name in ("valid", "test"):
        assert 0.01 < len(found[name]) / (2 * NUM_FAMILIES) < 0.08
    groups = {name: set() for name in found}
    for name, rows in found.items():
        for row in rows:
            number = int(row.source.split("number ")[1].split()[0])
            # The one that shares a synopsis with the next belongs to it.
            groups[name].add(number if number % 10 else number + 1)
    total = sum(map(len, groups.values()))
    assert total == len(set().union(*groups.values())) == NUM_FAMILIES * 9 // 10


def test_the_same_lists_give_the_same_files(made, tmp_path):
    backwards = "\n".join(lists()).split("\n\n")[::-1]
    (tmp_path / "all").write_text("\n\n".join(backwards))
    run(tmp_path / "again", f"--packages={tmp_path / 'all'}", PYTHONHASHSEED="5")
    for path in made.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.fixture
def apt(tmp_path):
    """Stand-ins for apt's programs, with a list and a file of descriptions."""
    folder = tmp_path / "bin"
    folder.mkdir()
    packages, texts = lists()
    (tmp_path / "packages").write_text(packages)
    (tmp_path / "texts").write_text(texts)
    for name, body in {
        "apt-cache": f"[ $3 = dumpavail ] && cat '{tmp_path}/packages'",
        "apt-get": f"[ $1 = indextargets ] && echo '{tmp_path}/texts'",
        "apt-helper": '[ $1 = cat-file ] && shift && cat "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / name).chmod(0o755)
    return folder


def test_apts_lists_give_what_files_give(made, apt, tmp_path):
    path = f"{apt}:{os.environ['PATH']}"
    run(tmp_path / "of_apt", PATH=path)
    assert read(tmp_path / "of_apt") == read(made)
    (apt / "apt-get").write_text("#!/bin/sh\n")  # no descriptions were fetched
    said = run(tmp_path / "none", PATH=path, code=2).stderr
    assert said.startswith("error: no package has a description: run apt-get update -o Acquire::")
    (apt / "apt-cache").write_text("#!/bin/sh\necho 'E: no\n  lists' >&2\nexit 100\n")
    said = run(tmp_path / "none", PATH=path, code=2).stderr
    assert said == "error: apt-cache failed: E: no lists\n"
    (apt / "apt-cache").unlink()
    said = run(tmp_path / "none", PATH=str(apt), code=2).stderr
    assert said == "error: there is no apt-cache here: give --packages=FILE\n"
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (None, "list", "list: cannot be read: No such file or directory"),
        (b"\xff\xfe", "list", "list: not a package list in UTF-8"),
        (b"Package: a\n", "list.xz", "list.xz: cannot be read: "),
        (b"Package: a\n", "list.gz", "list.gz: cannot be read: "),
        (gzip.compress(b"Package: a\n", mtime=0)[:-9], "list.gz", "list.gz: cannot be read: "),
        (b"Package: a\n", "list", "no package has a description: give a Translation-en"),
        (LISTS.encode(), "list", "too few packages, none for "),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    said = run(tmp_path / "out", f"--packages={tmp_path / name}", code=2).stderr
    assert said.startswith("error: ")
    assert message in said
    assert said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name] * (content is not None)


def test_wrong_arguments_are_one_line():
    for arguments in (["out", "--fly"], []):
        said = run(*arguments, code=2).stderr
        assert said.startswith("error: ")
        assert said.count("\n") == 1


def test_a_directory_with_something_in_it_is_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    said = run(tmp_path / "out", "--packages=whatever", code=2).stderr
    assert "out is there already: delete it or name another directory" in said
    (tmp_path / "out" / "mine").unlink()
    parts = {name: [demo.Row(*EXPECTED[0])] for name in ("train", "valid", "test")}
    demo.write(tmp_path / "out", parts)
    assert json.loads((tmp_path / "out" / "valid.jsonl").read_text())["source"] == EXPECTED[0][1]


def test_files_appear_together_or_not_at_all(tmp_path, monkeypatch):
    parts = {name: [demo.Row(*EXPECTED[0])] for name in ("train", "valid", "test")}
    synced = []

    def fsync(descriptor):
        synced.append(descriptor)
        if len(synced) == 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(demo.Problem, match=r"out: cannot be written: No space left on device"):
        demo.write(tmp_path / "out", parts)
    assert list(tmp_path.iterdir()) == []
    shutil.copytree(ROOT / "launch", tmp_path / ".out.partial")  # what a kill left
    demo.write(tmp_path / "out", parts)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.stem for path in (tmp_path / "out").iterdir()} == set(parts)


def test_the_first_words_of_sources(tmp_path):
    """As many as references have on average, rounded: here 3."""
    rows = [
        {"source": "one two three four", "reference": "a b", "text": "x"},
        {"source": "five", "reference": "a b c", "text": "y"},
        {"source": "six seven eight nine", "reference": "a b c d", "text": ""},
    ]
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = [sys.executable, str(ROOT / "demo" / "first_words.py")]
    done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["text"] for row in found] == ["one two three", "five", "six seven eight"]
    assert [row["reference"] for row in found] == [row["reference"] for row in rows]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")


# Extracts


def make_extracts(old, new):
    command = [sys.executable, str(ROOT / "demo" / "extracts.py"), str(old), str(new)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def write_splits(directory, rows):
    directory.mkdir()
    for name in ("train", "valid", "test"):
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


def test_extracts_are_the_nearest_words_of_the_source(tmp_path):
    rows = [
        # Of 4 words of the target the last three: F1 = 6 / 7, whatever their case and marks.
        {
            "source": "Foo\u2028is a fast, small text editor. It is fast.",
            "target": "Small Text EDITOR here",
        },
        # Words count as often as they are there: F1 = 8 / 9, and 6 / 7 of the first three.
        {"source": "a b c d a b c", "target": "a b c c"},
        {"source": "nothing in common at all", "target": "other words"},
        {"source": "two words", "target": "two words"},  # fewer than three
        {"source": " ".join(["x"] * 22 + ["far", "too", "late"]), "target": "far too late"},
    ]
    write_splits(tmp_path / "old", rows)
    done = make_extracts(tmp_path / "old", tmp_path / "new")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["train: 2 rows", "valid: 2 rows"]
    for name in ("train", "valid"):
        lines = (tmp_path / "new" / f"{name}.jsonl").read_bytes().decode().split("\n")
        found = [json.loads(line) for line in lines if line]
        assert [row["target"] for row in found] == ["small text editor", "c d a b c"]
        assert [row["source"] for row in found] == [row["source"] for row in rows[:2]]
    assert sources.load(f"jsonl:{tmp_path / 'new'}").conditional
    same = [(tmp_path / place / "test.jsonl").read_bytes() for place in ("old", "new")]
    assert same[0] == same[1]


def test_extracts_are_all_there_or_not_at_all(tmp_path):
    write_splits(tmp_path / "old", [{"source": "one two three", "target": "one two three"}])
    with open(tmp_path / "old" / "valid.jsonl", "a", encoding="utf-8") as file:
        file.write('{"source": "one two three"}\n')
    done = make_extracts(tmp_path / "old", tmp_path / "new")
    assert done.returncode == 1
    assert f"error: {tmp_path / 'old' / 'valid.jsonl'}:2: " in done.stderr
    assert not (tmp_path / "new").exists()
    (tmp_path / "new").mkdir()
    done = make_extracts(tmp_path / "old", tmp_path / "new")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "is there already" in done.stderr
    done = make_extracts(tmp_path / "none", tmp_path / "other")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "none" in done.stderr
    assert not list(tmp_path.glob("*other*"))
    assert subprocess.run(done.args[:2], capture_output=True, check=False).returncode == 2
