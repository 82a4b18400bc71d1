"""Files of every format, right and wrong, and how rows are held out."""

import gzip
import itertools
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cosmos_jax.data import documents, files, jsonl, tables
from cosmos_jax.data.holding_out import HoldOut
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError


def jsonl_of(tmp_path, content):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_jsonl_rows_of_both_kinds(tmp_path, pack):
    texts = jsonl_of(tmp_path, pack('\ufeff{"text": "é", "origin": 3}\r\n\n{"text": "b"}'.encode()))
    assert list(jsonl.rows(texts)) == [Row("é"), Row("b")]
    pairs = jsonl_of(tmp_path, pack(b'{"source": "a", "target": "b"}\n  \n'))
    assert list(jsonl.rows(pairs)) == [Row("b", "a")]


def test_text_makes_a_row_unconditional_whatever_else_it_has(tmp_path):
    path = jsonl_of(tmp_path, '{"text": "a", "source": "where it is from", "target": "b"}\n')
    assert list(jsonl.rows(path)) == [Row("a")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "\xff"}', r"not UTF-8 \(byte 11 of the line"),
        (b'{"text": "a"', "not valid JSON"),
        (b"{} {}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'["a"]', r"must be a JSON object, this is \[\"a\"\]"),
        (b'{"txt": "a", "n": 1}', "fields found: 'txt', 'n'"),
        (b"{}", "fields found: none"),
        (b'{"source": "a"}', "needs 'text', or 'source' and 'target'"),
        (b'{"text": 3}', "'text' must be a string, not 3"),
        (b'{"text": null}', "'text' must be a string, not null"),
        (b'{"text": ""}', "'text' has no text"),
        (b'{"text": " \\n\\u200b\\u0000\\u00a0\\ufffd"}', "'text' has no text"),
        (b'{"text": "\\ud800a"}', "surrogate"),
        (b'{"source": "a", "target": "b"}', "has 'source' and 'target', the first has 'text'"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = jsonl_of(tmp_path, b'{"text": "fine"}\n\n' + line + b'\n{"text": "fine"}\n')
    with pytest.raises(UserError, match=message) as caught:
        list(jsonl.rows(path))
    assert str(caught.value).startswith(f"{path}:3: ")
    assert "\n" not in str(caught.value)


def test_blank_source_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"rows.jsonl:1: 'source' has no text"):
        list(jsonl.rows(jsonl_of(tmp_path, '{"source": "\\t", "target": "b"}')))


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"", mtime=0), b"\xef\xbb\xbf"])
def test_file_without_rows(tmp_path, content):
    with pytest.raises(UserError, match="holds no rows"):
        list(jsonl.rows(jsonl_of(tmp_path, content)))


def test_damaged_gzip_and_missing_files(tmp_path):
    # Incompressible text, so that half of the file unpacks to some of the lines.
    lines = "".join(f'{{"text": "{i * 2654435761 % 2**32:x}"}}\n' for i in range(20_000))
    path = jsonl_of(tmp_path, gzip.compress(lines.encode())[:40_000])
    with pytest.raises(UserError, match="damaged gzip"):
        list(jsonl.rows(path))
    with pytest.raises(UserError, match=r"gone.jsonl: cannot be read: No such file"):
        list(jsonl.rows(tmp_path / "gone.jsonl"))
    with pytest.raises(UserError, match=r"gone: no such file"):
        files.existing(str(tmp_path / "gone"))


def test_directory_of_splits(tmp_path):
    for name in ("train.jsonl.gz", "dev.jsonl", "notes.txt"):
        (tmp_path / name).touch()
    assert files.split_files(tmp_path, jsonl.SUFFIXES) == {
        "train": [tmp_path / "train.jsonl.gz"],
        "valid": [tmp_path / "dev.jsonl"],
    }
    (tmp_path / "validation.jsonl").touch()
    with pytest.raises(UserError, match=r"validation.jsonl and dev.jsonl are both valid"):
        files.split_files(tmp_path, jsonl.SUFFIXES)
    (tmp_path / "validation.jsonl").unlink()
    (tmp_path / "train.jsonl.gz").unlink()
    with pytest.raises(UserError, match=r"has no train.jsonl or train.jsonl.gz"):
        files.split_files(tmp_path, jsonl.SUFFIXES)


def test_fingerprint_follows_content_and_split_not_names(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    a.write_text("one")
    b.write_text("one")
    first = files.fingerprint(["x"], [("train", a)])
    assert re.fullmatch("[0-9a-f]{64}", first)
    assert files.fingerprint(["x"], [("train", b)]) == first
    assert files.fingerprint(["y"], [("train", a)]) != first
    assert files.fingerprint(["x"], [("valid", a)]) != first
    b.write_text("two")
    assert files.fingerprint(["x"], [("train", b)]) != first


STORIES = "storyid,storytitle," + ",".join(f"sentence{i}" for i in range(1, 6))


def test_rocstories(tmp_path):
    path = tmp_path / "stories.csv"
    path.write_text(f'{STORIES}\nid1,T,"She said, ""no"".",B.,C.,D.,E.\nid2,U,F.,G.,H.,I.,J.\n')
    assert list(tables.rocstories(path)) == [
        Row('She said, "no". B. C. D. E.'),
        Row("F. G. H. I. J."),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "needs the columns sentence1.*columns found: none"),
        ("storyid,text\n1,a\n", "columns found: storyid, text"),
        (f"{STORIES}\n", "holds no rows"),
        (f"{STORIES}\n1,T,A,B,C,D,E\n2,T,A\n", ":3: 3 fields, the header has 7"),
        (f"{STORIES}\n1,T,A,B,,D,E\n", ":2: column 'sentence3' has no text"),
        (f'{STORIES}\n1,T,"A,B,C,D,E\n', ":2: unexpected end of data"),
    ],
)
def test_bad_rocstories(tmp_path, content, message):
    path = tmp_path / "stories.csv"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}.*{message}"):
        list(tables.rocstories(path))


