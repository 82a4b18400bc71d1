"""Times generation and training, all in turn, round after round.

Only the wall clock is read, before and after something that is waited for.
"""

import contextlib
import dataclasses
import functools
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cosmos_jax import config as config_lib
from cosmos_jax import optimizer, peaks, sharding, systems, torch_gpt2
from cosmos_jax.data import sources
from cosmos_jax.data.batches import Batch, TokenBatches, prefetch
from cosmos_jax.describe import describe
from cosmos_jax.errors import UserError
from cosmos_jax.parts import Part, parts_of
from cosmos_jax.stages.base import Params, Stage
from cosmos_jax.systems import Eager, Model
from cosmos_jax.train import TrainState, make_step

logger = logging.getLogger(__name__)

Entry = dict[str, Any]
Times = dict[str, float]
"""Name of what was timed -> seconds."""

# Seconds that a part is called again and again, so that starting it does not count.
SHORTEST = 0.02
# Tokens from which to tell how long a system without parts would take.
FEW_TOKENS = 8


def summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def rounds_within(seconds: float, config: ConfigDict) -> int:
    """How often what takes so long is timed: as `rounds` says, or what `max_seconds` allow."""
    return max(1, min(config.rounds, int(config.max_seconds / seconds)))


def interleaved(rounds: Mapping[str, int]) -> Iterator[str]:
    """Whose turn it is: each name as often as it says, the first of a round changing."""
    for i in range(max(rounds.values(), default=0)):
        names = [name for name, count in rounds.items() if count > i]
        first = i % len(names)
        yield from names[first:] + names[:first]


# Generation


class TimedPart:
    """A part, compiled."""

    def __init__(self, part: Part) -> None:
        self.part, self._state = part, part.state
        compiling = jax.jit(part.function, donate_argnums=(1,) if part.loops else ())
        lowered = compiling.lower(part.constants, part.state)
        self._compiled = lowered.compile()
        counted = self._compiled
        if part.counted is not None:
            lowered = jax.jit(part.counted).lower(part.constants, part.state)
            counted = lowered.compile()
        self.flops = peaks.flops(lowered)
        self.bytes = peaks.bytes_accessed(counted)
        self._repeats = 1
        self.seconds()
        self.expected = self.seconds()
        self._repeats = max(1, int(SHORTEST / self.expected))

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        for _ in range(self._repeats):
            answer = self._compiled(self.part.constants, self._state)
            if self.part.loops:
                self._state = answer
        jax.block_until_ready(answer)
        return (time.perf_counter() - start) / self._repeats


@dataclasses.dataclass(frozen=True, eq=False)
class Program:
    """A system that is ready to generate a batch.

    Attributes:
      known: what its entry says before anything is timed.
      send: puts on the device what generation is given.
      compute: all of the compiled part, waited for.
      decode: token ids to texts on the host.
    """

    known: Entry
    parts: list[TimedPart]
    send: Callable[[], Any]
    compute: Callable[[Any], Any]
    decode: systems.Decode

    def times(self) -> Times:
        """Of one generation from end to end."""
        start = time.perf_counter()
        given = self.send()
        sent = time.perf_counter()
        ids = self.compute(given)
        computed = time.perf_counter()
        self.decode(np.asarray(ids))
        end = time.perf_counter()
        return {"all": end - start, "compiled": computed - sent, "strings": end - computed}


def generation(
    config: ConfigDict,
    models: Mapping[str, Model | Eager | UserError],
    batch_size: int,
    roof: Entry,
    mesh: Mesh,
) -> list[Entry]:
    """An entry for each system: what a batch of texts costs, or why it is skipped."""
    skipped, programs, rounds = {}, {}, {}
    for name, model in models.items():
        try:
            if isinstance(model, UserError):
                raise model
            programs[name], rounds[name] = _prepare(config, name, model, batch_size, mesh)
        except UserError as reason:
            skipped[name] = str(reason)
            logger.info("batch %d: %s is skipped: %s", batch_size, name, reason)
    times: dict[str, list[Times]] = {name: [] for name in programs}
    for name in interleaved(rounds):
        program = programs[name]
        of_parts = {timed.part.name: timed.seconds() for timed in program.parts}
        times[name].append({**program.times(), **of_parts})
    return [
        {"system": name, "batch_size": batch_size}
        | (
            {"skipped": skipped[name]}
            if name in skipped
            else _entry(programs[name], times[name], batch_size, roof)
        )
        for name in models
    ]


def _prepare(
    config: ConfigDict, name: str, model: Model | Eager, batch_size: int, mesh: Mesh
) -> tuple[Program, int]:
    """Compiles, warms up, and finds how many rounds there is time for."""
    try:
        program = _program(config, model, batch_size, mesh)
        seconds = program.times()["all"]
    except RuntimeError as error:
        if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory")):
            raise
        raise UserError("it does not fit into memory") from error
    rounds = rounds_within(seconds, config)
    logger.info("batch %d: %s takes %.3g s, %d rounds", batch_size, name, seconds, rounds)
    return program, rounds


