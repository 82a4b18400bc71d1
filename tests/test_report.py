"""`report.html`: every part of it, and a page at every moment of a run, whatever its files hold."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import lxml.html
import numpy as np
import pytest

from cosmos_jax import config as config_lib
from cosmos_jax import metrics as metrics_lib
from cosmos_jax import report
from cosmos_jax.errors import UserError

# HTML, controls that a browser drops, half a surrogate pair, an emoji, text that runs to the left,
# and a word wider than any page.
HOSTILE = (
    '"\'<script>alert("x")</script></style><img src=http://x.example/i.png onerror=x> & {{ 7*7 }} '
    "\x00\x1b\ud800 \U0001f642 \u202e abc " + "w" * 400
)
SECTIONS = (
    "status configuration loss reconstructions samples interpolation "
    "scores time_and_memory versions"
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
            {"weight": 0.0, "text": "the king leaves the garden"},
            {"weight": 0.5, "text": "the king hears the garden"},
            {"weight": 1.0, "text": "a bird hears the warm rain"},
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
        "encoder_bertscore_precision": {
            "value": 0.002089,
            "spread": 0.00123,
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
            **config_lib.FAITHFUL,
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
    return " ".join(" ".join(element.itertext()).split())


def test_every_section(workdir):
    root = page(workdir)
    found = sections(root)
    assert list(found) == SECTIONS
    assert [a.get("href") for a in root.find(".//nav")] == [f"#{name}" for name in SECTIONS]
    assert root.findtext(".//h1") == "stories"
    assert not root.xpath("//*[@id='notes']")

    assert [said(row) for row in found["status"].iter("li")] == [
        "autoencoder finished, 60 steps",
        "diffusion finished, 200 steps",
        "generate finished, 12 texts",
        "evaluate finished, 2 scores",
    ]
    assert sorted(said(row) for row in found["configuration"].iter("li")) == [
        "autoencoder.steps 60 100000",
        "data.source jsonl:stories wikipedia",
        "diffusion.steps 200 200000",
        "generate.num_texts 12 1000",
    ]
    names = {said(name) for name in found["configuration"].iter("dt")}
    assert names == config_lib.flatten(config_lib.base()).keys()

    plots = found["loss"].xpath(".//*[@role='img']")
    assert [plot.get("aria-label").split(":")[0] for plot in plots] == [
        "Loss of the autoencoder",
        "Loss of the diffusion",
    ]
    assert all(len(plot.findall("svg")) == 1 for plot in plots)
    assert "held-out 9.500 at step 0, 2.615 at step 60" in plots[0].get("aria-label")
    assert [said(row) for row in found["loss"].findall(".//table")[0].iter("tr")] == [
        "held-out step 0 step 60",
        "loss 9.500 2.615",
        "exact match 0.000 0.06000",
    ]

    assert "3 of 5 tokens right" in said(found["reconstructions"])
    wrong = [
        tuple(said(part) for part in span.iter("bdi"))
        for span in found["reconstructions"].xpath(".//*[@class='wrong']")
    ]
    assert wrong == [("wrong: garden", "for serpent"), ("wrong: ##tly", "for tle")]

    cards = found["samples"].findall(".//article")
    assert "The first 8 of 12 generated texts" in said(found["samples"])
    assert len(cards) == 8
    assert [said(text) for text in cards[1].xpath(".//*[contains(@class, 'text')]")] == [
        SAMPLES[1]["text"],
        EXAMPLES["real"][1],
    ]
    assert "a real text" not in said(cards[2])  # there were two

    assert [said(point) for point in found["interpolation"].iter("li")] == [
        "0.00 the king leaves the garden",
        "0.50 the king hears the garden",
        "1.00 a bird hears the warm rain",
    ]

    scores = [said(row) for row in found["scores"].iter("tr")]
    assert scores == [
        "score generated real",
        "mauve* 0.8362 ± 0.012 0.9500",
        "offline(words=spacy); ±: 5 seeds clusters:20|features:minilm|seeds:5",
        "encoder_ bertscore_ precision 0.002089 ± 0.0012 –",
        "offline n:4|words:regex",
    ]
    assert "no bertscore: needs references" in said(found["scores"])
    assert "token accuracy 0.6875" in said(found["scores"])
    assert "generated: count 12, empty 3, sha256 ab12" in said(found["scores"])
    assert "other samples" not in said(found["scores"])

    when = TIMING[0]["finished_at"]
    assert [said(row) for row in found["time_and_memory"].iter("tr")][1:] == [
        f"autoencoder 0 to 40 steps 8.0 s 5.00/s 1.50 GiB 2 × cpu {when}",
        f"autoencoder 40 to 60 steps 1 h 00 min 0.00556/s 1.50 GiB 2 × cpu {when}",
        f"generate 0 to 12 texts 1 min 01 s 0.197/s 1.50 GiB 2 × cpu {when}",
        "all 1 h 01 min",
    ]
    assert "jax 0.9.9" in said(found["versions"])
    assert "8 × H100 <80 GB>" in said(found["versions"])


def test_sources_and_references(workdir):
    rows = [{"text": "", "source": "a question", "reference": "its answer"}]
    write_lines(workdir / "samples.jsonl", rows)
    (card,) = sections(page(workdir))["samples"].findall(".//article")
    assert [said(part) for part in card.iter("p")] == [
        "source",
        "a question",
        "generated",
        "(empty)",
        "reference",
        "its answer",
    ]


def test_a_run_that_has_just_begun(tmp_path):
    workdir = begin(tmp_path / "new")
    found = sections(page(workdir))
    assert list(found) == ["status", "configuration"]
    rows = [said(row) for row in found["status"].iter("li")]
    assert rows == [
        f"{name} not begun" for name in "autoencoder diffusion generate evaluate".split()
    ]


def test_a_run_that_is_distilled(tmp_path):
    fields = {"distillation.steps": 40, "distillation.num_sampling_steps": 4}
    workdir = begin(tmp_path / "fast", **fields)
    write_lines(workdir / "metrics.jsonl", metrics("distillation", 20))
    found = sections(page(workdir))
    rows = [said(row) for row in found["status"].iter("li")]
    assert rows[2] == "distillation 20 of 40 steps"
    assert "generation in 4 steps, distilled." in said(found["configuration"])
    assert "distillation.steps 40 0" in [said(r) for r in found["configuration"].iter("li")]
    (plot,) = found["loss"].xpath(".//*[@role='img']")
    assert plot.get("aria-label").startswith("Loss of the distillation")


def test_half_way_through_training(tmp_path):
    workdir = begin(tmp_path / "half")
    lines = "".join(json.dumps(line) + "\n" for line in metrics("autoencoder", 60)[:16])
    (workdir / "metrics.jsonl").write_text(lines + '{"stage": "autoencoder", "st')
    root = page(workdir)
    found = sections(root)
    assert list(found) == ["status", "configuration", "loss"]
    assert not root.xpath("//*[@id='notes']")  # a line cut off by a kill is nothing to note
    assert said(next(found["status"].iter("li"))) == "autoencoder 30 of 60 steps"
    assert said(next(found["loss"].iter("tr"))) == "held-out step 0"
    assert "width: 50.0%" in found["status"].xpath(".//i/@style")[0]


def test_half_way_through_results(workdir):
    (workdir / "samples.jsonl").rename(workdir / "samples.partial.jsonl")
    write_lines(workdir / "samples.partial.jsonl", SAMPLES[:9])
    (workdir / "evaluation.json").rename(workdir / "evaluation.partial.json")
    rows = [said(row) for row in sections(page(workdir))["status"].iter("li")]
    assert rows[2:] == ["generate 9 of 12 texts", "evaluate 2 scores"]


def test_stages_that_were_trained_elsewhere(tmp_path):
    """Nothing but checkpoints tells how far a converted run is."""
    workdir = begin(tmp_path / "run", **{"autoencoder.pretrained": "runs/other"})
    (workdir / "diffusion" / "150").mkdir(parents=True)
    (workdir / "diffusion" / "175.orbax-checkpoint-tmp").mkdir()
    rows = [said(row) for row in sections(page(workdir))["status"].iter("li")]
    assert rows[:2] == ["autoencoder taken from runs/other", "diffusion 150 of 200 steps"]


def test_scores_of_other_samples_are_called_so(workdir):
    identity = {"identity": {"samples_sha256": "0" * 64}}
    (workdir / "evaluation.json").write_text(json.dumps(EVALUATION | identity))
    assert "scores of other samples" in said(sections(page(workdir))["scores"])


def test_losses_that_are_not_finite_are_counted(workdir):
    lines = metrics("autoencoder", 60)
    for line in lines[-4:]:
        line["loss"] = float("nan")
    write_lines(workdir / "metrics.jsonl", lines)
    loss = sections(page(workdir))["loss"]
    assert "not finite, and not in the plot: 4" in said(loss)
    assert "nan" not in loss.find(".//svg").text_content().lower()


def test_hostile_texts_are_only_texts(workdir):
    """Every string in every file; they are there to the last letter."""

    def poison(value):
        if isinstance(value, str):
            return HOSTILE
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return value

    clean = page(workdir)
    evaluation = {
        **poison(EVALUATION),
        "scores": {HOSTILE: poison(EVALUATION["scores"]["mauve*"])},
        "held_out": {HOSTILE: {HOSTILE: 1.5}},
        "problems": {HOSTILE: HOSTILE},
        "versions": {HOSTILE: HOSTILE},
    }
    (workdir / "evaluation.json").write_text(json.dumps(evaluation))
    (workdir / "examples.json").write_text(json.dumps(poison(EXAMPLES)))
    write_lines(workdir / "timing.jsonl", poison(TIMING))
    rows = [{"text": HOSTILE, "source": HOSTILE, "reference": HOSTILE}]
    write_lines(workdir / "samples.jsonl", rows)
    begin(workdir, **{"data.source": HOSTILE})
    lines = metrics("autoencoder", 60)
    lines[-1][f"validation_{HOSTILE}"] = 1.0
    lines[-1][HOSTILE] = 1.0
    write_lines(workdir / "metrics.jsonl", [{"stage": HOSTILE, "step": 1, "loss": 1.0}, *lines])

    root = page(workdir)
    assert list(sections(root)) == SECTIONS
    assert not root.xpath("//script | //img | //*[@onerror]")
    assert {e.tag for e in root.iter()} <= {e.tag for e in clean.iter()}
    shown = HOSTILE.replace("\x00", "\ufffd").replace("\x1b", "\ufffd").replace("\ud800", "\ufffd")
    for section in SECTIONS[1:]:
        if section != "loss":  # whose figures have names with spaces for low lines
            assert shown in sections(root)[section].text_content(), section


def test_nothing_lies_elsewhere(workdir):
    html = report.write(workdir).read_text(encoding="utf-8")
    root = lxml.html.fromstring(html)
    references = root.xpath("//@href | //@src | //@srcset | //@action | //@data | //@poster")
    ids = root.xpath("//@id")
    assert len(references) > len(SECTIONS)
    assert {reference.lstrip("#") for reference in references} <= set(ids)
    assert all(reference.startswith("#") for reference in references)
    assert len(ids) == len(set(ids))
    assert "@import" not in html
    assert {part.partition(")")[0] for part in html.split("url(")[1:]} <= {f"#{i}" for i in ids}
    assert "//" not in html.replace("http://www.w3.org/", "")  # a name space is not fetched
    assert not root.xpath("//script | //link | //iframe | //object | //embed | //form")


FILES = ["metrics.jsonl", "samples.jsonl", "timing.jsonl", "examples.json", "evaluation.json"]


@pytest.mark.parametrize("name", FILES)
def test_each_file_is_optional(workdir, name):
    (workdir / name).unlink()
    root = page(workdir)
    left_out = {
        "metrics.jsonl": {"loss"},
        "samples.jsonl": {"samples"},
        "timing.jsonl": {"time_and_memory"},
        "examples.json": {"reconstructions", "interpolation"},
        "evaluation.json": {"scores", "versions"},
    }[name]
    assert set(SECTIONS) - sections(root).keys() == left_out
    assert not root.xpath("//*[@id='notes']")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe\x00 not text\n\n",
        b'[1, "two"]\n3\n',
        b'{"stage": "diffusion", "step": 5, "loss": "low", "scores": 3,'
        b' "reconstructions": [[1]], "interpolation": 5}\n',
        b'{"stage": "autoencoder", "step": "x", "text": 5, "scores": {"a": {}}, "real": 7,'
        b' "reconstructions": [{"tokens": [[1, 2, 3]]}], "interpolation": {"path": [{}]}}\n',
        b"[" * 100_000 + b"\n\n",
    ],
    ids=["empty", "binary", "list", "types", "parts", "deep"],
)
def test_damage_leaves_the_rest_readable(workdir, name, content):
    (workdir / name).write_bytes(content)
    root = page(workdir)
    missing = set(SECTIONS) - sections(root).keys()
    assert (
        missing
        <= {
            "metrics.jsonl": {"loss", "status"},
            "samples.jsonl": {"samples"},
            "timing.jsonl": {"time_and_memory"},
            "examples.json": {"reconstructions", "interpolation", "samples"},
            "evaluation.json": {"scores", "versions", "status"},
        }[name]
    )
    if content:
        (notes,) = root.xpath("//*[@id='notes']")
        # The file by its name, or the section that could not be made of it.
        words = [name, *(part.replace("_", " ").capitalize() for part in missing)]
        assert any(word in said(notes) for word in words)


def test_a_folder_in_place_of_a_file(workdir):
    for name in FILES:
        (workdir / name).unlink()
        (workdir / name).mkdir()
    root = page(workdir)
    assert list(sections(root)) == ["status", "configuration"]
    assert all(name in said(root.xpath("//*[@id='notes']")[0]) for name in FILES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no config.json; give the folder of a run"),
        ("[]", "not a config"),
        ("{", "cannot be read"),
        ('{"a.b": {"c": 1}}', "not a config"),
    ],
)
def test_a_folder_that_is_no_run(tmp_path, content, message):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(UserError, match=message) as error:
        report.write(tmp_path)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


def test_a_page_that_cannot_be_written_stays_as_it_was(workdir, monkeypatch):
    old = report.write(workdir).read_bytes()
    write_lines(workdir / "samples.jsonl", SAMPLES[:1])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("cosmos_jax.workdir.os.fsync", full)
    with pytest.raises(UserError, match=r"report\.html: cannot be written: No space left"):
        report.write(workdir)
    metrics_lib.write_report(workdir)  # does not raise
    assert (workdir / "report.html").read_bytes() == old
    assert not list(workdir.glob(".*"))


def test_a_page_of_a_long_run_is_small(workdir):
    write_lines(workdir / "metrics.jsonl", metrics("diffusion", 20_000))
    write_lines(workdir / "samples.jsonl", [{"text": "word " * 20_000}] * 2_000)
    assert report.write(workdir).stat().st_size < 1_000_000


def test_smooth_is_a_mean_around_each_point():
    values = np.random.default_rng(0).normal(size=200)
    expected = []
    for i in range(200):
        half = min(i, 5)
        expected.append(values[i - half : i + half + 1].mean())
    np.testing.assert_allclose(report.smooth(values), expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(report.smooth(values[:5]), values[:5])


def test_the_command(workdir, tmp_path):
    def command(*arguments):
        return subprocess.run(
            [sys.executable, "-m", "cosmos_jax.report", *arguments],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = command(f"--workdir={workdir}")
    assert (done.returncode, done.stdout) == (0, f"{workdir / 'report.html'}\n"), done.stderr
    assert "<h1>stories</h1>" in (workdir / "report.html").read_text(encoding="utf-8")
    refused = command(f"--workdir={tmp_path}")
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {tmp_path}: no config.json; give the folder of a run as --workdir\n"
    )


BROWSERS = map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))
CHROMIUM = next(filter(None, BROWSERS), None)

# Loads the page in frames of several widths and says how wide what is in each of them is.
PROBE = """<!doctype html><body><script>
onload = () => {{
  for (const frame of document.querySelectorAll("iframe")) {{
    const root = frame.contentDocument.documentElement;
    const outside = [...root.querySelectorAll("body *")].filter(
      (e) => !e.closest(".line, svg *, .unseen") &&
        e.getBoundingClientRect().right > root.clientWidth + 1);
    frame.before(`[${{root.clientWidth}} ${{root.scrollWidth}} ${{outside.length}}]`);
  }}
}};
</script>{frames}</body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("hostile", [False, True])
def test_no_page_is_wider_than_its_window(workdir, hostile):
    if hostile:
        word = "w" * 3_000
        examples = json.loads(json.dumps(EXAMPLES).replace("serpent", word).replace("garden", word))
        (workdir / "examples.json").write_text(json.dumps(examples))
        write_lines(workdir / "samples.jsonl", [{"text": word, "source": word, "reference": word}])
        scores = {word: EVALUATION["scores"]["mauve*"] | {"protocol": word, "signature": word}}
        evaluation = EVALUATION | {"scores": scores, "versions": {word: word}}
        (workdir / "evaluation.json").write_text(json.dumps(evaluation))
        begin(workdir, **{"data.source": word})
    report.write(workdir)
    widths = (360, 390, 1280)
    frames = "".join(
        f'<iframe src="report.html" style="width: {width}px; height: 900px; border: 0"></iframe>'
        for width in widths
    )
    probe = workdir / "probe.html"
    probe.write_text(PROBE.format(frames=frames))
    done = subprocess.run(
        [
            CHROMIUM,
            *"--headless --no-sandbox --disable-gpu --disable-quic --no-first-run".split(),
            *"--disable-background-networking --disable-component-update --disable-sync".split(),
            *"--hide-scrollbars --allow-file-access-from-files --dump-dom".split(),
            f"--user-data-dir={workdir.parent / 'chromium'}",
            probe.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert [f"[{width} {width} 0]" in done.stdout for width in widths] == [True] * 3, (
        done.stdout[-500:] + done.stderr[-500:]
    )


def test_a_run_does_without_a_page(workdir, monkeypatch, caplog):
    """Accelerators may lack what draws it: that is said once, and the run goes on."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "cosmos_jax.report")
    monkeypatch.delattr("cosmos_jax.report")
    monkeypatch.setattr(logging.getLogger("cosmos_jax"), "propagate", True)
    metrics_lib._say_once.cache_clear()
    for _ in range(2):
        metrics_lib.write_report(workdir)
    assert [r.getMessage().startswith("no report.html: ") for r in caplog.records] == [True]
    assert not (workdir / "report.html").exists()
