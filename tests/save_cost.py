"""What saving costs a training run: blocks of steps with and without a save, by turns.

PYTHONPATH=. python tests/save_cost.py [--interval=200] [--blocks=5] [--config=FILE]

Prints JSON: seconds of the median block with and without, the share that a save adds, how long
the loop stands still for it, and the size of a checkpoint.
"""

import argparse
import functools
import json
import statistics
import tempfile
import time
from importlib import util
from pathlib import Path

import jax

from cosmos_jax import distributed, optimizer, pipeline, provenance, sharding
from cosmos_jax.checkpoint import Checkpoints
from cosmos_jax.runner import open_run
from cosmos_jax.train import init_state, make_step


def measure(config, interval: int, blocks: int, folder: Path) -> dict:
    run = open_run(config, folder)
    with jax.set_mesh(run.mesh):
        _, stage = pipeline.autoencoder_stage(run)
        transform = optimizer.make(stage.settings.optimizer, stage.settings.steps)
        init = functools.partial(init_state, stage, transform)
        layout = sharding.layout(jax.eval_shape(init, run.key("init"), stage.frozen), run.mesh)
        state = jax.jit(init, out_shardings=layout)(run.key("init"), stage.frozen)
        whole = sharding.replicated(run.mesh)
        step = jax.jit(make_step(stage, transform), donate_argnums=0, out_shardings=(layout, whole))
        batch = run.training_batches(stage.settings.batch_size, "autoencoder")(0)
        batch = sharding.put_batch(batch, run.mesh)
        seconds: dict[bool, list[float]] = {False: [], True: []}
        standing = []
        with Checkpoints(folder / "autoencoder", keep=2) as checkpoints:
            for block in range(2 * blocks + 1):
                saving = block % 2 == 1
                begun = time.perf_counter()
                for _ in range(interval):
                    state, values = step(state, stage.frozen, batch, run.key("step"))
                    if saving:
                        jax.block_until_ready(values)
                        called = time.perf_counter()
                        items = {"params": state.params, "optimizer": state.optimizer}
                        checkpoints.save(int(state.step), items, {})
                        standing.append(time.perf_counter() - called)
                        saving = False
                jax.block_until_ready(values)
                if block:  # the first one compiles
                    seconds[block % 2 == 1].append(time.perf_counter() - begun)
                checkpoints.wait()
            newest = folder / "autoencoder" / str(checkpoints.steps()[0])
            size = sum(path.stat().st_size for path in newest.rglob("*") if path.is_file())
    with_save, without = (statistics.median(seconds[saving]) for saving in (True, False))
    return {
        "steps_in_a_block": interval,
        "seconds_without": round(without, 3),
        "seconds_with_a_save": round(with_save, 3),
        "share_added": round(with_save / without - 1, 4),
        "standing_still_seconds": round(statistics.median(standing), 4),
        "checkpoint_megabytes": round(size / 1e6, 1),
        **provenance.versions()["device"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interval", type=int, default=200)
    parser.add_argument("--blocks", type=int, default=5)
    parser.add_argument("--config", default="configs/quickstart.py")
    arguments = parser.parse_args()
    spec = util.spec_from_file_location("config", arguments.config)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    distributed.start()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(module.get_config(), arguments.interval, arguments.blocks, Path(folder))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