def _program(config: ConfigDict, model: Model | Eager, batch_size: int, mesh: Mesh) -> Program:
    """A system compiled; UserError if its parts say that it would take too long."""
    known: Entry = {"weights": model.origin, "sampling": config_lib.sampling(model.config)}
    if isinstance(model, Eager):
        length = model.config.data.max_length
        model.generate(batch_size, 2)
        seconds = _seconds(lambda: model.generate(batch_size, FEW_TOKENS))
        _refuse_if_long(
            config, seconds * length / FEW_TOKENS, f"{FEW_TOKENS} tokens {seconds:.3g} s"
        )
        return Program(
            known, [], lambda: batch_size, lambda n: model.generate(n, length), model.decode
        )
    key = jax.random.key(systems.SEED)
    send = functools.partial(sharding.put_batch, model.batch(batch_size), mesh)
    parts = [TimedPart(part) for part in parts_of(model, key, send())]
    _refuse_if_long(
        config,
        sum(timed.part.calls * timed.expected for timed in parts),
        ", ".join(f"{t.part.calls} x {t.part.name} {t.expected:.3g} s" for t in parts),
    )
    start = time.perf_counter()
    compiled = jax.jit(model.generate).lower(model.weights, key, send()).compile()
    known["compile_seconds"] = time.perf_counter() - start
    known["memory"] = peaks.memory(compiled)

    def compute(batch: dict[str, jax.Array]) -> jax.Array:
        return jax.block_until_ready(compiled(model.weights, key, batch))

    return Program(known, parts, send, compute, model.decode)


def _refuse_if_long(config: ConfigDict, seconds: float, why: str) -> None:
    if seconds > config.skip_seconds:
        raise UserError(f"longer than config.skip_seconds, {config.skip_seconds:g} s: {why}")


def _entry(program: Program, times: list[Times], batch_size: int, roof: Entry) -> Entry:
    """The figures of a system from the times of all rounds."""
    entry = dict(program.known)
    seconds = [of_round["all"] for of_round in times]
    middle = statistics.median(seconds)
    entry |= {
        "rounds": len(times),
        "seconds": summary(seconds),
        "texts_per_second": summary([batch_size / of_round for of_round in seconds]),
        "compiled_share": statistics.median(t["compiled"] / t["all"] for t in times),
        "parts": {
            timed.part.name: {
                "calls": timed.part.calls,
                "seconds": summary([of_round[timed.part.name] for of_round in times]),
                "flops": timed.flops,
                "bytes": timed.bytes,
            }
            for timed in program.parts
        }
        | {"strings": {"calls": 1, "seconds": summary([t["strings"] for t in times])}},
    }
    if program.parts:
        flops, moved = (
            sum(timed.part.calls * count(timed) for timed in program.parts)
            for count in (lambda timed: timed.flops, lambda timed: timed.bytes)
        )
        entry |= {
            "flops_per_text": flops / batch_size,
            "bytes_per_text": moved / batch_size,
            **_shares(flops, moved, middle, roof),
        }
    return entry


def _shares(flops: float, moved: float, seconds: float, roof: Entry) -> Entry:
    """What is reached a second, and of what was measured to be possible."""
    return {
        "flops_per_second": flops / seconds,
        "flops_share": flops / seconds / roof["matmul"]["flops_per_second"],
        "bytes_per_second": moved / seconds,
        "bytes_share": moved / seconds / roof["triad"]["bytes_per_second"],
    }


# Training


def reader(config: ConfigDict) -> Callable[[int], Batch] | None:
    """What reads the batches of training; None where no tokenizer is named or nothing trained."""
    base = config.base
    tokenizer = systems.load_tokenizer(base) if config.training.stages else None
    if tokenizer is None:
        return None
    dataset = sources.load(base.data.source, base.data.directory)
    if dataset.conditional != base.data.conditional:
        raise UserError(
            f"config.base.data.conditional is {base.data.conditional}, but the rows of "
            f"{base.data.source} have {'sources' if dataset.conditional else 'no sources'}"
        )
    return TokenBatches(
        dataset.train,
        tokenizer,
        seed=systems.SEED,
        max_length=base.data.max_length,
        max_source_length=base.data.max_source_length,
        batch_size=config.training.batch_size,
    )


