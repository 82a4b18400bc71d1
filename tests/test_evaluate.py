"""The command that scores any system's texts: what it reads, writes, names and refuses."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
import tiny as tiny_lib
import tiny_gpt2
from absl import flags
from absl.testing import flagsaver

from cosmos_jax import config as config_lib
from cosmos_jax import evaluate, language_model
from cosmos_jax.encoder import load as load_encoder
from cosmos_jax.errors import UserError
from cosmos_jax.models.gpt2 import Gpt2, Gpt2Config
from cosmos_jax.scores import mauve, ngrams, perplexity, protocols


@pytest.fixture
def score(tiny, tmp_path):
    """Runs the command with flags as keyword arguments; the JSON it writes."""

    def run(**arguments):
        out = tmp_path / "scores.json"
        given = {"encoder": str(tiny.encoder), "max_length": 12, "out": str(out), **arguments}
        argv = ["evaluate", *(f"--{name}={value}" for name, value in given.items())]
        with flagsaver.flagsaver():
            flags.FLAGS(argv)
            evaluate.main(argv[:1])
        return json.loads(out.read_text())

    return run


def sentences(count, seed=0, words=tiny_lib.WORDS):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size=rng.integers(4, 9))) for _ in range(count)]


def lines(path, texts):
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def test_plain_lines_and_objects_are_scored_alike(score, tmp_path, capsys):
    texts, references = sentences(60), sentences(80, seed=1)
    plain = score(
        texts=lines(tmp_path / "texts.txt", texts), references=lines(tmp_path / "r.txt", references)
    )
    table = capsys.readouterr().out
    objects = score(
        texts=tiny_lib.write_rows(tmp_path / "t.jsonl", [{"text": t, "other": 1} for t in texts]),
        references=tiny_lib.write_rows(tmp_path / "r.jsonl", [{"text": t} for t in references]),
    )
    assert plain == objects
    scores = plain["scores"]
    assert set(scores) == {
        *("encoder_mauve", "encoder_mauve_star", "ngram_perplexity"),
        *("diversity", "unigram_entropy"),
    }
    for name, entry in scores.items():
        assert entry["protocol"] == "offline"
        assert np.isfinite([entry["value"], entry["spread"]]).all()
        label = name.replace("_", " ")
        (row,) = [line for line in table.splitlines() if line.partition("  ")[0] == label]
        assert row.endswith("offline")
    assert scores["diversity"]["flags"]["block"] == 60
    assert plain["problems"] == {}
    assert plain["texts"]["generated"] == {
        "count": 60,
        "empty": 0,
        "sha256": hashlib.sha256("".join(f'"{t}"\n' for t in texts).encode()).hexdigest(),
    }
    assert plain["texts"]["references"]["count"] == 80
    assert plain["settings"]["words"] == "regex"
    assert "rouge-score" not in plain["versions"]
    assert plain["versions"]["jax"]


def test_samples_of_a_run_bring_their_references(score, tmp_path):
    texts = sentences(12)
    rows = [{"text": t, "source": "a", "reference": t} for t in texts]
    found = score(
        texts=tiny_lib.write_rows(tmp_path / "samples.jsonl", rows), protocol="rouge,bleu"
    )
    assert found["protocols"] == ["rouge", "bleu"]
    assert found["texts"]["paired"]
    assert found["scores"]["rougeL"]["value"] == pytest.approx(100)
    assert found["scores"]["bleu"]["value"] == pytest.approx(100)
    assert found["scores"]["rouge2"]["flags"]["stemming"] is True


def test_every_score_moves_the_right_way(score, tmp_path):
    """A bigram chain as the language: shuffled words, one text again and again, and copies."""
    rng = np.random.default_rng(0)
    words = list(tiny_lib.WORDS)
    after = {word: rng.choice(words, size=2) for word in words}

    def chain(count):
        texts = []
        for _ in range(count):
            text = [rng.choice(words)]
            while len(text) < 8:
                text.append(rng.choice(after[text[-1]]))
            texts.append(" ".join(text))
        return texts

    texts, references, training = chain(120), chain(120), chain(120)
    shuffled = [" ".join(rng.permutation(text.split())) for text in texts]
    files = {
        "references": lines(tmp_path / "references.txt", references),
        "training": lines(tmp_path / "training.txt", training),
    }
    found = {}
    for name, group in {
        "good": texts,
        "shuffled": shuffled,
        "repeated": texts[:3] * 40,
        "copied": training,
        "gibberish": [texts[0]] * 120,
    }.items():
        scores = score(texts=lines(tmp_path / f"{name}.txt", group), **files)["scores"]
        found[name] = {score: entry["value"] for score, entry in scores.items()}
    assert found["shuffled"]["ngram_perplexity"] > 2 * found["good"]["ngram_perplexity"]
    assert found["shuffled"]["unigram_entropy"] == pytest.approx(found["good"]["unigram_entropy"])
    for name in ("diversity", "unigram_entropy", "encoder_mauve", "encoder_mauve_star"):
        assert found["repeated"][name] < found["good"][name]
    assert found["copied"]["memorisation"] == 1
    assert found["good"]["memorisation"] < 1
    assert found["gibberish"]["encoder_mauve"] < 0.1 < found["good"]["encoder_mauve"]


def test_a_stand_in_changes_the_name_of_the_protocol(tiny):
    encoder = load_encoder(str(tiny.encoder))

    def name(protocol, count=1_000, encoder_name="google-bert/bert-base-cased", **changes):
        settings = config_lib.base().evaluate
        settings.update(changes)
        texts = protocols.Texts(
            generated=["a"] * count,
            references=["a"] * 1_000,
            sources=[],
            paired=False,
            training=None,
            normalise=list,
            form="",
            encoder=dataclasses.replace(encoder, name=encoder_name),
            settings=settings,
        )
        return protocols.full_name(protocol, texts)

    assert name("rouge") == "rouge"
    assert name("rouge", stemming=False) == "rouge(stemming=False)"
    assert name("offline", count=7) == "offline"
    assert name("offline", seeds=1) == "offline(seeds=1)"
    assert name("cosmos") == "cosmos(words=regex)"
    assert name("cosmos", words="spacy") == "cosmos"
    assert name("cosmos", words="spacy", count=70) == "cosmos(block_size=70)"
    assert name("cosmos", words="spacy", encoder_name="minilm") == "cosmos(encoder=minilm)"
    stand_in = {"perplexity_model": "distilgpt2"}
    assert name("cosmos", words="spacy", **stand_in) == "cosmos(perplexity_model=distilgpt2)"
    assert name("corpus-ppl", **stand_in) == "corpus-ppl(perplexity_model=distilgpt2)"
    models = {
        "style_model": "s-nlp/roberta_toxicity_classifier",
        "fluency_model": "textattack/roberta-base-CoLA",
    }
    assert name("detoxification", encoder_name="minilm", **models) == "detoxification"
    assert name("detoxification", encoder_name="minilm") == (
        "detoxification(style_model=offline, fluency_model=offline)"
    )


def test_what_cannot_be_had_is_a_problem_and_the_rest_is_scored(score, tmp_path, caplog):
    found = score(
        texts=lines(tmp_path / "texts.txt", [*sentences(20), ""]),
        references=lines(tmp_path / "references.txt", sentences(20, seed=1)),
        perplexity_model=str(tmp_path / "nothing"),
        protocol="offline,mean-ppl",
    )
    assert set(found["problems"]) == {"encoder_mauve", "mean_perplexity"}
    assert "at least 50" in found["problems"]["encoder_mauve"]
    assert "nothing" in found["problems"]["mean_perplexity"]
    assert found["texts"]["generated"]["empty"] == 1
    assert found["protocols"][1].startswith("mean-ppl(perplexity_model=")
    assert set(found["scores"]) == {"ngram_perplexity", "diversity", "unigram_entropy"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"references": ["a b"], "protocol": "bleu"}, "2 texts, but there are 1 references"),
        ({"references": ["a b", ""], "paired": True}, r"references\.txt:2: an empty reference"),
        ({"references": ["a"], "protocol": ""}, "--protocol= names none: there are cosmos, "),
        ({"references": ["", ""]}, r"references\.txt: holds no texts"),
        ({"references": ["a"], "sources": ["a"]}, "2 texts, but there are 1 references"),
        ({}, "has no 'reference' of each text: give --references"),
        ({"references": ["a"], "protocol": "cosmos,nonsense"}, "protocol 'nonsense': there are"),
        ({"references": ["a"], "words": "letters"}, "evaluate.words is 'letters'"),
        ({"references": ["a"], "max_length": 900}, "--max_length=900: from 3 to"),
    ],
)
def test_what_cannot_be_scored_is_refused(score, tmp_path, arguments, message):
    for name in ("references", "sources"):
        if name in arguments:
            path = lines(tmp_path / f"{name}.txt", arguments[name])
            arguments = {**arguments, name: path}
    texts = lines(tmp_path / "texts.txt", ["the old tree", "a tree"])
    with pytest.raises(UserError, match=message):
        score(texts=texts, **arguments)
    assert not (tmp_path / "scores.json").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": 3}\n', r":2: needs an object with the text 'text'"),
        ('{"text": "a"}\n["a"]\n', r":2: needs an object"),
        ('{"text": "a"}\nnonsense\n', r":2: not valid JSON"),
        ("", "holds no texts"),
    ],
)
def test_damaged_files_are_named_with_the_line(tmp_path, content, message):
    path = tmp_path / "texts.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        evaluate.read(path, "text")


def test_the_first_line_tells_where_the_name_does_not(tmp_path, caplog):
    rows = [{"text": "a b"}, {"text": "c"}]
    for name in ("texts.jsonl", "texts.json", "texts"):
        path = tiny_lib.write_rows(tmp_path / name, rows)
        assert evaluate.read(path, "text") == ["a b", "c"]
    path.write_text("a b\n{c}\n")
    assert evaluate.read(path, "text") == ["a b", "{c}"]
    assert not caplog.messages
    path = tiny_lib.write_rows(tmp_path / "texts.txt", rows)
    assert evaluate.read(path, "text") == ['{"text": "a b"}', '{"text": "c"}']
    assert caplog.messages == [f"{path}: looks like JSON lines, and is scored as plain text"]


def test_where_to_write_is_asked_first(score, tmp_path):
    with pytest.raises(UserError, match="there is no folder"):
        score(texts=tmp_path / "missing", out=tmp_path / "no" / "where.json")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A small GPT-2 that knows nothing."""
    directory = tmp_path_factory.mktemp("gpt2")
    tiny_gpt2.write_tokenizer(directory, sentences(50))
    config = Gpt2Config.from_huggingface(tiny_gpt2.CONFIG)
    params = Gpt2(config).init(jax.random.key(0), np.zeros((1, 4), np.int32))["params"]
    tiny_gpt2.write_model(directory, params)
    return str(directory)


