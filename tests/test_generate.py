"""The command that writes texts: streams, odd input, refusals; a stand-in writes them mostly."""

import contextlib
import gzip
import io
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import tiny as tiny_lib
from absl import flags
from hypothesis import given
from hypothesis import strategies as st

import cosmos_jax
from cosmos_jax import encoder, generate
from cosmos_jax.data import incoming
from cosmos_jax.errors import UserError

ROOT = Path(__file__).parents[1]
LONG = " ".join(["tree"] * 5_000)


class StandIn:
    """Answers a text with its words in capitals and its number, and notes what it was asked."""

    def __init__(self, tiny, *, conditional=True):
        self.conditional = conditional
        self.config = tiny.pairs_config() if conditional else tiny.config()
        self.tokenizer = encoder.load_tokenizer(str(tiny.encoder))
        self.asked = []

    def stream(self, num=None, *, sources=None, first=0, batch_size, **how):
        self.asked.append(how)
        given = sources if self.conditional else ["nothing"] * num
        for start in range(0, len(given), batch_size):
            part = given[start : start + batch_size]
            yield [f"{first + start + i} {_capitals(text)}" for i, text in enumerate(part)]

    def reconstruct(self, texts):
        return [_capitals(text) for text in texts]

    def edit(self, texts, strength, **how):
        self.asked.append({"strength": strength, **how})
        return self.reconstruct(texts)

    def infill(self, texts, **how):
        self.asked.append(how)
        return self.reconstruct(texts)


def _capitals(text):
    assert text.strip(), "a text without tokens came through"
    return " ".join(text.upper().split()[:3])


@pytest.fixture
def model(tiny, monkeypatch):
    """A conditional stand-in, which is what `load` gives."""
    stand_in = StandIn(tiny)
    monkeypatch.setattr(cosmos_jax, "load", lambda name, distilled: stand_in)
    return stand_in


@pytest.fixture
def texts_model(tiny, monkeypatch):
    stand_in = StandIn(tiny, conditional=False)
    monkeypatch.setattr(cosmos_jax, "load", lambda name, distilled: stand_in)
    return stand_in


def run(*arguments, **values):
    options = flags.FlagValues()
    generate.define_flags(options)
    given = {"model": "MODEL", **values}
    options(["generate", *(f"--{name}={value}" for name, value in given.items()), *arguments])
    generate.run(options)


def test_any_line_has_its_own_line(model, tmp_path, caplog):
    """Bytes as they are found in the wild; each is answered where it stands."""
    path, out = tmp_path / "sources", tmp_path / "out.jsonl"
    path.write_bytes(
        b"\xef\xbb\xbfthe tree\r\n"  # a byte order mark, CRLF
        b"\n"
        b"  \t\r\n"
        b"a\0 king\n"
        b"\xf0\x9f\x8c\xb3 bird\n"  # an emoji
        b"red \xff\xfe bird\n"  # not UTF-8
        b"\x01\x02\n" + LONG.encode() + b"\n{not json\n"  # no tokens
        b"cloud\xe2\x80\xa8river\n"  # LINE SEPARATOR ends no line
        b"[SEP] stone\n"
        b"last"  # no end
    )
    caplog.set_level(logging.INFO, "cosmos_jax")
    run(input=path, output=out, batch_size=5)
    rows = tiny_lib.read_rows(out)
    assert [row["source"] for row in rows] == [
        *("the tree", "", "", "a\0 king", "\U0001f333 bird", "red \ufffd\ufffd bird", "\x01\x02"),
        *(LONG, "{not json", "cloud\u2028river", "[SEP] stone", "last"),
    ]
    assert [row["text"] for row in rows] == [
        *("0 THE TREE", "", "", "1 A\0 KING", "2 \U0001f333 BIRD", "3 RED \ufffd\ufffd BIRD", ""),
        *("4 TREE TREE TREE", "5 {NOT JSON", "6 CLOUD RIVER", "7 [SEP] STONE", "8 LAST"),
    ]
    loaded, *notes = [record.message for record in caplog.records]
    assert loaded == (
        "MODEL: cosmos, texts of up to 12 tokens for sources of up to 10, 4 latents of width 768, "
        "3 steps of euler_sde"
    )
    assert notes == [
        "1 of 12 lines were cut to the 10 tokens that the model reads",
        "3 of 12 lines were without a token: their texts are empty",
        "1 of 12 lines were not UTF-8: what could not be read was replaced by U+FFFD",
    ]
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "sources"]