def training(
    config: ConfigDict, load: Callable[[int], Batch] | None, roof: Entry, mesh: Mesh
) -> Iterator[Entry]:
    """An entry for each stage: the speed of `train.py`'s step with and without reading texts.

    Beside that of the autoregressive model stands the same model in PyTorch, where it is installed.
    """
    system_of = {stage: name for name, stages in config_lib.SYSTEMS.items() for stage in stages}
    tokenizer = systems.load_tokenizer(config.base)
    for name in filter(None, config.training.stages.split(",")):
        system = {"cosmos": "default"}.get(system_of[name], system_of[name])
        of_system = systems.config_of(system, config.base)
        of_system[name].batch_size = config.training.batch_size
        model = systems.random(of_system, tokenizer, mesh)
        entry = {"stage": name, "batch_size": config.training.batch_size}
        try:
            yield entry | _training_entry(config, model, model.stages[name], load, roof, mesh)
        except UserError as reason:
            logger.info("training: %s is skipped: %s", name, reason)
            yield entry | {"skipped": str(reason)}


def _training_entry(
    config: ConfigDict,
    model: Model,
    stage: Stage,
    load: Callable[[int], Batch] | None,
    roof: Entry,
    mesh: Mesh,
) -> Entry:
    batch_size, num_steps = config.training.batch_size, config.training.steps
    same_batch = sharding.put_batch(systems.random_batch(model.config, batch_size), mesh)
    key = jax.random.key(systems.SEED)
    transform = optimizer.make(stage.settings.optimizer, max(1, stage.settings.steps))
    state = _initial_state(stage, transform, model.weights, mesh)
    step = jax.jit(
        make_step(stage, transform),
        donate_argnums=0,
        out_shardings=(sharding.layout(state, mesh), sharding.replicated(mesh)),
    )
    start = time.perf_counter()
    compiled = step.lower(state, stage.frozen, same_batch, key).compile()
    compile_seconds = time.perf_counter() - start
    # Of the network: XLA's count of a whole step has the random bits of dropout among its FLOPs,
    # and the first pass of self-conditioning as if every step made it.
    flops = describe(model.config)["flops"][f"{stage.name}_training_step"]

    def advance(batch: dict[str, jax.Array]) -> None:
        nonlocal state
        state, _ = compiled(state, stage.frozen, batch, key)

    def without_input() -> float:
        start = time.perf_counter()
        for _ in range(num_steps):
            advance(same_batch)
        jax.block_until_ready(state)
        return (time.perf_counter() - start) / num_steps

    def with_input(load: Callable[[int], Batch]) -> float:
        # One step before the clock starts, so that the first batch is not waited for.
        batches = prefetch(load, range(num_steps + 1))
        with contextlib.closing(batches):
            advance(sharding.put_batch(next(batches)[1], mesh))
            jax.block_until_ready(state)
            start = time.perf_counter()
            for _, batch in batches:
                advance(sharding.put_batch(batch, mesh))
            jax.block_until_ready(state)
            return (time.perf_counter() - start) / num_steps

    def one_step() -> None:
        advance(same_batch)
        jax.block_until_ready(state)

    one_step()
    seconds = _seconds(one_step)
    ways: dict[str, Callable[[], float]] = {"input_off": without_input}
    if load:
        ways["input_on"] = functools.partial(with_input, load)
    if stage.name == "autoregressive":
        with contextlib.suppress(UserError):  # there is no PyTorch to compare with
            eager = torch_gpt2.make_training(model.config, batch_size)
            eager(1)
            ways["torch"] = lambda: _seconds(lambda: eager(num_steps)) / num_steps
    per_round = seconds * num_steps * len(ways)
    _refuse_if_long(config, per_round, f"{num_steps} steps of {seconds:.3g} s")
    times: dict[str, list[float]] = {way: [] for way in ways}
    rounds = rounds_within(per_round, config)
    logger.info("training: %s takes %.3g s a step, %d rounds", stage.name, seconds, rounds)
    for way in interleaved(dict.fromkeys(ways, rounds)):
        times[way].append(ways[way]())
    tokens = batch_size * model.config.data.max_length
    middle = {way: statistics.median(found) for way, found in times.items()}
    entry = {
        "compile_seconds": compile_seconds,
        "memory": peaks.memory(compiled),
        "rounds": rounds,
        "steps": num_steps,
        "seconds_per_step": {way: summary(found) for way, found in times.items()},
        "tokens_per_second": {
            way: summary([tokens / one for one in found]) for way, found in times.items()
        },
        "flops_per_step": flops,
        **_shares(flops, peaks.bytes_accessed(compiled), middle["input_off"], roof),
    }
    if load:
        entry["input_cost"] = middle["input_on"] / middle["input_off"] - 1
    return entry


def _initial_state(
    stage: Stage, transform: optax.GradientTransformation, weights: Params, mesh: Mesh
) -> TrainState:
    """Before the first step, from random weights that stay what they are."""
    names = jax.eval_shape(stage.init, jax.random.key(0), stage.frozen)
    params = {name: weights[name] for name in names}
    ema = params if stage.settings.ema_decay else None
    state = TrainState(jnp.int32(0), params, ema, jax.jit(transform.init)(params))
    # Each leaf in memory of its own: the step takes it.
    return jax.device_put(jax.tree.map(jnp.copy, state), sharding.layout(state, mesh))


def _seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
