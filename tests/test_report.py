"""`report.html`: every part of it, and a page at every moment of a run, whatever its files hold."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import lxml.html
import numpy as np
import pytest

from cosmos_jax import config as config_lib
from cosmos_jax import report
from cosmos_jax.errors import UserError

HOSTILE = '<script>alert("x")</script><img src=http://x.example/i.png> & \x00\x1b\ud800 𝔘🙂‮ ' + "w" * 400
SECTIONS = (
    "status configuration loss reconstructions samples interpolation scores time_and_memory versions"
).split()

EXAMPLES = {
    "real": ["the tall king finds a stone", "every bird leaves the hill"],
    "reconstructions": [
        {
            "text": "the serpent was subtle",
            "tokens": [
                ["the", True, "the"],
                ["serpent", False, "garden"],
                ["was", True, "was"],
                ["sub", True, "sub"],
                ["##tle", False, "##tly"],
            ],
        }
    ],
    "interpolation": {
        "from": "the king leaves the garden",
        "to": "a bird hears the warm rain",
        "path": [
            {"weight": 0.0, "text": "the king leaves the garden", "perplexity": 21.375},
            {"weight": 0.5, "text": "the king hears the garden"},
            {"weight": 1.0, "text": "a bird hears the warm rain", "perplexity": 1234.5},
        ],
    },
}
SAMPLES = [{"text": f"the small farmer number {i} carries letters"} for i in range(12)]
EVALUATION = {
    "identity": {"num_texts": 12},
    "held_out": {"autoencoder": {"loss": 2.25, "token_accuracy": 0.6875}},
    "scores": {
        "mauve*": {
            "value": 0.83617,
            "spread": 0.01234,
            "spread_over": "5 seeds",
            "real": 0.95,
            "protocol": "offline(words=spacy)",
            "flags": {"clusters": 20},
            "signature": "clusters:20|features:minilm|seeds:5",
        },
        "memorisation": {
            "value": 0.004,
            "protocol": "offline",
            "flags": {"n": 4},
            "signature": "n:4|words:regex",
        },
    },
    "problems": {"bertscore": "needs references"},
    "texts": {"generated": {"count": 12, "empty": 3, "sha256": "ab12"}, "paired": False},
    "versions": {"cosmos-jax": "0.1", "jax": "0.9.9"},
    "device": {"kind": "H100 <80 GB>", "count": 8},
}
TIMING = [
    {
        "stage": stage,
        "from": start,
        "to": end,
        "seconds": seconds,
        "peak_memory_bytes": 3 * 2**29,
        "device": "cpu",
        "num_devices": 2,
        "finished_at": "2025-11-25T09:00:00+0000",
    }
    for stage, start, end, seconds in (
        ("autoencoder", 0, 40, 8.0),
        ("autoencoder", 40, 60, 3_600.0),
        ("generate", 0, 12, 61.0),
    )
]


def metrics(stage: str, last: int) -> list[dict]:
    """Lines as a run writes them, every second step, with validation before and after."""
    rng = np.random.default_rng(0)
    lines = [
        {"stage": stage, "step": step, "loss": 2 + 7 / (1 + step) + rng.normal() / 10}
        for step in range(2, last + 1, 2)
    ]
    for step in (0, last):
        values = {"validation_loss": 2.5 + 7 / (1 + step), "validation_exact_match": step / 1_000}
        lines.append({"stage": stage, "step": step, **values})
    return sorted(lines, key=lambda line: line["step"])


def write_lines(path: Path, entries: list) -> None:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def begin(directory: Path, **fields) -> Path:
    """A workdir with nothing but its config."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config_lib.base()
    config.update_from_flattened_dict(
        {
            "autoencoder.steps": 60,
            "diffusion.steps": 200,
            "generate.num_texts": 12,
            "data.source": "jsonl:stories",
            **fields,
        }
    )
    (directory / "config.json").write_text(config_lib.to_json(config))
    return directory


def fill(workdir: Path) -> Path:
    """All that a finished run leaves beside it."""
    write_lines(workdir / "metrics.jsonl", metrics("autoencoder", 60) + metrics("diffusion", 200))
    write_lines(workdir / "samples.jsonl", SAMPLES)
    write_lines(workdir / "timing.jsonl", TIMING)
    (workdir / "examples.json").write_text(json.dumps(EXAMPLES))
    (workdir / "evaluation.json").write_text(json.dumps(EVALUATION))
    return workdir


@pytest.fixture
def workdir(tmp_path):
    return fill(begin(tmp_path / "stories"))


def page(workdir: Path) -> lxml.html.HtmlElement:
    return lxml.html.fromstring(report.write(workdir).read_text(encoding="utf-8"))


def sections(root) -> dict[str, lxml.html.HtmlElement]:
    return {section.get("id"): section for section in root.iter("section")}


def said(element) -> str:
    """Its text with single spaces."""
    return " ".join(element.text_content().split())
