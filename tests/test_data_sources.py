"""Data sets as a run loads them: prepared once, found again, nothing half-written."""

import gzip
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from cosmos_jax.data import builders, jsonl, sources, text_builder
from cosmos_jax.data.sources import Row
from cosmos_jax.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "prepared"


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def texts(count, prefix="text"):
    return [{"text": f"{prefix} {i}"} for i in range(count)]


def all_rows(rows):
    return [rows[i] for i in range(len(rows))]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("embeded", r"no data source 'embeded', did you mean embedded\?"),
        ("c4", r"no data source 'c4' \(.*rocstories:PATH.*wikipedia\)"),
        ("jsonl", "needs a path: config.data.source=jsonl:PATH"),
        ("squad:x", "takes no path"),
        ("jsonl:/not/there", "/not/there: no such file or directory"),
    ],
)
def test_unknown_sources(source, message):
    with pytest.raises(UserError, match=message):
        sources.load(source)


def test_the_embedded_corpus(directory):
    data = sources.load("embedded", str(directory))
    assert not data.conditional
    assert (len(data.train), len(data.valid), len(data.test)) == (30_570, 1_387, 1_386)
    assert data.train[0].text.startswith("In the beginning God created")
    # Against the file, read without any of our code.
    with gzip.open(builders.CORPUS / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        expected = [json.loads(line)["text"] for line in file]
    assert [row.text for row in all_rows(data.valid)] == expected
    assert sum(file.stat().st_size for file in builders.CORPUS.iterdir()) < 3.5e6


def test_short_sentences_of_the_embedded_corpus(directory):
    data = sources.load("sentences", str(directory))
    assert not data.conditional
    assert 20_000 < len(data.train) < 22_000
    assert 900 < len(data.valid) < 1_100
    passages = sources.load("embedded", str(directory)).train
    whole = " ".join(passages[i].text for i in range(50)).replace('"', "")
    for i in range(20):
        assert data.train[i].text in whole
        assert 4 <= len(data.train[i].text.split()) <= 12


def test_one_file_is_split_into_three(tmp_path, directory):
    path = write_jsonl(tmp_path / "mine.jsonl", texts(200))
    data = sources.load(f"jsonl:{path}", str(directory))
    assert (len(data.train), len(data.valid), len(data.test)) == (192, 4, 4)
    together = [row.text for part in (data.train, data.valid, data.test) for row in all_rows(part)]
    assert sorted(together) == sorted(row["text"] for row in texts(200))
    order = [int(row.text.split()[1]) for row in all_rows(data.train)]
    assert order == sorted(order)


@pytest.mark.parametrize("count", [1, 2])
def test_too_few_rows(tmp_path, directory, count):
    path = write_jsonl(tmp_path / "mine.jsonl", texts(count))
    with pytest.raises(UserError, match=f"{path}: {count} different texts, but at least 3"):
        sources.load(f"jsonl:{path}", str(directory))


def test_conditional_rows(tmp_path, directory):
    rows = [{"source": f"Quelle {i}", "target": f"zîel {i}"} for i in range(3)]
    data = sources.load(f"jsonl:{write_jsonl(tmp_path / 'mine.jsonl', rows)}", str(directory))
    assert data.conditional
    found = {row for part in (data.train, data.valid, data.test) for row in all_rows(part)}
    assert found == {Row(f"zîel {i}", f"Quelle {i}") for i in range(3)}


def test_directories(tmp_path, directory):
    data_dir = tmp_path / "set"
    data_dir.mkdir()
    load = lambda: sources.load(f"jsonl:{data_dir}", str(directory))  # noqa: E731
    write_jsonl(data_dir / "train.jsonl", texts(100))
    data = load()
    assert (len(data.train), len(data.valid), len(data.test)) == (96, 2, 2)

    write_jsonl(data_dir / "test.jsonl", texts(5, "other"))
    data = load()
    assert (len(data.train), len(data.valid), len(data.test)) == (98, 2, 5)
    assert data.test[0] == Row("other 0")

    (data_dir / "test.jsonl").rename(data_dir / "validation.jsonl")
    data = load()
    assert (len(data.train), len(data.valid)) == (100, 5)
    assert all_rows(data.test) == all_rows(data.valid)

    write_jsonl(data_dir / "test.jsonl", [{"source": "a", "target": "b"}])
    with pytest.raises(UserError, match=r"test.jsonl: its rows have a source, unlike"):
        load()


def test_second_load_reuses_what_the_first_prepared(tmp_path, directory, monkeypatch):
    path = write_jsonl(tmp_path / "mine.jsonl", texts(50))
    first = sources.load(f"jsonl:{path}", str(directory))

    def no_reading(path):
        raise AssertionError(f"{path} was read again")

    monkeypatch.setattr(jsonl, "rows", no_reading)
    second = sources.load(f"jsonl:{path}", str(directory))
    assert second.fingerprint == first.fingerprint
    assert all_rows(second.train) == all_rows(first.train)


def test_changed_file_is_another_data_set(tmp_path, directory):
    path = write_jsonl(tmp_path / "mine.jsonl", texts(50))
    first = sources.load(f"jsonl:{path}", str(directory))
    write_jsonl(path, texts(51))
    second = sources.load(f"jsonl:{path}", str(directory))
    assert first.fingerprint != second.fingerprint
    assert len(second.train) + len(second.valid) + len(second.test) == 51
    assert len(first.train) + len(first.valid) + len(first.test) == 50


def test_bad_row_leaves_nothing_behind(tmp_path, directory):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n{"tekst": "d"}\n')
    with pytest.raises(UserError, match=r"mine.jsonl:4: .*fields found: 'tekst'"):
        sources.load(f"jsonl:{path}", str(directory))
    assert not directory.exists()


def test_directory_that_cannot_be_written(tmp_path):
    path = write_jsonl(tmp_path / "mine.jsonl", texts(5))
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write prepared data .*config.data.directory"):
        sources.load(f"jsonl:{path}", str(tmp_path / "file"))


def test_preparing_is_silent(tmp_path, directory, capfd):
    path = write_jsonl(tmp_path / "mine.jsonl", texts(5))
    sources.load(f"jsonl:{path}", str(directory))
    captured = capfd.readouterr()
    assert captured.out == ""
    assert "WARNING" not in captured.err


SLOW = """
import sys, time
from cosmos_jax.data import builders, sources
pieces = builders.Jsonl.pieces
def slow(self, row):
    print("writing", file=sys.stderr, flush=True)
    time.sleep(float(sys.argv[3]))
    return pieces(self, row)
builders.Jsonl.pieces = slow
print(len(sources.load(sys.argv[1], sys.argv[2]).train))
"""


def start_slow(source, directory, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, source, str(directory), str(seconds)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_killed_preparation_is_started_over(tmp_path, directory):
    source = f"jsonl:{write_jsonl(tmp_path / 'mine.jsonl', texts(50))}"
    with start_slow(source, directory, 60) as process:
        first_line = process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    assert first_line == "writing\n"
    assert any("incomplete" in path.name for path in directory.rglob("*"))
    assert len(sources.load(source, str(directory)).train) == 48
    assert not any("incomplete" in path.name for path in directory.rglob("*"))


def test_two_processes_prepare_once(tmp_path, directory):
    source = f"jsonl:{write_jsonl(tmp_path / 'mine.jsonl', texts(20))}"
    with start_slow(source, directory, 0.1) as first, start_slow(source, directory, 0.1) as second:
        outputs = [process.communicate(timeout=60) for process in (first, second)]
    assert [out for out, _ in outputs] == ["18\n", "18\n"]
    assert sorted(err.count("writing") for _, err in outputs) == [0, 20]


def test_rows_beyond_one_shard(tmp_path, directory, monkeypatch):
    monkeypatch.setattr(text_builder, "_ROWS_PER_SHARD", 7)
    path = write_jsonl(tmp_path / "mine.jsonl", texts(100))
    data = sources.load(f"jsonl:{path}", str(directory))
    assert len(list(directory.rglob("*train*array_record*"))) == 14
    numbers = [int(row.text.split()[1]) for row in all_rows(data.train)]
    assert len(numbers) == 96
    assert numbers == sorted(numbers)
    assert data.train.__getitems__([95, 0, 50]) == [data.train[95], data.train[0], data.train[50]]
    with pytest.raises(IndexError):
        data.train[96]


def test_published_tables(tmp_path, directory):
    header = "storyid,storytitle,sentence1,sentence2,sentence3,sentence4,sentence5\n"
    stories = tmp_path / "roc"
    stories.mkdir()
    for year in (2016, 2017):
        (stories / f"{year}.csv").write_text(
            header + "".join(f"{i},T,{year} {i}.,B.,C.,D.,E.\n" for i in range(50))
        )
    data = sources.load(f"rocstories:{stories}", str(directory))
    assert (len(data.train), len(data.valid), len(data.test)) == (90, 5, 5)
    assert data.train[0].text.endswith(". B. C. D. E.")

    table = tmp_path / "paradetox.tsv"
    table.write_text(
        "toxic\tneutral1\tneutral2\tneutral3\n"
        + "".join(f"bad {i}\tok {i}\tfine {i}\t\n" for i in range(100))
    )
    data = sources.load(f"paradetox:{table}", str(directory))
    assert data.conditional
    assert (len(data.train), len(data.valid), len(data.test)) == (192, 4, 4)


def test_documents_are_cut_and_stay_in_one_split(tmp_path, directory):
    shards = tmp_path / "owt" / "part"
    shards.mkdir(parents=True)
    for i in range(10):
        (shards / f"{i}.txt").write_text(f"Number {i} is a text. " * 100)
    data = sources.load(f"openwebtext:{shards.parent}", str(directory))
    # 500 words in sentences of 5: 380 and 120.
    assert (len(data.train), len(data.valid), len(data.test)) == (16, 2, 2)
    assert [len(data.valid[i].text.split()) for i in range(2)] == [380, 120]
    assert data.valid[0].text.split()[1] == data.valid[1].text.split()[1]


class SquadStandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """TFDS's squad without its downloads: every fourth question has no answer."""

    name = "squad_stand_in"
    VERSION = tfds.core.Version("3.0.0")
    code_path = None

    def _info(self):
        answers = {"text": tfds.features.Text(), "answer_start": np.int32}
        features = tfds.features.FeaturesDict(
            {
                "context": tfds.features.Text(),
                "question": tfds.features.Text(),
                "is_impossible": np.bool_,
                "answers": tfds.features.Sequence(answers),
            }
        )
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(200), "validation": self._generate_examples(40)}

    def _generate_examples(self, count):
        for i in range(count):
            answers = [] if i % 4 == 0 else [f"answer {i}", "another"]
            yield (
                i,
                {
                    "context": f"context {i}",
                    "question": f" question {i} ",
                    "is_impossible": not answers,
                    "answers": {"text": answers, "answer_start": [0] * len(answers)},
                },
            )


def test_squad_keeps_the_answerable(directory, monkeypatch):
    monkeypatch.setattr(
        builders.Squad, "tfds_builder", lambda self, data_dir: SquadStandIn(data_dir=data_dir)
    )
    data = sources.load("squad", str(directory))
    assert data.conditional
    assert len(data.train) + len(data.valid) == 150
    assert 1 <= len(data.valid) <= 4
    assert len(data.test) == 30
    rows = all_rows(data.train) + all_rows(data.valid)
    numbers = {int(row.text.split()[1]) for row in rows}
    assert numbers == {i for i in range(200) if i % 4}
    for row in rows:
        i = int(row.text.split()[1])
        assert row == Row(f"question {i}", f"answer {i} [SEP] context {i}")
    assert sources.load("squad", str(directory)).fingerprint == data.fingerprint


class ArticlesStandIn(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    name = "articles_stand_in"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None

    def _info(self):
        text = tfds.features.Text()
        return tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict({"title": text, "text": text})
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for i in range(200):
            text = "" if i == 7 else f"Article {i} has words. " * 40
            yield i, {"title": "T", "text": text}


def test_wikipedia_is_cut_into_pieces(directory, monkeypatch):
    monkeypatch.setattr(
        builders.Wikipedia,
        "tfds_builder",
        lambda self, data_dir: ArticlesStandIn(data_dir=data_dir),
    )
    data = sources.load("wikipedia", str(directory))
    # 160 words in sentences of 4: 128 and 32; the empty article is dropped.
    assert len(data.train) + len(data.valid) + len(data.test) == 398
    assert {len(row.text.split()) for row in all_rows(data.train)} == {128, 32}


def test_newest_english_wikipedia(tmp_path):
    builder = builders.Wikipedia.tfds_builder(None, str(tmp_path))
    assert builder.builder_config.name == "20230601.en"


@pytest.mark.parametrize("error", [AssertionError("put the file\nthere"), ImportError("no tf")])
def test_set_that_tfds_cannot_prepare(directory, monkeypatch, error):
    from tensorflow_datasets.summarization.xsum import Xsum

    def fail(self, **kwargs):
        raise error

    monkeypatch.setattr(Xsum, "download_and_prepare", fail)
    first_line = str(error).splitlines()[0]
    with pytest.raises(UserError, match=f"xsum/1.1.0 in .*: {first_line} .*tar.gz") as caught:
        sources.load("xsum", str(directory))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "sizes", "conditional"),
    [
        ("rocstories", (4_012, 379, 609), False),
        ("paradetox", (18_766, 1_000, 671), True),
        ("squad_question_generation", (8_883, 521, 1_166), True),
        ("debian_synopses", (34_067, 1_485, 1_518), True),
    ],
)
def test_real_sets(directory, name, sizes, conditional):
    path = os.environ.get("COSMOS_TEST_DATA")
    if not path:
        pytest.skip("COSMOS_TEST_DATA names no directory with real data sets")
    data = sources.load(f"jsonl:{path}/{name}", str(directory))
    assert (len(data.train), len(data.valid), len(data.test)) == sizes
    assert data.conditional == conditional
