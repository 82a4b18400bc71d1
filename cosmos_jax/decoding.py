"""Generation by the autoregressive baseline: one compiled function, a loop over positions.

The loop stops when all texts have ended; what follows the end of a text is [SEP].

Shape letters: B batch, W beams of a text, L positions, C candidates, V vocabulary.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from ml_collections import ConfigDict

from cosmos_jax.models.autoregressive import Autoregressive
from cosmos_jax.models.states import Weights
from cosmos_jax.sharding import split_batch
from cosmos_jax.stages.base import Source

Step = Callable[..., tuple[jax.Array, Any]]
"""(rows [B, W], position, visible [B, W, places], cache) -> logits [B, W, V], the next cache."""
State = dict[str, Any]
"""What a loop changes: position, cache, done [B], and more."""

# A step reads all of the cache, so it grows in parts: this many, none shorter than so.
NUM_PARTS, SHORTEST_PART = 4, 32


def make_generator(
    config: ConfigDict, model: Autoregressive
) -> Callable[[Weights, jax.Array, Source | None], jax.Array]:
    """(weights, keys [B], source) -> token ids [B, L] int32.

    A text is a function of its own key and source, not of the batch around it.
    """
    decode = make_decoder(config, model)
    return lambda weights, keys_B, source: decode(weights, keys_B, source)[0]


def make_decoder(
    config: ConfigDict, model: Autoregressive
) -> Callable[[Weights, jax.Array, Source | None], tuple[jax.Array, jax.Array]]:
    """As `make_generator`, and how many positions the decoder went through."""
    settings, length = config.autoregressive, config.data.max_length

    def decode(
        weights: Weights, keys_B: jax.Array, source: Source | None
    ) -> tuple[jax.Array, jax.Array]:
        params = model.for_decoding(weights)
        read = None
        if source is not None:
            states_BxSxD = model.text_states(weights, *source)
            read = jax.tree.map(split_batch, model.read_source(params, states_BxSxD, source[1]))

        def step(*inputs: Any) -> tuple[jax.Array, Any]:
            return model.step(params, *inputs, read)

        start, end = (weights["head_index"][weights[name]] for name in ("start", "end"))
        rows_BxL = jnp.full((keys_B.shape[0], length), end).at[:, 0].set(start)
        state: State = {
            "position": jnp.int32(0),
            "cache": model.empty_cache(keys_B.shape[0]),
            "done": jnp.zeros(keys_B.shape[0], bool),
        }
        if settings.decoding == "beam":
            state |= _start_beams(rows_BxL, settings.num_beams)
            advance = _beam_search(step, end, settings.num_beams, settings.length_penalty)
            state = _run(advance, state, length, settings.num_beams)
            rows_BxL = state["finished"][:, 0]
        else:
            state["rows"] = rows_BxL
            state = _run(_one_by_one(step, end, _choice(settings, keys_B)), state, length, 1)
            rows_BxL = state["rows"]
        return weights["vocabulary"][rows_BxL], state["position"]

    return decode


def _run(advance: Callable[[State], State], state: State, length: int, beams: int) -> State:
    """Advances until all texts are done or full; the last position needs no step."""
    part = max(SHORTEST_PART, math.ceil((length - 1) / NUM_PARTS))
    for start in range(0, length - 1, part):
        stop = min(start + part, length - 1)
        state["cache"] = _grow(state["cache"], (stop - start) * beams)
        state = lax.while_loop(functools.partial(_before, stop), advance, state)
    return state


def _grow(cache: Any, num_places: int) -> Any:
    return jax.tree.map(
        lambda entry: split_batch(jnp.pad(entry, ((0, 0), (0, 0), (0, num_places), (0, 0)))), cache
    )


def _before(stop: int, state: State) -> jax.Array:
    return (state["position"] < stop) & ~jnp.all(state["done"])


# One text at a time for each key


def _one_by_one(
    step: Step, end: jax.Array, choose: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[State], State]:
    def advance(state: State) -> State:
        position, rows_BxL, done_B = state["position"], state["rows"], state["done"]
        now_Bx1 = lax.dynamic_slice_in_dim(rows_BxL, position, 1, axis=1)
        places = jnp.arange(_num_places(state["cache"]))
        logits_Bx1xV, cache = step(
            now_Bx1, position, (places <= position)[None, None], state["cache"]
        )
        next_B = jnp.where(done_B, end, choose(logits_Bx1xV[:, 0], position))
        return {
            "position": position + 1,
            "cache": cache,
            "done": done_B | (next_B == end),
            "rows": lax.dynamic_update_slice_in_dim(rows_BxL, next_B[:, None], position + 1, 1),
        }

    return advance


def _num_places(cache: Any) -> int:
    return jax.tree.leaves(cache)[0].shape[2]


def _choice(settings: ConfigDict, keys_B: jax.Array) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(logits [B, V], position) -> rows [B]."""
    if settings.decoding == "greedy":
        return lambda logits_BxV, position: likeliest(logits_BxV)

    def choose(logits_BxV: jax.Array, position: jax.Array) -> jax.Array:
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, position)
        return draw_from_nucleus(keys, logits_BxV / settings.temperature, settings.top_p)

    return choose