@pytest.mark.parametrize("content", [b"", b"\n", b"\n \n\x00\n"])
def test_nothing_is_asked_of_the_model_for_nothing(model, tmp_path, content):
    path, out = tmp_path / "sources", tmp_path / "out"
    path.write_bytes(content)
    run(input=path, output=out)
    assert out.read_bytes() == b"\n" * content.count(b"\n")
    assert model.asked == []


def test_objects_are_told_from_texts(model, tmp_path):
    rows = [
        {"source": "the tree", "text": "old", "n": 1},
        {"text": "a king"},
        {"source": "half \ud83c"},
    ]
    lines = "\n" + "\n\n".join(json.dumps(row) for row in rows)
    expected = ["", "0 THE TREE", "", "1 A KING", "", "2 HALF \ufffd"]
    out = tmp_path / "out"
    for name in ("rows", "rows.jsonl", "rows.jsonl.gz"):
        path = tmp_path / name
        content = lines.encode() + b"\n"
        path.write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        run(input=path, output=out)
        assert out.read_text().split("\n") == [*expected, ""]
    # The name of the file counts before its first line.
    (tmp_path / "rows.txt").write_text('{"source": "the tree"}\n')
    run(input=tmp_path / "rows.txt", output=out)
    assert out.read_text() == '0 {"SOURCE": "THE TREE"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"source": "a', "rows:3: not valid JSON"),
        ("a king", "rows:3: not valid JSON"),
        ('{"title": "a"}', "rows:3: needs a JSON object with the text 'source' or 'text'"),
        ('{"source": 3}', "rows:3: needs a JSON object"),
        ('["source"]', "rows:3: needs a JSON object"),
        ("[" * 100_000, "rows:3: not valid JSON"),
    ],
)
def test_lines_before_a_broken_one_are_answered(model, tmp_path, line, message):
    path, out = tmp_path / "rows", tmp_path / "out"
    path.write_text('{"source": "tree"}\n{"source": "king"}\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        run(input=path, output=out)
    assert not out.exists()
    assert (tmp_path / ".out.partial").read_text() == "0 TREE\n1 KING\n"


def test_a_broken_first_object_is_no_text(model, tmp_path):
    (tmp_path / "rows").write_text('{"source": "a king\n')
    with pytest.raises(UserError, match="rows:1: not valid JSON"):
        run(input=tmp_path / "rows", output=tmp_path / "out")
    assert os.listdir(tmp_path) == ["rows"]


@contextlib.contextmanager
def piped(monkeypatch):
    """A pipe as standard input; what writes to it."""
    read, write = os.pipe()
    with os.fdopen(read, "rb") as file, os.fdopen(write, "wb", buffering=0) as end:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(file))
        yield end


