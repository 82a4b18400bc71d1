"""Likelihoods and features against PyTorch's, the three perplexities by hand and on texts."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from random_params import random_params
from tiny_gpt2 import CONFIG, write_model, write_tokenizer

from cosmos_jax import language_model
from cosmos_jax.errors import UserError
from cosmos_jax.models.gpt2 import Gpt2, Gpt2Config, logits
from cosmos_jax.scores import batches, perplexity
from cosmos_jax.scores.perplexity import TokenNlls

CONFIG_OF_OURS = Gpt2Config.from_huggingface(CONFIG)


@functools.cache
def sentences() -> list[str]:
    """A small language: who does what to whom."""
    rng = np.random.default_rng(0)
    kinds = ["cat dog bird", "small old happy", "sees likes finds", "tree house river"]
    nouns, adjectives, verbs, places = (kind.split() for kind in kinds)
    return [
        f"the {rng.choice(adjectives)} {rng.choice(nouns)} {rng.choice(verbs)} a"
        f" {rng.choice(nouns)} by the {rng.choice(places)}."
        for _ in range(256)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A GPT-2 of random weights, larger than initial ones, whose likelihoods differ widely."""
    folder = tmp_path_factory.mktemp("gpt2")
    write_tokenizer(folder, sentences())
    write_model(folder, random_params(Gpt2(CONFIG_OF_OURS), np.zeros((1, 2), int))["params"])
    return folder


@pytest.fixture(scope="module")
def model(directory):
    return language_model.load(str(directory))


TEXTS = [
    "the cat sees a bird.",
    "a",
    "Ünïcode — 漢字, emoji 🙂!",  # Byte by byte, and just within what the model can read.
    "the old dog finds a house by the river. " * 6,  # Longer than that.
]


@pytest.fixture(scope="module")
def torch_model(directory):
    torch = pytest.importorskip("torch", reason="PyTorch is the other side of this comparison")
    transformers = pytest.importorskip("transformers")
    return torch, transformers.GPT2LMHeadModel.from_pretrained(str(directory)).eval()


def test_likelihoods_are_those_of_torch(torch_model, model):
    torch, theirs = torch_model
    nlls = perplexity.token_nlls(model, TEXTS)
    assert nlls.flags["cut"] == 1
    assert nlls.flags["max_length"] == 40
    assert nlls.flags["model"] == model.name
    for text, nll in zip(TEXTS, nlls.texts, strict=True):
        ids = torch.tensor([[0, *model.tokenizer(text)["input_ids"][:39]]])
        with torch.no_grad():
            scores = theirs(ids).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(scores, ids[0, 1:], reduction="none")
        np.testing.assert_allclose(nll, expected.numpy(), atol=1e-5)


def test_features_are_those_of_the_package(torch_model, model):
    """mauve-text 0.4.0 pads the tokens with zeros on the right and masks them."""
    torch, theirs = torch_model
    ids = [model.tokenizer(text)["input_ids"][:40] for text in TEXTS]
    assert max(map(len, ids)) == 40
    lengths = np.array([len(tokens) for tokens in ids])
    padded = torch.tensor([tokens + [0] * (40 - len(tokens)) for tokens in ids])
    mask = torch.tensor(np.arange(40) < lengths[:, None]).long()
    with torch.no_grad():
        states = theirs(padded, attention_mask=mask, output_hidden_states=True).hidden_states[-1]
    expected = states.numpy()[np.arange(len(ids)), lengths - 1]
    np.testing.assert_allclose(perplexity.features(model, TEXTS), expected, atol=1e-5)


def test_neighbours_and_order_never_matter(model, monkeypatch):
    nlls, features = perplexity.token_nlls(model, TEXTS), perplexity.features(model, TEXTS)
    # Fewer rows in a batch, and each text where another one was.
    monkeypatch.setattr(batches, "TOKENS", 128)
    order = [2, 0, 3, 1, 0, 0]
    other = perplexity.token_nlls(model, [TEXTS[i] for i in order])
    for i, nll in zip(order, other.texts, strict=True):
        np.testing.assert_allclose(nll, nlls.texts[i], atol=1e-5)
    other_features = perplexity.features(model, [TEXTS[i] for i in order])
    np.testing.assert_allclose(other_features, features[order], atol=1e-5)


def test_batches_have_few_shapes_and_hold_everything_once():
    rng = np.random.default_rng(0)
    sequences = [list(rng.integers(1, 99, n)) for n in rng.integers(1, 1001, 700)]
    shapes, seen = set(), []
    for indices, ids, lengths in batches.padded_batches(sequences, longest=1000):
        assert ids.size <= batches.TOKENS
        shapes.add(ids.shape)
        seen += list(indices)
        for row, i in enumerate(indices):
            assert list(ids[row, : lengths[row]]) == sequences[i]
            assert not ids[row, lengths[row] :].any()
    assert sorted(seen) == list(range(700))
    assert {length for _, length in shapes} == {16, 32, 64, 128, 256, 512, 1000}
    assert len(shapes) == 7


