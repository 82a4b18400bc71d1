"""BERTScore (Zhang et al., 2020): texts compared by the states of their tokens.

With c_i and r_j the states of a candidate's and a reference's tokens after a layer, each of
length 1, and w their weights:

    (1) P = sum_i w(c_i) max_j c_i . r_j / sum_i w(c_i)
    (2) R = sum_j w(r_j) max_i c_i . r_j / sum_j w(r_j)
    (3) F = 2 P R / (P + R)

Weights are 1, or with idf log((M + 1) / (m + 1)) for a token in m of the M references. [CLS] and
[SEP] can be a best match but weigh 0. The bert-score package, whose numbers these are, lets a
padding token be a match of cosine 0, so there a negative best match depends on the batch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cosmos_jax.encoder import TextEncoder
from cosmos_jax.errors import UserError
from cosmos_jax.models.bert import Bert, BertConfig, Params, RobertaConfig
from cosmos_jax.scores import score
from cosmos_jax.scores.batches import padded_batches
from cosmos_jax.scores.embeddings import longest, token_ids
from cosmos_jax.scores.score import Flag, Score

NAMES = ("bertscore_precision", "bertscore_recall", "bertscore_f1")

# The layers that agree best with people, from the table of the bert-score package; the last
# layer of all others. The package does not know bert-base-cased: that of its siblings.
LAYERS = {
    "bert-base-cased": 9,
    "bert-base-uncased": 9,
    "bert-base-multilingual-cased": 9,
    "bert-large-uncased": 18,
    "roberta-base": 10,
    "roberta-large": 17,
    "roberta-large-mnli": 19,
}


def bertscore(
    encoder: TextEncoder,
    candidates: Sequence[str],
    references: Sequence[str],
    *,
    layer: int | None = None,
    idf: bool = False,
    baseline: tuple[float, float, float] | None = None,
) -> dict[str, Score]:
    """The means over pairs of equations (1) to (3), under `NAMES`.

    Args:
      layer: whose states are compared, from 1; None chooses by the model's name (`LAYERS`).
      idf: whether rare tokens weigh more.
      baseline: b of precision, recall and F for rescaling, (x - b) / (1 - b).

    Raises:
      UserError: there are no pairs, a text has no token or none that weighs anything, or the
        encoder has no such layer.
    """
    config = encoder.config
    if layer is None:
        layer = min(
            LAYERS.get(encoder.name.rpartition("/")[2], config.num_layers), config.num_layers
        )
    if not 1 <= layer <= config.num_layers:
        raise UserError(
            f"BERTScore: {encoder.name} has no layer {layer}, but layers 1 to {config.num_layers}"
        )
    if len(candidates) != len(references):
        raise UserError(
            f"BERTScore: {len(candidates)} candidates for {len(references)} references; pairs are"
            " needed"
        )
    scores_Nx3, flags = _of_pairs(encoder, candidates, references, layer, idf)
    if baseline is not None:
        base_3 = np.array(baseline)
        scores_Nx3 = (scores_Nx3 - base_3) / (1 - base_3)
    flags |= {"rescaled": ",".join(map(str, baseline)) if baseline else False}
    return {
        name: Score(**score.mean(scores_N.tolist(), "pairs"), flags=flags)
        for name, scores_N in zip(NAMES, scores_Nx3.T, strict=True)
    }


def _of_pairs(
    encoder: TextEncoder,
    candidates: Sequence[str],
    references: Sequence[str],
    layer: int,
    idf: bool,
) -> tuple[np.ndarray, dict[str, Flag]]:
    """Equations (1) to (3) for each pair, [N, 3] in float64, and how they were made."""
    max_length = longest(encoder.tokenizer, encoder.config)
    # RoBERTa's tokens of a word tell whether a space is before it; as in the package, one is.
    space = " " if isinstance(encoder.config, RobertaConfig) else ""
    (candidate_ids, cut), (reference_ids, reference_cut) = (
        token_ids(encoder.tokenizer, [space + text.strip() for text in texts], max_length, what)
        for texts, what in ((candidates, "candidates"), (references, "references"))
    )
    weights_V = _weights(encoder, reference_ids, idf)
    for ids, what in ((candidate_ids, "candidate"), (reference_ids, "reference")):
        for number, row in enumerate(ids, 1):
            if not weights_V[row].any():
                why = ", as all references have them: score without idf" if idf else ""
                raise UserError(f"BERTScore: the tokens of {what} {number} weigh nothing{why}")

    config = dataclasses.replace(encoder.config, num_layers=layer)
    unused = {f"layers_{i}" for i in range(layer, encoder.config.num_layers)}
    params = jax.device_put({k: v for k, v in encoder.params.items() if k not in unused})
    scores_Nx3 = np.empty((len(candidates), 3))
    longer = [max(pair, key=len) for pair in zip(candidate_ids, reference_ids, strict=True)]
    for indices_T, longer_BxL, _ in padded_batches(longer, max_length):
        ids_2xBxL = np.full((2, *longer_BxL.shape), encoder.tokenizer.pad_token_id, np.int32)
        mask_2xBxL = np.zeros(ids_2xBxL.shape, bool)
        mask_2xBxL[:, :, 0] = True
        for i, index in enumerate(indices_T):
            for side, pair_ids in enumerate((candidate_ids[index], reference_ids[index])):
                ids_2xBxL[side, i, : len(pair_ids)] = pair_ids
                mask_2xBxL[side, i, : len(pair_ids)] = True
        weights_2xBxL = weights_V[ids_2xBxL] * mask_2xBxL
        found_2xB = _precision_and_recall(config, params, ids_2xBxL, mask_2xBxL, weights_2xBxL)
        precision_T, recall_T = np.asarray(found_2xB, np.float64)[:, : len(indices_T)]
        f1_T = 2 * precision_T * recall_T / (precision_T + recall_T)
        scores_Nx3[indices_T] = np.stack((precision_T, recall_T, f1_T), axis=1)
    return scores_Nx3, {
        "model": encoder.name,
        "weights": encoder.fingerprint[:12],
        "layer": layer,
        "idf": idf,
        "max_length": max_length,
        "cut": cut + reference_cut,
    }


def _weights(encoder: TextEncoder, reference_ids: list[list[int]], idf: bool) -> np.ndarray:
    """The weight of every token of the vocabulary."""
    weights_V = np.ones(encoder.config.vocab_size, np.float32)
    if idf:
        counts_V = np.zeros(encoder.config.vocab_size)
        for ids in reference_ids:
            counts_V[np.unique(ids)] += 1
        weights_V = np.log((len(reference_ids) + 1) / (counts_V + 1)).astype(np.float32)
    weights_V[[encoder.tokenizer.cls_token_id, encoder.tokenizer.sep_token_id]] = 0
    return weights_V


@functools.partial(jax.jit, static_argnums=0)
def _precision_and_recall(
    config: BertConfig,
    params: Params,
    ids_2xBxL: jax.Array,
    mask_2xBxL: jax.Array,
    weights_2xBxL: jax.Array,
) -> jax.Array:
    """Equations (1) and (2), [2, B]; candidates are first on the axis of 2."""
    length = ids_2xBxL.shape[-1]
    with jax.default_matmul_precision("float32"):
        states: Any = Bert(config).apply(
            {"params": params}, ids_2xBxL.reshape(-1, length), mask_2xBxL.reshape(-1, length)
        )
        states /= jnp.linalg.norm(states, axis=-1, keepdims=True)
        candidates_BxLxD, references_BxLxD = states.reshape(*ids_2xBxL.shape, -1)
        cosines_BxLxL = jnp.einsum("bid,bjd->bij", candidates_BxLxD, references_BxLxD)
    pairs_BxLxL = mask_2xBxL[0, :, :, None] & mask_2xBxL[1, :, None, :]
    cosines_BxLxL = jnp.where(pairs_BxLxL, cosines_BxLxL, -1.0)
    best_2xBxL = jnp.stack((cosines_BxLxL.max(axis=2), cosines_BxLxL.max(axis=1)))
    return (best_2xBxL * weights_2xBxL).sum(axis=2) / weights_2xBxL.sum(axis=2)