def test_answers_come_before_the_next_line_does(model, tmp_path, monkeypatch):
    """Through a pipe that stays open, as of `tail -f`; were anything held back, this would hang."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)

    def answer():
        try:
            run(input="-", output=fifo)
        finally:  # should it have failed before it wrote, there is nothing to wait for
            with contextlib.suppress(OSError):
                os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))

    with piped(monkeypatch) as end:
        thread = threading.Thread(target=answer)
        thread.start()
        with open(fifo, encoding="utf-8") as answers:
            end.write(b"tree\n")
            assert answers.readline() == "0 TREE\n"
            end.write(b"\nbird\nhal")
            assert answers.readline() == "\n"
            assert answers.readline() == "1 BIRD\n"
            end.write(b"f")
            end.close()
            assert answers.read() == "2 HALF\n"
        thread.join()
    assert fifo.is_fifo()


class Chunks:
    """A file of which each reading gives the next chunk."""

    def __init__(self, chunks):
        self.chunks = [chunk for chunk in chunks if chunk]

    def read1(self, _):
        return self.chunks.pop(0) if self.chunks else b""


@given(
    chunks=st.lists(st.text("ab\n\r\x85é", max_size=6).map(str.encode), max_size=6),
    cuts=st.lists(st.booleans(), min_size=8, max_size=8),
    size=st.integers(1, 4),
)
def test_batches_are_the_lines_however_they_come(chunks, cuts, size):
    class Lines(incoming.Incoming):
        def _more(self):
            return cuts[len(self.file.chunks)]

    lines = Lines(Chunks(chunks), "lines", objects=False)
    batches = list(lines.batches(size, ("text",)))
    assert all(0 < len(batch) <= size for batch in batches)
    # Python's own splitting of a whole file.
    whole = io.TextIOWrapper(io.BytesIO(b"".join(chunks)), "utf-8", newline="\n")
    expected = [line.removesuffix("\n").removesuffix("\r") for line in whole]
    expected = [line if line.strip() else "" for line in expected]
    assert [text for batch in batches for (text,) in batch] == expected


def test_texts_from_nothing(texts_model, tmp_path):
    out = tmp_path / "out"
    run(output=out)
    assert out.read_text().splitlines() == [f"{i} NOTHING" for i in range(8)]
    run(num=3, seed=5, steps=7, sampler="ddim", batch_size=2, format="jsonl", output=out)
    assert tiny_lib.read_rows(out) == [{"text": f"{i} NOTHING"} for i in range(3)]
    how = {"seed": 5, "steps": 7, "sampler": "ddim", "guidance": None, "best_of": 1}
    assert texts_model.asked[-1] == how


def test_what_the_modes_ask_for(tiny, monkeypatch, tmp_path):
    path, out = tmp_path / "rows", tmp_path / "out.jsonl"
    tiny_lib.write_rows(path, [{"source": "a king", "text": "the tree"}])
    how = {"seed": 0, "first": 0, "steps": None, "sampler": None, "guidance": 2.0}
    for conditional in (True, False):
        stand_in = StandIn(tiny, conditional=conditional)
        monkeypatch.setattr(cosmos_jax, "load", lambda name, distilled, m=stand_in: m)
        sources = {"sources": ["a king"]} if conditional else {}
        run(input=path, output=out, edit=0, guidance=2)
        assert stand_in.asked.pop() == {"strength": 0.0, **how, **sources}
        run("--infill", input=path, output=out, guidance=2)
        assert stand_in.asked.pop() == {**how, **sources}
        run("--reconstruct", input=path, output=out)
        assert tiny_lib.read_rows(out) == [{"source": "the tree", "text": "THE TREE"}]
    run("--reconstruct", input=path, output=out, format="text")
    assert out.read_text() == "THE TREE\n"


def test_a_change_of_a_conditional_text_needs_its_source(model, tmp_path):
    (tmp_path / "texts").write_text("the tree\n")
    with pytest.raises(UserError, match="texts:1: needs a JSON object with the text 'text' and 's"):
        run("--infill", input=tmp_path / "texts", output=tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model="], "--model=NAME is missing"),
        (["--edit=1.5", "--input=-"], "--edit=1.5: from 0"),
        (["--edit=nan", "--input=-"], "--edit=nan: from 0"),
        (["--edit=0", "--infill", "--input=-"], "--edit and --infill: choose one"),
        (["--infill"], "--infill needs texts: give --input=FILE"),
        (["--num=3", "--input=-"], "--num says nothing with --input"),
        (["--reconstruct", "--steps=3", "--input=-"], "--steps says nothing with --reconstruct"),
        (["--input=missing/file"], "missing/file: cannot be read: No such file"),
        (["--input=."], ".: cannot be read: Is a directory"),
        (["--output=missing/file"], "--output=missing/file: there is no folder missing"),
    ],
)
def test_refused_before_a_model_is_loaded(arguments, message, monkeypatch):
    monkeypatch.delattr(cosmos_jax, "__getattr__")
    monkeypatch.delitem(cosmos_jax.__dict__, "load", raising=False)
    with pytest.raises(UserError) as refused:
        run(*arguments)
    assert str(refused.value).startswith(message)


def test_a_model_that_does_not_go_with_the_input(model, tiny, tmp_path):
    (tmp_path / "sources").write_text("tree\n")
    with pytest.raises(UserError, match="MODEL writes a text for a source: give --input"):
        run()
    model.conditional = False
    with pytest.raises(UserError, match="MODEL takes no sources: leave out --input, or give --ed"):
        run(input=tmp_path / "sources")


def test_an_interrupt_keeps_what_was_written(model, tmp_path, monkeypatch, capsys, caplog):
    stream = model.stream

    def interrupted(*, first, **how):
        if first == 2:
            raise KeyboardInterrupt
        return stream(first=first, **how)

    monkeypatch.setattr(model, "stream", interrupted)
    (tmp_path / "sources").write_text("tree\n\nbird\nking\n")
    out = tmp_path / "out"
    out.write_text("of another run")
    with pytest.raises(SystemExit) as stopped:
        run(input=tmp_path / "sources", output=out, batch_size=3)
    assert stopped.value.code == 130
    assert out.read_text() == "of another run"
    assert (tmp_path / ".out.partial").read_text() == "0 TREE\n\n1 BIRD\n"
    assert f"what there was until then is in {tmp_path}/.out.partial" in caplog.text
    assert "1 of 4 lines were without a token" in caplog.text


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_a_full_disk_is_one_line(texts_model):
    with pytest.raises(UserError, match="--output=/dev/full: cannot be written: No space left"):
        run(output="/dev/full")


def command(*arguments, **how):
    return subprocess.Popen(
        [sys.executable, "-m", "cosmos_jax.generate", *arguments],
        **{"cwd": ROOT, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **how},
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--inptu=FILE", "Unknown command line flag 'inptu'. Did you mean: input ?"),
        ("--num=0", "flag --num=0: Expected integer in the range"),
        ("runs/xsum", "unexpected argument 'runs/xsum'; flags begin with --"),
    ],
)
def test_a_slip_is_one_line(argument, message):
    out, errors = command("--model=MODEL", argument).communicate(timeout=300)
    assert out == ""
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1


def test_a_closed_pipe_is_the_end(finished):
    """As of `| head -1`."""
    process = command(f"--model={finished}", "--num=100000", "--batch_size=1")
    assert set(process.stdout.readline().split()) <= {*tiny_lib.WORDS}
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=300) == 0
    assert errors.count("\n") == 1, errors
    assert errors.endswith(
        f" {finished}: cosmos, texts of up to 12 tokens, 4 latents of width 32, "
        "3 steps of euler_sde\n"
    )


def test_texts_do_not_depend_on_how_lines_come(finished_pairs, tmp_path, monkeypatch):
    """With a model, and against the library asked for all of them at once."""
    model = cosmos_jax.load(finished_pairs)
    monkeypatch.setattr(cosmos_jax, "load", lambda name, distilled: model)
    rows = tiny_lib.read_rows(finished_pairs / "samples.jsonl")[:4]
    for row in rows:
        row["text"] = f"the [MASK] {row['text']}"
    texts, sources = [row["text"] for row in rows], [row["source"] for row in rows]
    rows.insert(2, {"source": "", "text": ""})
    path, out = tiny_lib.write_rows(tmp_path / "rows", rows), tmp_path / "out"
    for arguments, expected in (
        ([], model.generate(sources=sources, seed=3)),
        (["--edit=0.9"], model.edit(texts, 0.9, sources=sources, seed=3)),
        (["--infill"], model.infill(texts, sources=sources, seed=3)),
    ):
        run(*arguments, input=path, output=out, batch_size=2, seed=3)
        assert out.read_text().splitlines() == [*expected[:2], "", *expected[2:]]
