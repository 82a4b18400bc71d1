"""BERTScore against its definition in PyTorch, against its package, and by its direction."""

import collections
import dataclasses
import importlib.util
import math

import numpy as np
import pytest
import tiny_bert
from tiny import write_encoder

from cosmos_jax import encoder
from cosmos_jax.errors import UserError
from cosmos_jax.scores.bertscore import LAYERS, NAMES, _of_pairs, bertscore

CANDIDATES = [*tiny_bert.TEXTS, tiny_bert.TEXTS[0]]
REFERENCES = [*tiny_bert.TEXTS[1:], " the quick red fox ", tiny_bert.TEXTS[0]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """An encoder whose vocabulary are words, and needs no PyTorch."""
    return encoder.load(str(write_encoder(tmp_path_factory.mktemp("bertscore") / "encoder")))


@pytest.fixture(scope="module", params=["Bert", "Roberta"])
def directory(request, tmp_path_factory):
    return tiny_bert.write(tmp_path_factory.mktemp("bertscore") / request.param, request.param)


def by_definition(directory, layer: int, idf: bool) -> np.ndarray:
    """Equations (1) to (3), pair by pair and without padding, with the model of transformers."""
    import torch
    import transformers

    model = transformers.AutoModel.from_pretrained(str(directory)).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(directory))
    space = " " if model.config.model_type == "roberta" else ""

    def ids_of(text: str) -> list[int]:
        ids = tokenizer.encode(space + text.strip())
        return ids if len(ids) <= 24 else [*ids[:23], tokenizer.sep_token_id]

    def states_of(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            output = model(torch.tensor([ids]), output_hidden_states=True)
        return torch.nn.functional.normalize(output.hidden_states[layer][0], dim=-1)

    documents = collections.Counter(i for text in REFERENCES for i in set(ids_of(text)))

    def weights_of(ids: list[int]) -> torch.Tensor:
        if idf:
            weights = [math.log((len(REFERENCES) + 1) / (documents[i] + 1)) for i in ids]
        else:
            weights = [0.0, *[1.0] * (len(ids) - 2), 0.0]
        return torch.tensor(weights)

    rows = []
    for candidate, reference in zip(CANDIDATES, REFERENCES, strict=True):
        c, r = ids_of(candidate), ids_of(reference)
        cosines = states_of(c) @ states_of(r).T
        precision = (cosines.max(dim=1).values * weights_of(c)).sum() / weights_of(c).sum()
        recall = (cosines.max(dim=0).values * weights_of(r)).sum() / weights_of(r).sum()
        rows.append([precision, recall, 2 * precision * recall / (precision + recall)])
    return np.array(rows, np.float64)


@pytest.mark.parametrize("idf", [False, True])
@pytest.mark.parametrize("layer", [1, 3])
def test_definition(directory, layer, idf):
    expected_Nx3 = by_definition(directory, layer, idf)
    model = encoder.load(str(directory))
    actual_Nx3, flags = _of_pairs(model, CANDIDATES, REFERENCES, layer, idf)
    np.testing.assert_allclose(actual_Nx3, expected_Nx3, atol=1e-5)
    np.testing.assert_allclose(actual_Nx3[-1], 1, atol=1e-5)  # A text and itself.
    assert flags["cut"] >= 1  # Or too long a text would not have been tried.
    scores = bertscore(model, CANDIDATES, REFERENCES, layer=layer, idf=idf)
    for name, column in zip(NAMES, expected_Nx3.T, strict=True):
        assert scores[name].value == pytest.approx(column.mean(), abs=1e-5)
        error = column.std(ddof=1) / math.sqrt(len(column))
        assert scores[name].spread == pytest.approx(error, abs=1e-5)


def package_scores(name, layer: int, idf: bool) -> np.ndarray:
    package = pytest.importorskip("bert_score", reason="to compare: pip install bert-score")
    scorer = package.BERTScorer(
        str(name), num_layers=layer, idf=idf, idf_sents=REFERENCES, device="cpu", nthreads=0
    )
    # One pair at a time, as padding would be a match of cosine 0.
    columns = scorer.score(CANDIDATES, REFERENCES, batch_size=1)
    return np.stack([column.numpy() for column in columns], axis=1)


@pytest.mark.parametrize("idf", [False, True])
def test_package(directory, idf):
    import transformers

    if directory.name == "Roberta" and transformers.__version__ >= "5":
        pytest.skip(
            "the package asks for a space before a text in a way that transformers 5 ignores"
        )
    expected_Nx3 = package_scores(directory, 2, idf)
    actual_Nx3, _ = _of_pairs(encoder.load(str(directory)), CANDIDATES, REFERENCES, 2, idf)
    np.testing.assert_allclose(actual_Nx3, expected_Nx3, atol=1e-5)


@pytest.mark.parametrize("idf", [False, True])
def test_package_with_real_weights(idf):
    if importlib.util.find_spec(encoder.MINILM_PACKAGE) is None:
        pytest.skip(f"real weights are needed: {encoder.MINILM_INSTALL}")
    expected_Nx3 = package_scores(encoder._minilm_directory(), 6, idf)
    actual_Nx3, _ = _of_pairs(encoder.load("minilm"), CANDIDATES, REFERENCES, 6, idf)
    np.testing.assert_allclose(actual_Nx3, expected_Nx3, atol=1e-5)


def test_direction(small):
    rng = np.random.default_rng(0)
    references = [
        "the old farmer finds a red stone under the quiet bridge",
        "every child sees the bright river in the summer morning",
        "a baker makes some warm letter and leaves",
    ]
    shuffled = [" ".join(rng.permutation(text.split())) for text in references]
    others = references[1:] + references[:1]
    same, mixed, other = (
        bertscore(small, texts, references)["bertscore_f1"].value
        for texts in (references, shuffled, others)
    )
    assert same == pytest.approx(1, abs=1e-5)
    assert 1 > mixed > other


def test_a_part_of_the_reference_is_precise_and_all_of_it_is_not_recalled(small):
    scores = bertscore(small, ["the old farmer"], ["the old farmer finds a stone under a bridge"])
    assert scores["bertscore_precision"].value > scores["bertscore_recall"].value + 0.01
    assert scores["bertscore_f1"].spread is None


def test_a_pair_does_not_depend_on_the_others(small):
    pairs = [("the red stone", "a green stone near the river"), ("a child", "every old child")]
    together, _ = _of_pairs(small, *zip(*pairs, strict=True), layer=2, idf=False)
    alone = [_of_pairs(small, [c], [r], 2, False)[0][0] for c, r in pairs]
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_rescaling(small):
    texts = ["the red stone", "a child"], ["a green stone", "every old child"]
    raw = bertscore(small, *texts)
    rescaled = bertscore(small, *texts, baseline=(0.2, 0.5, 0.4))
    for name, base in zip(NAMES, (0.2, 0.5, 0.4), strict=True):
        expected = (raw[name].value - base) / (1 - base)
        assert rescaled[name].value == pytest.approx(expected, abs=1e-12)
    signature = rescaled["bertscore_f1"].signature()
    assert signature == (
        f"model:{small.name}|weights:{small.fingerprint[:12]}|layer:2|idf:no|max_length:14|cut:0"
        "|rescaled:0.2,0.5,0.4"
    )
    assert raw["bertscore_f1"].signature().endswith("rescaled:no")


def test_the_layer_of_a_known_model(small, monkeypatch):
    known = {"roberta-large": 17, "roberta-base": 10, "bert-base-cased": 9}
    assert {name: LAYERS[name] for name in known} == known
    pair = ["the red stone"], ["a green stone"]
    first, last = (bertscore(small, *pair, layer=layer)["bertscore_f1"] for layer in (1, 2))
    assert first.value != last.value
    for name, layer, expected in (("known", 1, first), ("known", 9, last), ("other", 1, last)):
        monkeypatch.setitem(LAYERS, "known", layer)
        renamed = dataclasses.replace(small, name=f"somebody/{name}")
        chosen = bertscore(renamed, *pair)["bertscore_f1"]
        assert chosen.value == expected.value
        assert chosen.flags["layer"] == expected.flags["layer"]


@pytest.mark.parametrize(
    ("candidates", "references", "options", "message"),
    [
        ([], [], {}, "candidates: there are none"),
        (["the"], [], {}, "1 candidates for 0 references"),
        (["the", " "], ["a", "a"], {}, "candidates: text 2 is empty"),
        (["the"], [""], {}, "references: text 1 is empty"),
        (["the"], ["a"], {"layer": 3}, "has no layer 3, but layers 1 to 2"),
        (["the"], ["a"], {"layer": 0}, "has no layer 0"),
        (
            ["the", "a"],
            ["a", "a"],
            {"idf": True},
            "the tokens of candidate 2 weigh nothing, as all",
        ),
    ],
)
def test_bad_input(small, candidates, references, options, message):
    with pytest.raises(UserError, match=message):
        bertscore(small, candidates, references, **options)
