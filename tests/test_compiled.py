"""Options that change how a step is computed: compiled, they must need less of something.

One process compiles steps of a small model on 8 devices; nothing is run. What the compiler
plans of memory does not depend on how well it optimises machine code, which it is told to skip.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from virtual_devices import environment

ROOT = Path(__file__).parents[1]

COMPILE = """
import functools, json, math
import jax, jax.numpy as jnp, optax
from cosmos_jax import baselines, config as config_lib, sharding
from cosmos_jax.models import cosmos, states
from cosmos_jax.stages import autoencoder, diffusion
from cosmos_jax.train import init_state, make_step

WIDTH, LENGTH, LATENTS, WORDS, BATCH = 128, 32, 8, 512, 64
shape = jax.ShapeDtypeStruct


# Config, model, shapes of stage one's parameters and of all that is frozen, the stage.
def make(name, **fields):
    config = config_lib.base()
    config.update_from_flattened_dict({
        "encoder.hidden_size": WIDTH, "encoder.num_heads": 2, "encoder.num_layers": 1,
        "encoder.intermediate_size": 256, "encoder.vocab_size": WORDS,
        "data.max_length": LENGTH, "autoencoder.num_latents": LATENTS, "dtype": "float32",
        "autoencoder.num_layers": 1, "diffusion.num_layers": 2,
        "autoencoder.num_heads": 2, "diffusion.num_heads": 2,
        **{key.replace("__", "."): value for key, value in fields.items()},
    })
    model = cosmos.build(config, WORDS)
    first = autoencoder.make(config, model, {}, {}, "")
    trained = jax.eval_shape(first.init, jax.random.key(0), {})
    ids, mask = jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool)
    frozen = {
        **{name: shape((WIDTH,), jnp.float32) for name in ("states_mean", "states_std")},
        **{name: shape((LATENTS, WIDTH), jnp.float32) for name in ("latents_mean", "latents_std")},
        **{name: shape((WORDS,), jnp.int32) for name in ("vocabulary", "head_index")},
        "mask_embedding": shape((WIDTH,), jnp.float32),
        "bert": jax.eval_shape(model.bert.init, jax.random.key(0), ids, mask)["params"],
        "compressor": trained["compressor"],
    }
    stage = first if name == "autoencoder" else diffusion.make(config, model, {}, {}, "", 0)
    return config, model, trained, frozen, stage


def put(tree, layout):
    return jax.tree.map(lambda x, s: shape(x.shape, x.dtype, sharding=s), tree, layout)


def make_batch(mesh):
    batch = {
        "ids": shape((BATCH, LENGTH), jnp.int32), "mask": shape((BATCH, LENGTH), bool),
        "rows": shape((BATCH,), jnp.int32), "real": shape((BATCH,), bool),
    }
    return put(batch, jax.tree.map(lambda _: sharding.batch_layout(mesh), batch))


# What a device needs to sample and to validate.
def used(mesh_sizes):
    config, model, trained, frozen, stage = make("diffusion")
    params = jax.eval_shape(stage.init, jax.random.key(0), frozen)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, mesh_sizes)))

    def validate(params, frozen, batch, key):
        return stage.validation(params, frozen, stage.features(frozen, batch), key)

    weights = {**frozen, **trained, **params}
    weights, params, frozen = (
        put(tree, sharding.layout(tree, mesh)) for tree in (weights, params, frozen)
    )
    batch, key = make_batch(mesh), jax.random.key(0)
    with jax.set_mesh(mesh):
        generate = jax.jit(baselines.make_generator(config, model))
        sample = generate.lower(weights, key, {"rows": batch["rows"]}).compile()
        validate = jax.jit(validate, out_shardings=sharding.replicated(mesh))
        validation = validate.lower(params, frozen, batch, key).compile()
    return {
        name: {
            "activations": program.memory_analysis().temp_size_in_bytes,
            "flops": program.cost_analysis()["flops"],
        }
        for name, program in (("sampling", sample), ("validation", validation))
    }


