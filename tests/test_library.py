"""Trained models in Python: the same texts as the stages, whatever the size of a batch."""

import json
import shutil
from types import SimpleNamespace

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny as tiny_lib
from random_params import random_params

import cosmos_jax
from cosmos_jax import consensus, editing, guides, latents, pipeline
from cosmos_jax.errors import UserError
from cosmos_jax.export import export
from cosmos_jax.sampling import make_sampler
from cosmos_jax.stages.base import row_keys

SOURCES = ["the old king", "a bird sees the river and the hill", "tree"]


@pytest.fixture(scope="module")
def model(finished):
    return cosmos_jax.load(finished)


@pytest.fixture(scope="module")
def pairs(finished_pairs):
    return cosmos_jax.load(str(finished_pairs))


def test_texts_are_those_of_the_run(model, pairs, finished, finished_pairs):
    expected = [sample["text"] for sample in tiny_lib.read_rows(finished / "samples.jsonl")]
    assert model.generate(6) == expected
    samples = tiny_lib.read_rows(finished_pairs / "samples.jsonl")
    found = pairs.generate(sources=[sample["source"] for sample in samples])
    assert found == [sample["text"] for sample in samples]


def test_a_text_depends_on_its_number_and_seed_alone(model):
    texts = model.generate(5)
    assert model.generate(2) == texts[:2]
    assert model.generate() == texts[:1]
    assert [t for batch in model.stream(3, first=2, batch_size=2) for t in batch] == texts[2:]
    many = [model.generate(5, seed=seed) for seed in range(1, 6)]
    assert any(other != texts for other in many)


def test_batches_come_one_by_one(model):
    stream = model.stream(5, batch_size=2)
    assert next(stream) == model.generate(2)
    assert [len(batch) for batch in stream] == [2, 1]


def test_no_size_of_a_batch_compiles_anew(model):
    compiled = model._compile("generate", (), None)
    for num in (4, 3, 2, 1, 0):
        model.generate(num)
    before = compiled._cache_size()
    for num in (2, 3, 4, 1, 5, 8, 9, 0):
        assert len(model.generate(num)) == num
    assert compiled._cache_size() <= before + 1  # 5 to 16 share one more
    assert model._compile("generate", (), None) is compiled


def test_latents_are_the_standardised_ones_of_the_autoencoder(model, tiny, finished):
    run = tiny.run(finished)
    system, weights = pipeline.trained_autoencoder(run)
    z = latents.encode(run, system, weights, SOURCES)
    found = model.encode(SOURCES)
    mean, std = (np.asarray(model.weights[f"latents_{name}"]) for name in ("mean", "std"))
    np.testing.assert_allclose(found * std + mean, z, atol=1e-4)
    ids = latents.decode(run, system, weights, z)
    expected = cosmos_jax.data.tokens.decode(run.encoder.tokenizer, ids)
    assert model.decode(found) == model.reconstruct(SOURCES) == expected
    assert model.decode(jnp.array(found)) == expected
    assert model.encode([]).shape == (0, 4, 32)
    assert model.reconstruct([]) == []


def test_a_path_has_both_ends(model):
    path = model.interpolate(*SOURCES[:2], num=4)
    assert len(path) == 4
    assert [path[0], path[-1]] == model.reconstruct(SOURCES[:2])
    assert len(model.interpolate(*SOURCES[:2], num=3, strength=0.5)) == 3


def test_an_edit_of_no_strength_is_a_reconstruction(model, pairs):
    assert model.edit(SOURCES, 0.0) == model.reconstruct(SOURCES)
    assert model.edit(SOURCES, 0.3, seed=1) == model.edit(SOURCES, 0.3, seed=1)
    assert len(pairs.edit(SOURCES, 0.3, sources=SOURCES, guidance=1.5)) == 3


def test_infilling_writes_what_was_given(model, pairs):
    texts = ["the [MASK] king sees [MASK]", "a [MASK]"]
    found = model.infill(texts)
    words = [text.split() for text in found]
    assert words[0][0] == "the"
    assert words[0][2:4] == ["king", "sees"]
    assert words[1][0] == "a"
    assert "[MASK]" not in " ".join(found)
    assert len(model.infill(texts, exact=False)) == 2
    assert len(pairs.infill(texts, sources=SOURCES[:2])) == 2


def test_a_trace_has_a_text_for_each_step(model, pairs):
    steps = model.trace(3, steps=4)
    assert [len(texts) for texts in steps] == [4, 4, 4]
    x0 = cosmos_jax.load(model._run.workdir)
    x0.config.diffusion.answer = "x0"
    assert [texts[-1] for texts in x0.trace(3)] == x0.generate(3)
    assert len(pairs.trace(sources=SOURCES)) == 3


def test_guidance_is_followed(pairs, tiny, finished_pairs):
    """A run whose config says 2: saying 2 changes nothing, 8 does to latents what 8 does there."""
    plain = pairs.generate(sources=SOURCES)
    assert pairs.generate(sources=SOURCES, guidance=2.0) == plain
    many = [pairs.generate(sources=SOURCES, guidance=w, seed=s) for s in range(4) for w in (0, 9)]
    assert len({tuple(texts) for texts in many}) > 1