def likeliest(logits_BxV: jax.Array) -> jax.Array:
    """Argmax, [B] int32, as two plain reductions, which a CPU does eight times as fast."""
    size = logits_BxV.shape[1]
    greatest_Bx1 = jnp.max(logits_BxV, axis=1, keepdims=True)
    rows_BxV = jnp.where(logits_BxV == greatest_Bx1, jnp.arange(size, dtype=jnp.int32), size - 1)
    return jnp.min(rows_BxV, axis=1)


def draw_from_nucleus(keys_B: jax.Array, logits_BxV: jax.Array, top_p: float) -> jax.Array:
    """A row for each text from the smallest set of likeliest rows that holds `top_p`; [B] int32.

    A row is in that set if the rows that are likelier hold less than `top_p`, so nothing need be
    sorted: draw, look whether the row is in the set, and if not draw again from the rows that are
    likelier than it, which hold the whole set. With `top_p` near 1 the first draw nearly always
    stands. Rows as likely as the last of the set are in it too.
    """
    weights_BxV = jnp.exp(logits_BxV - jnp.max(logits_BxV, axis=-1, keepdims=True))
    enough_B = top_p * jnp.sum(weights_BxV, axis=-1)

    def above(floor_B: jax.Array) -> jax.Array:
        return jnp.where(weights_BxV > floor_B[:, None], weights_BxV, 0)

    def attempt(state):
        count, row_B, floor_B, accepted_B = state
        keys = jax.vmap(jax.random.fold_in, (0, None))(keys_B, count)
        row_B = jnp.where(accepted_B, row_B, jax.vmap(_categorical)(keys, above(floor_B)))
        weight_B = jnp.take_along_axis(weights_BxV, row_B[:, None], axis=1)[:, 0]
        # Worded so that NaN does not go on for ever.
        accepted_B = ~(jnp.sum(above(weight_B), axis=-1) >= enough_B) | (top_p >= 1)
        return count + 1, row_B, weight_B, accepted_B

    zeros_B = jnp.zeros(keys_B.shape[0])
    state = (jnp.int32(0), zeros_B.astype(jnp.int32), zeros_B, zeros_B > 0)
    return lax.while_loop(lambda state: ~jnp.all(state[3]), attempt, state)[1]


def _categorical(key: jax.Array, weights_V: jax.Array) -> jax.Array:
    """A row in proportion to its weight: first a block of rows, then the row in it.

    It takes some 2 sqrt(V) random numbers instead of V.
    """
    size = math.isqrt(weights_V.shape[0] - 1) + 1
    blocks = jnp.pad(weights_V, (0, -weights_V.shape[0] % size)).reshape(-1, size)
    block_key, row_key = jax.random.split(key)
    block = jax.random.categorical(block_key, jnp.log(jnp.sum(blocks, axis=1)))
    row = jax.random.categorical(row_key, jnp.log(blocks[block]))
    return (block * size + row).astype(jnp.int32)


# Beam search


