"""Writes `examples.json`: what the autoencoder makes of some held-out texts, to be looked at."""

from typing import Any

import numpy as np

from cosmos_jax import distributed, latents, pipeline, trained, workdir
from cosmos_jax.data import tokens
from cosmos_jax.data.sources import first_texts
from cosmos_jax.models.cosmos import Cosmos, Weights
from cosmos_jax.run import Run

NUM_RECONSTRUCTIONS = 8
NUM_REAL = 20
NUM_STEPS = 7  # of a path from one text to another


def write(run: Run) -> None:
    """Real texts and, of an autoencoder, reconstructions and a path through the latent space.

    Once for each step of the autoencoder.
    """
    identity: dict[str, Any] = {"data": run.dataset.fingerprint}
    if run.config.system == "cosmos":
        identity["autoencoder_step"] = trained.newest_step(pipeline.autoencoder_directory(run))
    path = run.workdir / "examples.json"
    recorded = distributed.on_first(lambda: workdir.read_json(path))
    if recorded is not None and recorded["identity"] == identity:
        return
    texts = first_texts(run.dataset.test, NUM_REAL)
    found: dict[str, Any] = {
        "identity": identity,
        "real": tokens.round_trip(run.encoder.tokenizer, texts, run.config.data.max_length),
    }
    if run.config.system == "cosmos":
        model, weights = pipeline.trained_autoencoder(run)
        some = texts[:NUM_RECONSTRUCTIONS]
        found["reconstructions"] = reconstructions(run, model, weights, some)
        if len(texts) > 1:
            found["interpolation"] = path_between(run, model, weights, texts[0], texts[1])
    distributed.on_first(lambda: workdir.write_json(path, found))


def reconstructions(
    run: Run, model: Cosmos, weights: Weights, texts: list[str]
) -> list[dict[str, Any]]:
    """For each text its tokens, whether each came back, and what came back in its place."""
    tokenizer = run.encoder.tokenizer
    encoded = tokens.encode(tokenizer, texts, run.config.data.max_length)
    answers_nxL = latents.decode(run, model, weights, latents.encode(run, model, weights, texts))
    special = set(tokenizer.all_special_ids)
    return [
        {
            "text": text,
            "tokens": [
                [tokenizer.decode([token]), bool(token == answer), tokenizer.decode([answer])]
                for token, answer in zip(
                    ids_L[mask_L].tolist(), answers_L[mask_L].tolist(), strict=True
                )
                if token not in special
            ],
        }
        for text, ids_L, mask_L, answers_L in zip(
            texts, encoded.ids_BxL, encoded.mask_BxL, answers_nxL, strict=True
        )
    ]


def path_between(
    run: Run, model: Cosmos, weights: Weights, start: str, end: str, steps: int = NUM_STEPS
) -> dict[str, Any]:
    """Texts decoded from (1 - w) z_start + w z_end for `steps` values of w from 0 to 1."""
    ends_2xNxD = latents.encode(run, model, weights, [start, end])
    weight_S = np.linspace(0, 1, steps, dtype=np.float32)
    path_SxNxD = ends_2xNxD[0] + weight_S[:, None, None] * (ends_2xNxD[1] - ends_2xNxD[0])
    texts = tokens.decode(run.encoder.tokenizer, latents.decode(run, model, weights, path_SxNxD))
    path = [{"weight": float(w), "text": text} for w, text in zip(weight_S, texts, strict=True)]
    return {"from": start, "to": end, "path": path}