def test_the_three_perplexities_by_hand():
    # exp of the means of these: 2, 4, 8 with 1, 2 and 3 tokens.
    two = math.log(2)
    nlls = TokenNlls([np.array([two]), np.array([two, 3 * two]), np.array([0, 8 * two, two])])
    mean = perplexity.mean(nlls)
    assert mean.value == pytest.approx(14 / 3)
    # Deviations from 14/3 are -8/3, -2/3, 10/3: variance 28/3, and its root by the root of 3.
    assert mean.spread == pytest.approx(math.sqrt(28 / 9))
    corpus = perplexity.corpus(nlls)
    assert corpus.value == pytest.approx(2 ** ((1 + 2 * 2 + 3 * 3) / 6))
    assert corpus.flags["tokens"] == 6
    assert perplexity.trimmed_mean(nlls).value == pytest.approx(14 / 3)  # 5% of 3 texts: none.
    assert perplexity.trimmed_mean(nlls, trim=0.34).value == pytest.approx(4)
    assert corpus.spread is None  # Three texts are too few to say.


def of_perplexities(values) -> TokenNlls:
    return TokenNlls([np.full(2, math.log(value)) for value in values], {"model": "none"})


def test_trimming_leaves_outliers_out_at_both_ends():
    values = [1.0, 1e6, *range(10, 48)]  # 40 texts, so 2 at either end.
    trimmed = perplexity.trimmed_mean(of_perplexities(values))
    assert trimmed.value == pytest.approx(np.mean(range(11, 47)))
    assert perplexity.mean(of_perplexities(values)).value > 1e4
    assert trimmed.flags == {
        "model": "none",
        "perplexity": "trimmed mean over texts",
        "trim": 0.05,
    }


def test_blocks():
    values = [*[2.0] * 10, *[6.0] * 10, *[1e9] * 5]  # The last block is not a whole one.
    score = perplexity.trimmed_mean(of_perplexities(values), block_size=10)
    assert (score.value, score.spread) == (pytest.approx(4), pytest.approx(8**0.5))
    assert score.spread_over == "blocks"
    assert score.flags["block"] == 10
    alone = perplexity.trimmed_mean(of_perplexities(values[:12]), block_size=10)
    assert alone.value == pytest.approx(np.mean([2] * 10 + [6] * 2))
    assert alone.spread_over != "blocks"


@pytest.mark.parametrize("definition", [perplexity.trimmed_mean, perplexity.corpus])
def test_spread_is_what_other_texts_would_have_given(definition):
    """The standard error from one set of texts, against the deviation over many sets."""
    rng = np.random.default_rng(0)

    def drawn() -> TokenNlls:
        return TokenNlls([rng.normal(3, 1, rng.integers(5, 15)) for _ in range(100)])

    scores = [definition(drawn()) for _ in range(200)]
    actual = np.std([score.value for score in scores], ddof=1)
    claimed = np.sqrt(np.mean([score.spread**2 for score in scores]))
    assert claimed == pytest.approx(actual, rel=0.25)


def trained(model: language_model.LanguageModel) -> language_model.LanguageModel:
    """A GPT-2 that has learnt the small language."""
    network = Gpt2(model.config)
    tokens = [[0, *model.tokenizer(text)["input_ids"]] for text in sentences()]
    longest = max(map(len, tokens))
    ids = np.array([row + [0] * (longest - len(row)) for row in tokens])
    mask = ids[:, 1:] != 0
    optimiser = optax.adam(1e-2)
    params = jax.jit(network.init)(jax.random.key(0), ids[:1])["params"]

    def loss(params):
        scores = logits(params, network.apply({"params": params}, ids[:, :-1]))
        nll = optax.softmax_cross_entropy_with_integer_labels(scores, ids[:, 1:])
        return jnp.mean(nll, where=mask)

    @jax.jit
    def update(params, state):
        gradient = jax.grad(loss)(params)
        updates, state = optimiser.update(gradient, state)
        return optax.apply_updates(params, updates), state

    state = optimiser.init(params)
    for _ in range(40):
        params, state = update(params, state)
    return language_model.LanguageModel(
        "trained", model.config, params, model.tokenizer, model.fingerprint
    )


def test_shuffled_words_are_less_likely(model):
    reader = trained(model)
    rng = np.random.default_rng(1)
    texts = sentences()[:100]
    shuffled = [" ".join(rng.permutation(text.split())) for text in texts]
    definitions = (perplexity.trimmed_mean, perplexity.mean, perplexity.corpus)
    good, bad = (perplexity.token_nlls(reader, group) for group in (texts, shuffled))
    for definition in definitions:
        plain, mixed = definition(good), definition(bad)
        assert plain.value < 3  # About half of the words are certain, the others one of three.
        assert mixed.value > 2 * plain.value
        assert mixed.value - plain.value > 5 * (plain.spread + mixed.spread)


def test_texts_that_cannot_be_scored(model):
    for score in (perplexity.token_nlls, perplexity.features):
        with pytest.raises(UserError, match="there are no texts to score"):
            score(model, [])
        with pytest.raises(UserError, match="text 2 of 3 is empty: leave such texts out"):
            score(model, ["a cat", "", "a dog"])
    with pytest.raises(UserError, match="there are no texts to score"):
        TokenNlls([])
    with pytest.raises(UserError, match="text 2 of 2 is empty"):
        TokenNlls([np.ones(1), np.empty(0)])
    with pytest.raises(UserError, match="text 1: its likelihood is not a finite number"):
        TokenNlls([np.array([1.0, math.nan])])


def test_a_long_text_makes_no_noise(model, capfd, caplog):
    perplexity.token_nlls(model, ["the cat " * 2000])
    assert "longer than" not in caplog.text + "".join(capfd.readouterr())
