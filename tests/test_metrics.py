"""metrics.jsonl: what a resumed run takes back, and what a kill leaves behind."""

import io
import json

from cosmos_jax import metrics


def write(workdir, stage, start, steps):
    writer = metrics.MetricWriter(workdir, stage, start)
    for step in steps:
        writer.write(step, {"loss": step / 4})
    writer.close()


def lines(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_line_a_step(tmp_path):
    write(tmp_path, "autoencoder", 0, [1, 2])
    expected = [{"stage": "autoencoder", "step": s, "loss": s / 4} for s in (1, 2)]
    assert lines(tmp_path) == expected
    assert metrics.read(tmp_path) == expected


def test_later_lines_of_the_same_stage_are_taken_back(tmp_path):
    write(tmp_path, "autoencoder", 0, [5, 6])
    write(tmp_path, "diffusion", 0, [1, 2, 3])
    write(tmp_path, "diffusion", 1, [2])
    found = [(line["stage"], line["step"]) for line in lines(tmp_path)]
    assert found == [("autoencoder", 5), ("autoencoder", 6), ("diffusion", 1), ("diffusion", 2)]
    assert metrics.read(tmp_path, "diffusion") == lines(tmp_path)[2:]


def test_a_line_cut_off_by_a_kill_is_dropped(tmp_path):
    write(tmp_path, "autoencoder", 0, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text()[:-9])
    assert [entry["step"] for entry in metrics.read(tmp_path)] == [1]
    write(tmp_path, "autoencoder", 1, [2, 3])
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]


def test_nothing_yet(tmp_path):
    assert metrics.read(tmp_path) == []


def test_other_processes_write_nothing(tmp_path):
    writer = metrics.MetricWriter(tmp_path, "autoencoder", 0, active=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_progress_counts_from_where_it_goes_on(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    bar = metrics.progress(10, "autoencoder", start=4)
    assert list(metrics.counted(iter("abc"), bar)) == ["a", "b", "c"]
    assert bar.n == 7
    assert stream.getvalue().startswith("\rautoencoder:  40%")


def test_reports_take_at_most_a_tenth_of_the_time(monkeypatch, tmp_path):
    clock, written = [0.0], []

    def write(workdir):
        written.append((workdir, clock[0]))
        clock[0] += 2

    monkeypatch.setattr(metrics, "write_report", write)
    monkeypatch.setattr(metrics.time, "monotonic", lambda: clock[0])
    report = metrics.report_writer(tmp_path)
    for second in range(100, 160):
        clock[0] = second
        report()
    assert written == [(tmp_path, second) for second in (100, 122, 144)]