def compiled(name, mesh_sizes, memory=True, **fields):
    config, model, trained, frozen, stage = make(name, **fields)
    transform = optax.sgd(1.0)
    init = functools.partial(init_state, stage, transform)
    mesh = sharding.make_mesh(dict(zip(sharding.AXES, mesh_sizes)))
    state = jax.eval_shape(init, jax.random.key(0), frozen)
    layout = sharding.layout(state, mesh)
    batch = make_batch(mesh)
    with jax.set_mesh(mesh):
        step = jax.jit(make_step(stage, transform), donate_argnums=0,
                       out_shardings=(layout, sharding.replicated(mesh)))
        lowered = step.lower(
            put(state, layout), put(frozen, sharding.layout(frozen, mesh)), batch,
            jax.random.key(0),
        )
        memory = lowered.compile().memory_analysis() if memory else None
    # What the forward pass leaves for the backward pass: all that it closes over.
    def backward(params, frozen, batch):
        batch = stage.features(frozen, batch)
        loss = lambda params: stage.losses(params, frozen, batch, jax.random.key(0))["loss"][0]
        return jax.vjp(loss, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, state.params, frozen, batch))
    products = [line for line in lowered.as_text().splitlines() if "dot_general" in line]
    return {
        "kept": sum(math.prod(x.shape) * x.dtype.itemsize for x in kept),
        "activations": memory and memory.temp_size_in_bytes,
        "state": memory and memory.argument_size_in_bytes,
        "flops": lowered.cost_analysis()["flops"],
        "bf16_products": sum("bf16" in line for line in products) / len(products),
    }


one, fsdp, data = (1, 1, 1), (1, 8, 1), (8, 1, 1)
found = {"fsdp": {"autoencoder": compiled("autoencoder", fsdp)}}
found["used"] = {"one": used(one), "data": used(data)}
for option, memory, fields in (
    ("plain", True, {}), ("accumulate", True, {"accumulate": 4}), ("remat", False, {"remat": True})
):
    found[option] = {
        name: compiled(name, one, memory, **{f"{name}__{k}": v for k, v in fields.items()})
        for name in ("autoencoder", "diffusion")
    }
found["bf16"] = {name: compiled(name, one, False, dtype="bfloat16") for name in found["plain"]}
states.split_batch = lambda x: x
found["unconstrained"] = {"autoencoder": compiled("autoencoder", fsdp)}
print(json.dumps(found))
"""

STAGES = ("autoencoder", "diffusion")


@pytest.fixture(scope="module")
def compiled():
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(
        command, env=environment(8), cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_meshes_divide_the_work_and_the_state(compiled):
    whole, fsdp = (compiled[name]["autoencoder"] for name in ("plain", "fsdp"))
    assert fsdp["activations"] < whole["activations"] / 4
    assert fsdp["state"] < whole["state"] / 5


@pytest.mark.parametrize("use", ["sampling", "validation"])
def test_meshes_divide_sampling_and_validation(compiled, use):
    whole, data = (compiled["used"][mesh][use] for mesh in ("one", "data"))
    assert data["flops"] < whole["flops"] / 6
    assert data["activations"] < whole["activations"] / 4


def test_activations_stay_split_where_parameters_are(compiled):
    constrained, free = compiled["fsdp"], compiled["unconstrained"]
    assert constrained["autoencoder"]["activations"] < 0.8 * free["autoencoder"]["activations"]


@pytest.mark.parametrize("stage", STAGES)
def test_rematerialisation_trades_memory_for_compute(compiled, stage):
    """By what is kept for the backward pass: XLA undoes the trade on CPUs."""
    plain, remat = compiled["plain"][stage], compiled["remat"][stage]
    assert remat["kept"] < 0.4 * plain["kept"]
    assert remat["flops"] > 1.02 * plain["flops"]


@pytest.mark.parametrize("stage", STAGES)
def test_parts_of_a_batch_need_less_memory(compiled, stage):
    plain, parts = compiled["plain"][stage], compiled["accumulate"][stage]
    assert parts["activations"] < 0.5 * plain["activations"]


@pytest.mark.parametrize("stage", STAGES)
def test_bfloat16_is_the_type_of_matrix_products(compiled, stage):
    assert compiled["plain"][stage]["bf16_products"] == 0
    assert compiled["bf16"][stage]["bf16_products"] > 0.9
