"""samples.jsonl: going on where a kill left it, and starting anew when the question changed."""

import itertools
import json
import shutil

import pytest
import tiny as tiny_lib

from cosmos_jax import distributed, evaluation
from cosmos_jax.baselines import MAKE_GENERATOR
from cosmos_jax.runner import open_run, run_stages
from cosmos_jax.samples import generate, read_samples
from cosmos_jax.scores import protocols


@pytest.fixture
def workdir(finished_pairs, tmp_path):
    """A copy of a conditional run whose texts may be changed."""
    return shutil.copytree(finished_pairs, tmp_path / "run")


def rewind(workdir, count, ending=""):
    """Leaves the first texts, marked as old, in the partial file, and what a kill left."""
    samples = tiny_lib.read_rows(workdir / "samples.jsonl")
    (workdir / "samples.jsonl").unlink()
    partial = workdir / "samples.partial.jsonl"
    tiny_lib.write_rows(partial, [{**sample, "text": "old"} for sample in samples[:count]])
    with partial.open("a") as file:
        file.write(ending)
    return samples


def generated(workdir):
    samples = tiny_lib.read_rows(workdir / "samples.jsonl")
    assert not (workdir / "samples.partial.jsonl").exists()
    return samples


@pytest.mark.parametrize(("kept", "ending"), [(4, ""), (5, ""), (4, '{"text": "tal'), (4, "{}\n{")])
def test_texts_that_are_there_are_kept(tiny, workdir, kept, ending):
    """In batches of 4: what goes beyond the first is made again."""
    expected = rewind(workdir, kept, ending)
    run_stages(tiny.pairs_config(), workdir, "generate")
    samples = generated(workdir)
    assert [sample["text"] for sample in samples[:4]] == ["old"] * 4
    assert samples[4:] == expected[4:]


def test_all_texts_were_there(tiny, workdir, monkeypatch):
    rewind(workdir, 6)
    monkeypatch.delitem(MAKE_GENERATOR, "cosmos")
    run_stages(tiny.pairs_config(), workdir, "generate")
    assert [sample["text"] for sample in generated(workdir)] == ["old"] * 6


@pytest.mark.parametrize("name", ["samples.jsonl", "samples.partial.jsonl"])
def test_texts_of_another_sampler_are_cleared_away(tiny, workdir, name):
    if name == "samples.partial.jsonl":
        rewind(workdir, 4)
    else:
        samples = tiny_lib.read_rows(workdir / name)
        tiny_lib.write_rows(workdir / name, [{**sample, "text": "old"} for sample in samples])
    run_stages(tiny.pairs_config(diffusion__answer="x0"), workdir, "generate")
    samples = generated(workdir)
    assert len(samples) == 6
    assert "old" not in {sample["text"] for sample in samples}
    identity = json.loads((workdir / "generation.json").read_text())["identity"]
    assert identity["answer"] == "x0"


def test_fewer_texts_are_the_first_ones(tiny, workdir, monkeypatch):
    expected = tiny_lib.read_rows(workdir / "samples.jsonl")
    monkeypatch.delitem(MAKE_GENERATOR, "cosmos")
    run_stages(tiny.pairs_config(generate__num_texts=3), workdir, "generate")
    assert generated(workdir) == expected[:3]


def test_a_stop_is_after_a_whole_batch(tiny, workdir, monkeypatch):
    expected = rewind(workdir, 0)
    monkeypatch.setattr(distributed, "preempted", lambda: True)
    with pytest.raises(distributed.Preempted, match="generate: 4 texts are saved"):
        run_stages(tiny.pairs_config(), workdir, "generate")
    assert tiny_lib.read_rows(workdir / "samples.partial.jsonl") == expected[:4]
    monkeypatch.undo()
    run_stages(tiny.pairs_config(), workdir, "generate")
    assert generated(workdir) == expected


def test_texts_depend_on_the_seed(tiny, workdir):
    expected = rewind(workdir, 0)
    (workdir / "samples.partial.jsonl").unlink()
    for seed, same in ((0, True), (1, False)):
        # Below the check of the config, as the run was trained with seed 0.
        generate(open_run(tiny.pairs_config(seed=seed), workdir))
        samples = generated(workdir)
        assert (samples == expected) is same
        assert [s["source"] for s in samples] == [s["source"] for s in expected]
        (workdir / "samples.jsonl").unlink()


