"""From keys, and sources where there are any, to token ids by masked diffusion.

MDLM goes from all masks at t = 1 to none at t = 0 in equal steps. In a step from t to s a masked
position is unmasked with probability (t - s) / t, whatever the text, and gets a token drawn from
what the network says of it. Thus each of T steps is the one in which a position is unmasked with
probability 1/T, independently of all else, and the steps can be drawn before anything else. A step
in which nothing is unmasked leaves the text, and with it what a network without time says, as it
was; leaving such steps out is the paper's cached sampler. Here it is done text by text, since the
network need not know which step a text is at: in its n-th call each text makes the n-th of those
steps in which something happens to it. A batch takes as many calls as the text with most of them,
at most T and at most L - 1, and every text follows exactly the law of T steps.

The head is asked for the positions to unmask alone, a few at a time.

Tokens are drawn by the Gumbel trick. The usual Gumbel noise in fp32 ends near 16, so that unlikely
tokens never come; and where the mask is one of the choices, as in the authors' code, this lowers
the temperature (arXiv 2409.02908). Here the mask is no choice, and the noise is of JAX's mode
"high", which ends near 32: only probabilities below 1e-14 are lost.

Shape letters: B batch, L text positions, M = L - 1 of them masked at first, C positions at a time.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cosmos_jax.models.masked import Masked
from cosmos_jax.models.states import Weights
from cosmos_jax.sharding import split_batch
from cosmos_jax.stages.base import Source


def make_generator(
    config: ConfigDict, model: Masked
) -> Callable[[Weights, jax.Array, Source | None], jax.Array]:
    """(weights, keys [B], source) -> token ids [B, L] int32.

    A text is a function of its own key and source, not of the batch around it.
    """
    length, num_steps = config.data.max_length, config.masked.num_sampling_steps
    num_masks = length - 1
    chunk = -(-num_masks // num_steps)  # as many as a step unmasks on average

    def generate(weights: Weights, keys_B: jax.Array, source: Source | None) -> jax.Array:
        condition: tuple[jax.Array, ...] = ()
        if source is not None:
            states_BxSxD = model.text_states(weights, *source)
            condition = (model.condition(weights, states_BxSxD), source[1])
        step_keys, token_keys = jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
        steps_BxM = unmasking_steps(step_keys, num_masks, num_steps)
        order_BxM = jnp.argsort(steps_BxM, axis=1)
        steps_BxM = jnp.take_along_axis(steps_BxM, order_BxM, axis=1)
        positions_BxM = 1 + order_BxM

        def step(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            """The next step of each text; of its positions, in order, `done_B` are unmasked."""
            rows_BxL, done_B = state
            hidden_BxLxD = model.hidden(weights, rows_BxL, *condition)
            next_Bx1 = jnp.take_along_axis(
                steps_BxM, jnp.minimum(done_B, num_masks - 1)[:, None], axis=1
            )
            goal_B = jnp.sum(steps_BxM <= next_Bx1, axis=1, dtype=jnp.int32)

            def unmask(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                rows_BxL, done_B = state
                index_BxC = done_B[:, None] + jnp.arange(chunk)
                at_BxC = jnp.take_along_axis(
                    positions_BxM, jnp.minimum(index_BxC, num_masks - 1), axis=1
                )
                chosen_BxCxD = jnp.take_along_axis(hidden_BxLxD, at_BxC[..., None], axis=1)
                drawn_BxC = _draw(token_keys, at_BxC, model.logits(weights, chosen_BxCxD))
                # Beyond the goal there is nothing to write: a position that does not exist.
                at_BxC = jnp.where(index_BxC < goal_B[:, None], at_BxC, length)
                rows_BxL = jax.vmap(lambda rows, at, drawn: rows.at[at].set(drawn, mode="drop"))(
                    rows_BxL, at_BxC, drawn_BxC
                )
                return rows_BxL, jnp.minimum(done_B + chunk, goal_B)

            return jax.lax.while_loop(
                lambda state: jnp.any(state[1] < goal_B), unmask, (rows_BxL, done_B)
            )

        rows_BxL = jnp.full((len(keys_B), length), model.mask_row, jnp.int32)
        rows_BxL = split_batch(rows_BxL.at[:, 0].set(weights["head_index"][weights["start"]]))
        done_B = split_batch(jnp.zeros(len(keys_B), jnp.int32))
        rows_BxL, _ = jax.lax.while_loop(
            lambda state: jnp.any(state[1] < num_masks), step, (rows_BxL, done_B)
        )
        return weights["vocabulary"][rows_BxL]

    return generate


def unmasking_steps(keys_B: jax.Array, num_masks: int, num_steps: int) -> jax.Array:
    """The step, from 0 to `num_steps` - 1, in which each mask gives way to a token; [B, M]."""
    return jax.vmap(lambda key: jax.random.randint(key, (num_masks,), 0, num_steps))(keys_B)


def _draw(keys_B: jax.Array, positions_BxC: jax.Array, logits_BxCxV: jax.Array) -> jax.Array:
    """A row from each distribution, int32; the noise of a position depends on it and its text."""

    def one(key: jax.Array, position: jax.Array, logits_V: jax.Array) -> jax.Array:
        key = jax.random.fold_in(key, position)
        return jax.random.categorical(key, logits_V, mode="high")

    over_positions = jax.vmap(one, (None, 0, 0))
    return jax.vmap(over_positions)(keys_B, positions_BxC, logits_BxCxV).astype(jnp.int32)