def test_paradetox_has_a_row_for_each_neutral_version(tmp_path):
    path = tmp_path / "paradetox.tsv"
    path.write_text("toxic\tneutral1\tneutral2\tneutral3\nbad\tok\tfine\t\nworse\tgood\t\t\n")
    assert list(tables.paradetox(path)) == [
        Row("ok", "bad"),
        Row("fine", "bad"),
        Row("good", "worse"),
    ]
    path.write_text("en_toxic_comment\ten_neutral_comment\nbad\tok\n")
    assert list(tables.paradetox(path)) == [Row("ok", "bad")]
    path.write_text("toxic\tneutral1\nbad\t\n")
    with pytest.raises(UserError, match=r":2: no column from 'neutral1' on has text"):
        list(tables.paradetox(path))
    path.write_text("a\tb\nbad\tok\n")
    with pytest.raises(UserError, match="columns found: a, b"):
        list(tables.paradetox(path))


def test_documents(tmp_path):
    text, shard = tmp_path / "a.txt.gz", tmp_path / "b.jsonl"
    text.write_bytes(gzip.compress(b"One.\nTwo."))
    shard.write_text('{"text": "a"}\n{"text": "b"}\n')
    found = files.found_files(tmp_path, documents.SUFFIXES)
    assert [list(documents.documents(file)) for file in found] == [
        [Row("One.\nTwo.")],
        [Row("a"), Row("b")],
    ]
    shard.write_text('{"source": "a", "target": "b"}\n')
    with pytest.raises(UserError, match="documents need 'text'"):
        list(documents.documents(shard))
    text.write_bytes(b" \n")
    with pytest.raises(UserError, match="has no text"):
        list(documents.documents(text))
    with pytest.raises(UserError, match=r"has no \*.csv"):
        files.found_files(tmp_path, (".csv",))


def test_pieces_end_with_sentences_or_paragraphs():
    text = 'A b c. D "e."  F g\n\nh i\nj k l m n o'
    assert list(documents.pieces(text, 4)) == ["A b c.", 'D "e." F g', "h i j k", "l m n o"]
    assert list(documents.pieces(text, 6)) == ['A b c. D "e."', "F g", "h i j k l m", "n o"]
    assert list(documents.pieces(" \n\n ", 4)) == []


@given(st.text(alphabet="ab.!\n ", max_size=200), st.integers(1, 12))
def test_pieces_keep_all_words_within_the_limit(text, limit):
    pieces = list(documents.pieces(text, limit))
    assert " ".join(pieces) == " ".join(text.split())
    assert all(0 < len(piece.split()) <= limit for piece in pieces)


def split_up(rows, names=("valid", "test"), fraction=0.02):
    hold_out = HoldOut(names, fraction)
    for row in rows:
        hold_out.add(row)
    counts = hold_out.decide("here")
    splits = {name: [] for name in counts}
    for row in rows:
        splits[hold_out.split(row)].append(row)
    assert counts == {name: len(rows) for name, rows in splits.items()}
    return splits


@given(st.lists(st.text("abcdef", min_size=1, max_size=2), min_size=3, max_size=200))
def test_held_out_texts_are_in_no_other_split(texts):
    rows = [Row(text) for text in texts]
    if len(set(texts)) < 3:
        with pytest.raises(UserError, match=r"here: . different texts, but at least 3"):
            split_up(rows)
        return
    splits = split_up(rows)
    assert all(splits.values())
    for a, b in itertools.combinations(splits.values(), 2):
        assert not set(a) & set(b)


def test_two_percent_are_held_out():
    splits = split_up([Row(f"text {i}") for i in range(5000)])
    assert {name: len(rows) for name, rows in splits.items()} == {
        "valid": 100,
        "test": 100,
        "train": 4800,
    }


def test_one_missing_split_takes_two_texts():
    assert {n: len(r) for n, r in split_up([Row("a"), Row("b")], ("valid",)).items()} == {
        "valid": 1,
        "train": 1,
    }


def test_rows_of_one_source_stay_together_unless_sources_are_few():
    many = split_up([Row(f"{i} {j}", f"source {i}") for i in range(200) for j in range(3)])
    assert len(many["valid"]) == len(many["test"]) == 4 * 3
    assert len({row.source for row in many["valid"]}) == 4
    labels = split_up([Row(f"text {i}", f"label {i % 2}") for i in range(1000)])
    assert len(labels["valid"]) == len(labels["test"]) == 20


@given(st.text())
def test_jsonl_accepts_exactly_texts_with_something_to_see(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    if any(c.isprintable() and not c.isspace() and c != "\ufffd" for c in text):
        assert list(jsonl.rows(path)) == [Row(text)]
    elif not text.strip():
        with pytest.raises(UserError, match="has no text"):
            list(jsonl.rows(path))


def test_sentences():
    text = (
        'of what was before. He said, "Mr. Knightley is here." Yes. "What do you want?" 3 For the '
        "Chief Musician. She had hoped for a very great deal more than this, and got it. Then she "
        "went"
    )
    assert list(documents.sentences(text, 3, 12)) == [
        "He said, Mr. Knightley is here.",
        "What do you want?",
    ]
    assert list(documents.sentences(text, 1, 4)) == ["Yes.", "What do you want?"]