def test_the_protocols_of_the_papers(score, tmp_path, gpt2, tiny):
    """Each score is what its function says of the same texts, in blocks where there are several."""
    texts, references = sentences(130), sentences(125, seed=1)
    found = score(
        texts=lines(tmp_path / "texts.txt", texts),
        references=lines(tmp_path / "references.txt", references),
        training=lines(tmp_path / "training.txt", texts[:10]),
        protocol="cosmos,mean-ppl,corpus-ppl",
        perplexity_model=gpt2,
        feature_model=gpt2,
        block_size=60,
        seeds=2,
    )
    assert found["problems"] == {}
    scores = found["scores"]
    assert list(scores) == [
        *("mauve", "mauve_star", "perplexity", "diversity", "memorisation", "unigram_entropy"),
        *("mean_perplexity", "corpus_perplexity"),
    ]
    assert scores["mauve"]["protocol"].startswith(f"cosmos(feature_model={gpt2}, ")
    assert f"words=regex, block_size=60, encoder={tiny.encoder}" in scores["mauve"]["protocol"]
    # Two blocks of each: four pairs.
    model = language_model.load(gpt2)
    ours, theirs = (perplexity.features(model, group) for group in (texts, references))
    pairs = [
        mauve.mauve(ours[i : i + 60], theirs[j : j + 60], seeds=range(2))["mauve"].value
        for i in (0, 60)
        for j in (0, 60)
    ]
    assert scores["mauve"]["value"] == pytest.approx(np.mean(pairs), rel=1e-6)
    assert scores["mauve"]["spread"] == pytest.approx(np.std(pairs, ddof=1), rel=1e-4)
    assert scores["mauve"]["spread_over"] == "pairs of blocks"
    nlls = perplexity.token_nlls(model, texts)
    assert scores["mean_perplexity"]["value"] == pytest.approx(perplexity.mean(nlls).value)
    assert scores["corpus_perplexity"]["value"] == pytest.approx(perplexity.corpus(nlls).value)
    blocks = [ngrams.diversity(texts[i : i + 60]) for i in (0, 60)]
    assert scores["diversity"]["value"] == pytest.approx(np.mean(blocks))
    assert scores["diversity"]["spread"] == pytest.approx(np.std(blocks, ddof=1))
    assert scores["memorisation"]["value"] > 0