def test_a_guide_pulls_texts_its_way(finished):
    """Away from the commonest first word, judged on the decoded text."""
    model = cosmos_jax.load(finished)
    # After so little training latents are nearly the same for all texts, and say nothing.
    inputs = (jnp.zeros((1, 4, 32)), model.weights["mask_embedding"])
    model.weights |= {
        "decompressor": random_params(model.system.decompressor, *inputs)["params"],
        "latents_std": jnp.ones((4, 32)),
    }

    draw = make_sampler(model.config, model.system)
    keys = row_keys(model._key(0), jnp.arange(8))

    def guide(z, log_probs):
        return log_probs[:, 1, 7]

    def latents(refine):
        with jax.set_mesh(model.mesh):
            return jax.jit(lambda weights: draw(weights, keys, refine=refine))(model.weights)

    def score(x_0):
        return guide(None, guides.log_probabilities(model.system, model.weights, x_0)).mean()

    towards = latents(guides.guided(model.system, model.weights, guide, 30.0))
    assert score(towards) > score(latents(None)) + 0.1
    ids = np.asarray(editing.decode(model.system, model.weights, towards))
    expected = cosmos_jax.data.tokens.decode(model.tokenizer, ids)
    assert model.generate(8, guide=guide, guide_scale=30.0) == expected
    nothing = model.generate(4, guide=lambda z, _: jnp.zeros(len(z)), guide_scale=20)
    assert nothing == model.generate(4)


def test_the_best_of_several(pairs):
    key = pairs._key(0)
    batch = pairs._inputs(None, SOURCES, 0)
    compiled = pairs._compile("generate", (), None)
    keys = [key, jax.random.fold_in(key, 1), jax.random.fold_in(key, 2)]
    candidates = [pairs._texts(compiled, k, batch) for k in keys]
    assert candidates[0] == pairs.generate(sources=SOURCES)
    expected = [consensus.best(texts) for texts in zip(*candidates, strict=True)]
    assert pairs.generate(sources=SOURCES, best_of=3) == expected


def test_the_functions_below_take_weights_and_keys(model):
    """Under a caller's own jit and vmap, over seeds."""
    z = model.encode(SOURCES[:1])
    edit = editing.make_editor(model.config, model.system)

    @jax.jit
    def edits(weights, seeds):
        def one(seed):
            return edit(weights, jax.random.split(jax.random.key(seed), 1), z, 0.5)

        return jax.vmap(one)(seeds)

    with jax.set_mesh(model.mesh):
        found = edits(model.weights, jnp.arange(3))
    assert found.shape == (3, 1, 4, 32)
    assert jnp.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.generate(2, sources=SOURCES), "takes no sources"),
        (lambda m: m.generate(-1), "num is -1"),
        (lambda m: m.generate(1, guidance="x"), "guidance is 'x'; it must be as 1.0 is"),
        (lambda m: m.generate(1, steps=0), "num_sampling_steps is 0"),
        (lambda m: m.generate(1, sampler="runge"), "sampler is 'runge'; it must be one of"),
        (lambda m: m.generate(1, best_of=0), "best_of is 0"),
        (lambda m: m.encode("a text"), "texts must be a list of strings, not str"),
        (lambda m: m.encode(["\x00"]), "finds no tokens"),
        (lambda m: m.decode(np.zeros((1, 3, 32))), r"must be \(texts, 4, 32\)"),
        (lambda m: m.edit(["the"], 1.5), "strength is 1.5"),
        (lambda m: m.interpolate("the", "a", 1), "num is 1"),
    ],
)
def test_mistakes_are_named(model, call, message):
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_conditional_model_wants_its_sources(pairs):
    with pytest.raises(UserError, match=r"give sources=\[...\]"):
        pairs.generate(3)
    with pytest.raises(UserError, match="3 sources for 2 texts"):
        pairs.generate(2, sources=SOURCES)


def test_a_run_in_training_is_loaded_as_far_as_it_is(finished, tmp_path, caplog):
    workdir = shutil.copytree(finished, tmp_path / "run")
    shutil.rmtree(workdir / "diffusion" / "30")
    model = cosmos_jax.load(workdir)
    assert model.identity["diffusion_step"] == 20
    assert "diffusion is at step 20 of 30" in caplog.text
    shutil.rmtree(workdir / "diffusion")
    with pytest.raises(UserError, match="holds no checkpoint"):
        cosmos_jax.load(workdir)


def test_a_model_of_the_hub_comes_with_its_encoder(model, finished, tmp_path, monkeypatch):
    """The hub is a folder here; a second time nothing is asked of it."""
    hub, cache = tmp_path / "hub", tmp_path / "cache"
    export(finished, hub)
    files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]
    info = SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in files])

    def download(_, file):
        (cache / file).parent.mkdir(parents=True, exist_ok=True)
        return str(shutil.copy(hub / file, cache / file))

    def cached(_, file):
        return str(cache / file) if (cache / file).exists() else None

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *_, **__: info)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    assert cosmos_jax.load("someone/words").generate(2) == model.generate(2)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", None)
    assert cosmos_jax.load("someone/words").generate(2) == model.generate(2)


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="neither a workdir nor an exported model"):
        cosmos_jax.load(tmp_path)
    with pytest.raises(UserError, match="there is no such directory"):
        cosmos_jax.load(tmp_path / "nothing here")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="neither a workdir nor an exported model"):
        cosmos_jax.load(tmp_path)
    assert not hasattr(cosmos_jax, "nothing")