def _start_beams(rows_BxL: jax.Array, beams: int) -> State:
    """All beams are alike at first, and only one counts."""
    batch, length = rows_BxL.shape
    rows_BxWxL = jnp.repeat(rows_BxL[:, None], beams, axis=1)
    nothing_BxW = jnp.full((batch, beams), -jnp.inf)
    return {
        "rows": rows_BxWxL,
        "scores": nothing_BxW.at[:, 0].set(0.0),
        "places": jnp.zeros((batch, beams, length), jnp.int32),
        "finished": rows_BxWxL,
        "finished_scores": nothing_BxW,
    }


def _beam_search(
    step: Step, end: jax.Array, beams: int, length_penalty: float
) -> Callable[[State], State]:
    """Hypotheses of a text compete by log probability / length ** `length_penalty`.

    Length is the number of tokens after [CLS], with [SEP]. As in transformers, of the best 2 W
    continuations of the W beams those among the first W that end join the W best finished
    hypotheses, and the best W that do not end go on. A text is done when its best beam, at the
    length it has, is no better than the worst of W finished hypotheses.
    """
    beams_W = jnp.arange(beams)

    def advance(state: State) -> State:
        position, done_B = state["position"], state["done"]
        batch, _, length = state["rows"].shape
        texts_Bx1 = jnp.arange(batch)[:, None]

        # `places` says which beam's place in the cache holds each token of a beam's past.
        is_now = jnp.arange(length) == position
        places_BxWxL = jnp.where(is_now, beams_W[:, None], state["places"])
        past = jnp.arange(_num_places(state["cache"]) // beams)
        visible = (places_BxWxL[:, :, past, None] == beams_W) & (past <= position)[:, None]
        now_BxW = lax.dynamic_index_in_dim(state["rows"], position, 2, keepdims=False)
        logits_BxWxV, cache = step(
            now_BxW, position, visible.reshape(batch, beams, -1), state["cache"]
        )

        scores_BxC, beam_BxC, row_BxC = _continuations(logits_BxWxV, state["scores"], 2 * beams)
        rows_BxCxL = jnp.where(
            jnp.arange(length) == position + 1,
            row_BxC[..., None],
            state["rows"][texts_Bx1, beam_BxC],
        )
        # What reaches the last position ends there.
        ends_BxC = (row_BxC == end) | (position + 2 == length)

        penalty = (position + 1).astype(jnp.float32) ** length_penalty
        joins_BxC = ends_BxC & (jnp.arange(scores_BxC.shape[1]) < beams) & ~done_B[:, None]
        joining_BxC = jnp.where(joins_BxC, scores_BxC / penalty, -jnp.inf)
        finished_scores, best = lax.top_k(
            jnp.concatenate([state["finished_scores"], joining_BxC], axis=1), beams
        )
        finished = jnp.concatenate([state["finished"], rows_BxCxL], axis=1)[texts_Bx1, best]

        scores_BxW, best = lax.top_k(jnp.where(ends_BxC, -jnp.inf, scores_BxC), beams)
        return {
            "position": position + 1,
            "cache": cache,
            "done": done_B | (finished_scores[:, -1] >= scores_BxW[:, 0] / penalty),
            "rows": rows_BxCxL[texts_Bx1, best],
            "scores": scores_BxW,
            "places": places_BxWxL[texts_Bx1, beam_BxC[texts_Bx1, best]],
            "finished": finished,
            "finished_scores": finished_scores,
        }

    return advance


def _continuations(
    logits_BxWxV: jax.Array, scores_BxW: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best continuations of all beams: log probability, beam and row, each [B, C]."""
    batch, beams, vocabulary = logits_BxWxV.shape
    each = min(count, vocabulary)
    best, rows = lax.top_k(logits_BxWxV, each)
    totals = best + (scores_BxW - jax.nn.logsumexp(logits_BxWxV, axis=-1))[..., None]
    scores_BxC, index_BxC = lax.top_k(totals.reshape(batch, -1), min(count, beams * each))
    rows_BxC = jnp.take_along_axis(rows.reshape(batch, -1), index_BxC, axis=1)
    return scores_BxC, index_BxC // each, rows_BxC
