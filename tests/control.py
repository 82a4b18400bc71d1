"""Measures what infilling, edits and guides do to held-out texts.

PYTHONPATH=. python tests/control.py --model=demo/sentences --out=control.json

The model is one of the text in the package, of passages or of sentences. Fluency is
perplexity under a trigram model of the training texts, so it compares within one table only.
"""

import gzip
import json
from pathlib import Path

import jax
import numpy as np
import sacrebleu
from absl import flags

import cosmos_jax
from cosmos_jax import commands, editing
from cosmos_jax.data import documents, tokens
from cosmos_jax.scores.ngram_model import NgramModel
from cosmos_jax.stages.base import row_keys

CORPUS = Path(cosmos_jax.__file__).parent / "data" / "corpus"
HIDDEN = (0.15, 0.3, 0.5)
STRENGTHS = (0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 0.95)
SCALES = (0.0, 1.0, 4.0, 16.0)
# Of the held-out passages the first are from the Bible, the others from novels.
FROM_THE_BIBLE = {"valid": 739, "test": 752}


def read(model: cosmos_jax.Model, split: str) -> tuple[list[str], np.ndarray]:
    """The texts of a split in the form that the model knows, and which of them are the Bible's."""
    with gzip.open(CORPUS / f"{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        passages = [json.loads(line)["text"] for line in lines]
    texts, is_bible = [], []
    whole = model.config.data.source != "sentences"
    for number, passage in enumerate(passages):
        for text in [passage] if whole else documents.sentences(passage):
            texts.append(text)
            is_bible.append(number < FROM_THE_BIBLE.get(split, 0))
    return texts, np.array(is_bible)


def spread(texts: list[str], num: int) -> list[str]:
    return [texts[i * len(texts) // num] for i in range(num)]


def infilling(model: cosmos_jax.Model, texts: list[str], fluency: NgramModel) -> list[dict]:
    """A span of each text hidden, a share of its tokens; what became of the others."""
    encoded = tokens.encode(model.tokenizer, texts, model.config.data.max_length)
    infill = jax.jit(editing.make_infiller(model.config, model.system))

    @jax.jit
    def autoencoder(weights, ids, mask, given):
        return editing.decode(
            model.system, weights, editing.encode(model.system, weights, ids, mask, given)
        )

    rng = np.random.default_rng(0)
    ids, mask = encoded.ids_BxL, encoded.mask_BxL
    rows = []
    for share in HIDDEN:
        hidden = np.zeros_like(mask)
        for i, length in enumerate(mask.sum(axis=1)):
            count = max(1, round(share * (length - 2)))
            start = rng.integers(1, length - count)
            hidden[i, start : start + count] = True
        given = mask & ~hidden
        masked = np.where(hidden, model.tokenizer.mask_token_id, ids)
        keys = row_keys(jax.random.key(0), np.arange(len(ids)))
        with jax.set_mesh(model.mesh):
            found = np.asarray(infill(model.weights, keys, masked, mask, given))
            without = np.asarray(autoencoder(model.weights, masked, mask, given))
        exact = np.where(given, ids, found)
        random = ids.copy()
        random[hidden] = rng.choice(ids[given & (ids > 200)], hidden.sum())

        def perplexity(some: np.ndarray) -> float:
            return fluency.perplexity(tokens.decode(model.tokenizer, some))

        special = np.isin(ids, model.tokenizer.all_special_ids)
        counted = given & ~special
        rows.append(
            {
                "hidden": share,
                "given tokens kept": float((found == ids)[counted].mean()),
                "kept by the autoencoder alone": float((without == ids)[counted].mean()),
                "hidden tokens found again": float((found == ids)[hidden].mean()),
                "perplexity": perplexity(exact),
                "of the true texts": perplexity(ids),
                "of random words in the gaps": perplexity(random),
            }
        )
    return rows


def edits(model: cosmos_jax.Model, texts: list[str], fluency: NgramModel) -> list[dict]:
    """How near to the text an edit stays, and how it reads."""
    real = tokens.round_trip(model.tokenizer, texts, model.config.data.max_length)
    rows = []
    for strength in STRENGTHS:
        found = model.edit(texts, strength)
        rows.append(
            {
                "strength": strength,
                "BLEU with the text": sacrebleu.corpus_bleu(found, [real]).score,
                "perplexity": fluency.perplexity(found),
            }
        )
    return rows


def classifier(model: cosmos_jax.Model, texts: list[str], is_bible: np.ndarray) -> np.ndarray:
    """Weights [N * D] of a linear one by regularised least squares on latents."""
    z = model.encode(texts).reshape(len(texts), -1)
    target = np.where(is_bible, 1.0, -1.0)
    gram = z @ z.T + 0.1 * z.shape[1] * np.eye(len(z))
    return (z.T @ np.linalg.solve(gram, target)).astype(np.float32)


def guides(model: cosmos_jax.Model, num: int, fluency: NgramModel) -> list[dict]:
    """A classifier learned on one half of the held-out texts steers, that of the other judges."""
    learned = {split: classifier(model, *read(model, split)) for split in FROM_THE_BIBLE}
    texts, is_bible = read(model, "valid")
    z = model.encode(texts).reshape(len(texts), -1)
    right = ((z @ learned["test"]) > 0) == is_bible
    rows = []
    for name, sign in (("Bible", 1.0), ("novel", -1.0)):
        direction = sign * learned["test"] / np.abs(learned["test"]).mean() / 100

        def guide(latents: jax.Array, _: jax.Array, direction=direction) -> jax.Array:
            return latents.reshape(len(latents), -1) @ direction

        for scale in SCALES:
            found = model.generate(num, guide=guide, guide_scale=scale)
            again = model.encode([text or "." for text in found]).reshape(num, -1)
            rows.append(
                {
                    "towards": name,
                    "scale": scale,
                    "taken for the Bible": float((again @ learned["valid"] > 0).mean()),
                    "perplexity": fluency.perplexity([text for text in found if text]),
                    "the classifier is right of real texts": float(right.mean()),
                }
            )
    return rows


def main(argv: list[str]) -> None:
    commands.check_arguments(argv)
    num = flags.FLAGS.num
    model = cosmos_jax.load(flags.FLAGS.model)
    texts = spread(read(model, "test")[0], num)
    form = tokens.round_trip(model.tokenizer, read(model, "train")[0], model.config.data.max_length)
    fluency = NgramModel().fit(form)
    result = {
        "model": model.identity,
        "texts": num,
        "infilling": infilling(model, texts, fluency),
        "edits": edits(model, texts, fluency),
        "guides": guides(model, num, fluency),
    }
    for name in ("infilling", "edits", "guides"):
        rows = result[name]
        print(f"\n{name}\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows:
            cells = (f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values())
            print(f"| {' | '.join(cells)} |")
    if flags.FLAGS.out:
        Path(flags.FLAGS.out).write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    flags.DEFINE_string("model", "demo/sentences", "A model of the text in the package.")
    flags.DEFINE_integer("num", 256, "Texts.")
    flags.DEFINE_string("out", "", "JSON of all figures.")
    commands.run(main)