def test_conditional_protocols_without_fetching_anything(score, tmp_path, tiny):
    sources = [f"old {text}" for text in sentences(40)]
    references = [text.removeprefix("old ") for text in sources]
    rows = [
        {"text": r, "source": s, "reference": r} for s, r in zip(sources, references, strict=True)
    ]
    arguments = {"protocol": "detoxification,bertscore", "bertscore_model": str(tiny.encoder)}
    good = score(texts=tiny_lib.write_rows(tmp_path / "good.jsonl", rows), **arguments)
    assert good["problems"] == {}
    copies = [{**row, "text": row["source"]} for row in rows]
    copied = score(texts=tiny_lib.write_rows(tmp_path / "copied.jsonl", copies), **arguments)
    values = [{name: e["value"] for name, e in f["scores"].items()} for f in (good, copied)]
    assert values[0]["style"] > values[1]["style"]
    assert values[1]["similarity"] == pytest.approx(1, abs=1e-5)
    assert values[0]["similarity"] < 1
    assert values[0]["bertscore_f1"] == pytest.approx(1, abs=1e-5)
    assert values[1]["bertscore_f1"] < values[0]["bertscore_f1"]
    protocol = good["scores"]["j"]["protocol"]
    assert protocol.startswith(
        "detoxification(style_model=offline, fluency_model=offline, encoder="
    )
    assert "naive Bayes" in good["scores"]["style"]["flags"]["by"]
    assert good["scores"]["bertscore_f1"]["protocol"].startswith("bertscore(bertscore_model=")
