"""The one loop, for any stage.

The order within a step is fixed: batch, step, read the step before, evaluate, save. What a
step computes is a pure function of (config, data, step), so a run that is stopped and goes
on from a checkpoint is the run that was never stopped.
"""

import contextlib
import functools
import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct

from cosmos_jax import distributed, metrics, optimizer, sharding
from cosmos_jax.checkpoint import Checkpoints, shapes_on
from cosmos_jax.data.batches import Batch as HostBatch
from cosmos_jax.data.batches import OrderedBatches, prefetch
from cosmos_jax.errors import UserError
from cosmos_jax.run import Run
from cosmos_jax.stages.base import Batch, Frozen, Params, Stage, Sums

logger = logging.getLogger(__name__)


class TrainState(struct.PyTreeNode):
    """What training changes. `ema` is None for a stage that keeps no average."""

    step: jax.Array
    params: Params
    ema: Params | None
    optimizer: Any


def init_state(
    stage: Stage, transform: optax.GradientTransformation, key: jax.Array, frozen: Frozen
) -> TrainState:
    return _first_state(stage, transform, stage.init(key, frozen))


def _first_state(
    stage: Stage, transform: optax.GradientTransformation, params: Params
) -> TrainState:
    ema = params if stage.settings.ema_decay else None
    return TrainState(jnp.int32(0), params, ema, transform.init(params))


def make_step(
    stage: Stage, transform: optax.GradientTransformation
) -> Callable[[TrainState, Frozen, Batch, jax.Array], tuple[TrainState, dict[str, jax.Array]]]:
    """One update: (state, frozen, batch, key) -> (state, values of the step).

    `batch` holds tokens, or features that were computed before. Losses are sums over parts of
    the batch divided by their weights at the end, so any number of parts gives the same update.
    """
    parts = stage.settings.accumulate

    def step(state, frozen, batch, key):
        key = jax.random.fold_in(key, state.step)
        batch_size = batch["ids"].shape[0]

        def gradients(part: Batch) -> tuple[Params, Sums]:
            part = stage.features(frozen, part)

            def objective(params):
                sums = stage.losses(params, frozen, part, key)
                return sums["loss"][0], sums

            return jax.grad(objective, has_aux=True)(state.params)

        if parts == 1:
            grads, sums = gradients(batch)
        else:
            # Every parts-th row, so that each device keeps rows of its own in each part.
            split = jax.tree.map(
                lambda x: x.reshape(batch_size // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch
            )
            shapes = jax.eval_shape(gradients, jax.tree.map(lambda x: x[0], split))
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
            (grads, sums), _ = jax.lax.scan(
                lambda total, part: (jax.tree.map(jnp.add, total, gradients(part)), None),
                zeros,
                split,
            )
        grads = jax.tree.map(lambda g: g / sums["loss"][1], grads)
        updates, optimizer_state = transform.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema is not None:
            ema = optimizer.ema_update(ema, params, state.step + 1, stage.settings.ema_decay)
        values = {name: total / weight for name, (total, weight) in sums.items()}
        values["gradient_norm"] = optax.tree.norm(grads)
        return TrainState(state.step + 1, params, ema, optimizer_state), values

    return step


Totals = dict[str, list[float]]
"""name -> [sum, weight] over texts, on the host."""


def make_validation(
    stage: Stage, run: Run, held_out: OrderedBatches
) -> Callable[[Params], Iterator[Totals]]:
    """params -> sums over each batch of `held_out`; `means` makes one answer of them."""
    key = run.key(f"{stage.name}/validation")

    @functools.partial(jax.jit, out_shardings=sharding.replicated(run.mesh))
    def sums(params, frozen, batch):
        return stage.validation(params, frozen, stage.features(frozen, batch), key)

    def validate(params: Params) -> Iterator[Totals]:
        for batch in map(held_out, range(len(held_out))):
            found = sums(params, stage.frozen, sharding.put_batch(batch, run.mesh))
            yield {name: [float(x) for x in pair] for name, pair in jax.device_get(found).items()}

    return validate


def add(totals: Totals, more: Totals) -> Totals:
    """Sums over the texts of both; `totals` may be empty."""
    return {
        name: [a + b for a, b in zip(totals.get(name, [0.0, 0.0]), pair, strict=True)]
        for name, pair in more.items()
    }


def means(totals: Totals) -> dict[str, float]:
    return {name: total / weight for name, (total, weight) in totals.items()}


def train(
    stage: Stage, run: Run, *, load: Callable[[int], HostBatch], held_out: OrderedBatches
) -> None:
    """Trains a stage to its last step, from the newest checkpoint if there is one.

    `load(step)` is this process's part of a batch; `held_out` are the texts to validate on.
    Leaves a checkpoint of the last step in `workdir/<stage.name>`.

    Raises:
      UserError: the loss is not finite, or the checkpoint there is of another model.
      distributed.Preempted: SIGTERM came; a checkpoint of that step is complete.
    """
    settings = stage.settings
    transform = optimizer.make(settings.optimizer, settings.steps)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            Checkpoints(
                run.workdir / stage.name,
                keep=settings.keep_checkpoints,
                best=settings.best_metric,
            )
        )
        state, layout = _restore_or_init(stage, run, transform, checkpoints)
        start, fresh = int(state.step), not checkpoints.steps()
        first = distributed.is_first()
        # Without a checkpoint the values before training are written again too.
        since = -1 if fresh else start
        writer = metrics.MetricWriter(run.workdir, stage.name, since, active=first)
        stack.callback(writer.close)
        bar = stack.enter_context(
            metrics.progress(settings.steps, stage.name, start=start, active=first)
        )
        step_fn = jax.jit(
            make_step(stage, transform),
            donate_argnums=0,
            out_shardings=(layout, sharding.replicated(run.mesh)),
        )
        key = run.key(f"{stage.name}/step")
        validate = make_validation(stage, run, held_out)
        report = metrics.report_writer(run.workdir)

        def evaluate(step: int) -> metrics.Values:
            params = state.params if state.ema is None else state.ema
            values = means(functools.reduce(add, validate(params), {}))
            values = {f"validation_{name}": value for name, value in values.items()}
            writer.write(step, values)
            if first:
                report()
            return values

        def log(step: int, values: dict[str, jax.Array]) -> None:
            host = {name: float(value) for name, value in jax.device_get(values).items()}
            if not (math.isfinite(host["loss"]) and math.isfinite(host["gradient_norm"])):
                raise UserError(
                    f"{stage.name}: the loss is not finite at step {step}; checkpoints: "
                    f"{checkpoints.steps() or 'none'}; lower "
                    f"config.{stage.name}.optimizer.learning_rate or look at the data"
                )
            if step % settings.log_every == 0 or step == settings.steps:
                rate = optimizer.learning_rate(settings.optimizer, settings.steps)(step - 1)
                writer.write(step, {**host, "learning_rate": float(rate)})
                bar.set_postfix(loss=f"{host['loss']:.4f}", refresh=False)

        def save(step: int, values: metrics.Values | None) -> None:
            # A checkpoint must not be newer than the metrics that led to it.
            writer.sync()
            items = {**_items(state), "statistics": stage.statistics}
            checkpoints.save(step, items, stage.provenance, values)

        if fresh:
            values = evaluate(0)
            if not settings.steps:
                save(0, values)
        steps = range(start, settings.steps)
        pending = None
        for step, batch in stack.enter_context(contextlib.closing(prefetch(load, steps))):
            state, values = step_fn(state, stage.frozen, sharding.put_batch(batch, run.mesh), key)
            # The step before is read only now, so that the device always has work.
            if pending is not None:
                log(*pending)
            done = step + 1
            pending = (done, values)
            stopping, last = distributed.preempted(), done == settings.steps
            evaluating = last or done % settings.evaluate_every == 0
            saving = last or stopping or done % settings.checkpoint_every == 0
            # Whether a step competes for the best must not depend on when a run was stopped.
            saving = saving or (evaluating and bool(settings.best_metric))
            if evaluating or saving:
                log(*pending)
                pending = None
            validation = evaluate(done) if evaluating else None
            if saving:
                save(done, validation)
            checkpoints.check()
            bar.update()
            if stopping and not last:
                checkpoints.wait()
                raise distributed.Preempted(f"{stage.name} is saved at step {done}")


