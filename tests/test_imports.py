"""Imports go downwards: a module imports modules of the lines above its own, no others."""

import ast
from pathlib import Path

import cosmos_jax

PACKAGE = Path(cosmos_jax.__file__).parent

# From the bottom up; modules of one line do not know each other.
LAYERS = """
    __init__ errors
    commands config distributed optimizer peaks provenance torch_gpt2 data.tokens data.files
    scores.score scores.batches scores.table data.incoming consensus config_checks
    sharding checkpoint workdir data.sources scores.ngrams scores.frechet
    report
    metrics timing data.jsonl data.tables data.holding_out data.batches
    scores.mauve scores.ngram_model
    data.documents
    data.text_builder
    data.builders
    models.layers models.torch_files diffusion.schedule diffusion.time_sampling
    models.pointer
    models.bert models.gpt2 models.autoencoder models.denoiser diffusion.process huggingface
    models.states models.weights models.token_decoder
    models.cosmos models.autoregressive models.masked diffusion.loss encoder language_model
    scores.embeddings scores.perplexity
    scores.bertscore classifier
    scores.detoxification
    scores.protocols
    diffusion.samplers stages.base run exported
    stages.autoencoder stages.diffusion stages.autoregressive stages.masked diffusion.distillation
    sampling decoding unmasking trained train measure feature_cache latents
    baselines pretrained guides stages.distillation
    describe convert parity pipeline pth editing
    programs
    samples examples model_card library
    evaluation evaluate results export
    runner
    systems steps
    parts
    speed
    main study benchmark generate
"""
# `sources` defines what a data set is and, when one is asked for, calls who makes it; the package
# offers the library to whoever asks for it.
UPWARDS = {("data.sources", "data.builders"), ("__init__", "library")}


def modules() -> dict[str, Path]:
    """Every module with code in it, without the package's name."""
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py" or path.parent == PACKAGE
    }


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """The package's own modules that a file imports, at the top or within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [n if _short(n) in known else str(node.module) for n in names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {_short(name) for name in names if name.split(".")[0] == PACKAGE.name}
    return found


def _short(name: str) -> str:
    return name.removeprefix(PACKAGE.name).removeprefix(".") or "__init__"


def test_every_module_has_its_layer():
    assert sorted(LAYERS.split()) == sorted(modules())


def test_imports_go_downwards():
    known = modules()
    layer = {
        name: height
        for height, line in enumerate(LAYERS.strip().splitlines())
        for name in line.split()
    }
    edges = {(name, used) for name, path in known.items() for used in imports(path, known)}
    assert len(edges) > 100, "no imports were found"
    upwards = {(name, used) for name, used in edges if layer[used] >= layer[name]}
    assert upwards == UPWARDS


def test_only_one_module_knows_the_checkpoint_library():
    users = [n for n, path in modules().items() if "orbax.checkpoint" in path.read_text("utf-8")]
    assert users == ["checkpoint"]
