"""How long a stage worked, and on what; nothing where nothing was done."""

import pytest
import tiny as tiny_lib

from cosmos_jax import timing, workdir


def test_a_line_for_each_time_a_stage_got_on(tmp_path):
    with timing.recorded(tmp_path, "autoencoder"):
        (tmp_path / "autoencoder" / "20").mkdir(parents=True)
        (tmp_path / "autoencoder" / "30.orbax-checkpoint-tmp").mkdir()
    with timing.recorded(tmp_path, "autoencoder"):
        pass  # finished before
    with pytest.raises(KeyError), timing.recorded(tmp_path, "autoencoder"):  # noqa: PT012
        (tmp_path / "autoencoder" / "40").mkdir()
        raise KeyError
    with timing.recorded(tmp_path, "generate"):
        (tmp_path / "samples.partial.jsonl").write_text("{}\n{}\n")
    with timing.recorded(tmp_path, "evaluate"):
        workdir.write_json(tmp_path / "evaluation.json", {"done": ["a", "b", "c"]})
    lines = tiny_lib.read_rows(tmp_path / "timing.jsonl")
    assert [(line["stage"], line["from"], line["to"]) for line in lines] == [
        ("autoencoder", 0, 20),
        ("autoencoder", 20, 40),
        ("generate", 0, 2),
        ("evaluate", 0, 3),
    ]
    for line in lines:
        assert 0 <= line["seconds"] < 60
        assert line["peak_memory_bytes"] > 2**20
        assert line["num_devices"] >= 1