def _restore_or_init(
    stage: Stage, run: Run, transform: optax.GradientTransformation, checkpoints: Checkpoints
) -> tuple[TrainState, Any]:
    """The state to go on from and its layout; parameters never exist unsharded."""
    init = functools.partial(init_state, stage, transform)
    shapes = jax.eval_shape(init, run.key("shapes"), stage.frozen)
    layout = sharding.layout(shapes, run.mesh)
    found = checkpoints.newest(_items(shapes_on(shapes, layout)))
    if found is None and stage.begin is not None:

        def begin(params: Params) -> TrainState:
            # Copies: what a compiled function returns as it was given may not be donated twice.
            return jax.tree.map(jnp.copy, _first_state(stage, transform, params))

        return jax.jit(begin, out_shardings=layout)(stage.begin()), layout
    if found is None:
        key = run.key(f"{stage.name}/init")
        return jax.jit(init, out_shardings=layout)(key, stage.frozen), layout
    step, items, recorded = found
    for name, value in stage.provenance.items():
        if recorded.get(name) != value:
            raise UserError(
                f"{run.workdir / stage.name}: its checkpoint of step {step} was trained with "
                f"{name} {recorded.get(name)!r}, but here it is {value!r}; "
                "choose another --workdir, or delete that folder to train the stage again"
            )
    logger.info("%s: continuing from step %d of %d", stage.name, step, stage.settings.steps)
    state = TrainState(items["step"]["step"], items["params"], items.get("ema"), items["optimizer"])
    return state, layout


def _items(state: TrainState) -> dict[str, Any]:
    """The items of a checkpoint; each can be read without the others."""
    items = {"step": {"step": state.step}, "params": state.params, "optimizer": state.optimizer}
    return items if state.ema is None else {**items, "ema": state.ema}