def score_texts(run, workdir):
    """Values by name, and the texts they are of."""
    texts = evaluation.texts_of(run, read_samples(workdir / "samples.jsonl"))
    state = {"scores": {}, "done": [], "problems": {}}
    for name, piece in protocols.pieces(texts).items():
        state = protocols.compute(state, name, piece)
    return state, protocols.summary(texts)


def test_perfect_texts_get_full_marks(tiny, workdir):
    rows = tiny_lib.read_rows(tiny.pairs / "test.jsonl")[:6]
    samples = [
        {"text": row["target"], "source": row["source"], "reference": row["target"]} for row in rows
    ]
    tiny_lib.write_rows(workdir / "samples.jsonl", samples)
    run = tiny.run(workdir, tiny.pairs)
    state, _ = score_texts(run, workdir)
    values = {name: score["value"] for name, score in state["scores"].items()}
    assert values["rougeL"] == pytest.approx(100)
    assert values["bleu"] == pytest.approx(100)
    assert values["encoder_bertscore_f1"] == pytest.approx(1, abs=1e-5)
    for name in ("diversity", "unigram_entropy"):
        assert values[name] == state["scores"][name]["real"]
    assert values["memorisation"] == 0
    assert list(state["problems"]) == ["encoder_mauve"]
    train = tiny_lib.read_rows(tiny.pairs / "train.jsonl")
    for sample, row in zip(samples, train, strict=False):
        sample["text"] = row["target"]
    samples[0]["text"] = ""
    tiny_lib.write_rows(workdir / "samples.jsonl", samples)
    state, summary = score_texts(run, workdir)
    assert state["scores"]["memorisation"]["value"] == 1
    assert summary["generated"]["empty"] == 1
    assert state["scores"]["bleu"]["value"] < 10
    # What has no tokens has no BERTScore: that is said, not averaged away.
    assert "encoder_bertscore_f1" not in state["scores"]
    assert "text 1 is empty" in state["problems"]["encoder_bert_score"]


def test_evaluation_goes_on_after_the_last_batch_and_score(tiny, workdir, monkeypatch):
    """What is there is kept, even if it is wrong: nothing of it is computed again."""
    expected = json.loads((workdir / "evaluation.json").read_text())
    (workdir / "evaluation.json").unlink()
    config = tiny.pairs_config(evaluate__batch_size=4)
    calls = itertools.count(1)
    # Of 10 texts in 3 batches for each stage: one stop after 2, one after the second score.
    monkeypatch.setattr(distributed, "preempted", lambda: next(calls) in (2, 2 + 1 + 3 + 2))
    states = []
    for _ in range(2):
        with pytest.raises(distributed.Preempted, match="evaluate: what is done is saved"):
            run_stages(config, workdir, "evaluate")
        partial = workdir / "evaluation.partial.json"
        states.append(json.loads(partial.read_text()))
    assert states[0]["sums"]["texts"] == 8
    assert list(states[1]["held_out"]) == ["autoencoder", "diffusion"]
    # The first one is MAUVE, for which there are too few texts.
    assert states[1]["done"] == ["ngram_perplexity"]
    assert list(states[1]["problems"]) == ["encoder_mauve"]
    states[1]["scores"]["ngram_perplexity"]["value"] = -77
    partial.write_text(json.dumps(states[1]))
    run_stages(config, workdir, "evaluate")
    assert not partial.exists()
    found = json.loads((workdir / "evaluation.json").read_text())
    expected["scores"]["ngram_perplexity"]["value"] = -77
    for name, score in expected["scores"].items():
        assert found["scores"][name]["value"] == pytest.approx(score["value"], rel=1e-5)
    assert found["problems"] == expected["problems"]
    for stage, values in expected["held_out"].items():
        for name, value in values.items():
            assert found["held_out"][stage][name] == pytest.approx(value, rel=1e-5)


def test_a_problem_is_tried_again_and_nothing_else_is(workdir, tiny, monkeypatch):
    path = workdir / "evaluation.json"
    before = path.read_text()
    assert json.loads(before)["problems"]
    monkeypatch.delattr(evaluation, "held_out_sums")
    run_stages(tiny.pairs_config(), workdir, "evaluate")
    assert path.read_text() == before
    score = {"value": 0.5, "flags": {}, "signature": "", "protocol": "offline"}
    monkeypatch.setattr(protocols, "_entries", lambda *_: {"encoder_mauve": score})
    run_stages(tiny.pairs_config(), workdir, "evaluate")
    found = json.loads(path.read_text())
    assert found["problems"] == {}
    assert found["scores"].pop("encoder_mauve") == score
    assert found["scores"] == json.loads(before)["scores"]
