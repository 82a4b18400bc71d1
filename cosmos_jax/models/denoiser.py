"""The diffusion transformer that predicts clean latents (arXiv 2506.21170, section 4).

Latents go in and out without projection or absolute position. Long additive skips join
the first half of the blocks to the second, last in, first out. A source text, where the
task has one, enters by cross-attention after an encoder made of the same blocks.

Three parts are not the paper's, and off by default: `latent_positions`, `time_gains` and the
pointer of `models/pointer.py`. A final norm alone makes every estimate as long as a clean latent,
though the best one shrinks with the noise, and from noise no latent knows which of the N it is.
Training gets around both, in time.

Shape letters: B batch, N latents, S source positions, D width.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from cosmos_jax.models.layers import (
    Dtype,
    RMSNorm,
    SwiGLU,
    attend,
    linear,
    rematerialised,
    rotate,
    split_heads,
)
from cosmos_jax.models.pointer import Pointer, PointerKeys, windows

# Periods of the time features run from 2 pi to 2 pi times this; t itself stays in [0, 1].
TIME_MAX_PERIOD = 10.0

# Fields of `config.diffusion` for parts that the paper's denoiser does not have.
NOT_OF_THE_PAPER = ("latent_positions", "time_gains", "pointer")

# Names of the parameters, or of the modules they are in, that multiply in fp32 whatever `dtype` is.
IN_FP32 = frozenset({"gain", "time_gains", "gains", "prior", "places"})


@dataclasses.dataclass(frozen=True)
class DenoiserConfig:
    """Sizes of the denoiser; `max_source_length` = 0 makes it unconditional.

    `mlp_width` is the inner width of the MLPs; 0 stands for 4 times the width. Without
    `condition_layers` cross-attention reads the frozen states of the source, normed. With
    `latent_positions` a learned vector is added to each noised latent; with `time_gains` the
    estimate is norm(x) * g(t) + x_t * k(t), where g and k are learned for each feature; with a
    `pointer_length`, the positions of a text, cross-attention also reads the window pointed to, by
    shares to the power of 1 / `pointer_temperature`.
    """

    width: int
    num_heads: int
    num_layers: int
    condition_layers: int = 0
    max_source_length: int = 0
    mlp_width: int = 0
    latent_positions: bool = False
    time_gains: bool = False
    pointer_length: int = 0
    pointer_temperature: float = 1.0
    remat: bool = False

    @property
    def conditional(self) -> bool:
        return self.max_source_length > 0


KeysValues = tuple[jax.Array, jax.Array]
"""Keys and values of one attention, [B, S, H, K] each."""


class Window(NamedTuple):
    """Part of a context that is read a second time, as the window of a pointer.

    `shares_BxLxS` says what its positions take of the context; `slots_LxD` tell them apart.
    """

    shares_BxLxS: jax.Array
    slots_LxD: jax.Array


class Condition(NamedTuple):
    """What the denoiser reads of a source, projected: for each block, and for the pointer."""

    of_block: tuple[KeysValues, ...]
    pointer_keys: tuple[jax.Array, jax.Array] | None = None


class Attention(nn.Module):
    """Multi-head attention without biases; `rotary` turns queries and keys by position.

    The context is [B, S, D], or its keys and values where they are made already.
    """

    num_heads: int
    rotary: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        context: jax.Array | KeysValues,
        mask_BxS: jax.Array | None,
        window: Window | None = None,
    ) -> jax.Array:
        width = x_BxTxD.shape[-1]
        layers = {
            name: linear(width, width, dtype=self.dtype, name=name)
            for name in ("query", "key", "value")
        }

        def project(x: jax.Array, name: str) -> jax.Array:
            return split_heads(layers[name](x), self.num_heads)

        query = project(x_BxTxD, "query")
        if isinstance(context, tuple):
            key, value = context
        else:
            key, value = project(context, "key"), project(context, "value")
        if window is not None:

            def extended(of_context: jax.Array, name: str) -> jax.Array:
                shares = window.shares_BxLxS.astype(of_context.dtype)
                of_window = jnp.einsum("bls,bshk->blhk", shares, of_context)
                of_window += project(window.slots_LxD[None].astype(self.dtype), name)
                return jnp.concatenate([of_context, of_window], axis=1)

            key, value = extended(key, "key"), extended(value, "value")
            if mask_BxS is not None:
                seen_BxL = jnp.ones(window.shares_BxLxS.shape[:2], bool)
                mask_BxS = jnp.concatenate([mask_BxS, seen_BxL], axis=1)
        if self.rotary:
            query, key = rotate(query), rotate(key)
        out = attend(query, key, value, mask_BxS)
        return linear(width, width, dtype=self.dtype, name="out")(out)


class Block(nn.Module):
    """Self-attention, cross-attention if there is a condition, and MLP, each residual.

    Cross-attention has no norm before it: the authors' code has none.
    """

    config: DenoiserConfig
    dtype: Dtype

    @nn.compact
    def __call__(
        self,
        x_BxTxD: jax.Array,
        mask_BxT: jax.Array | None = None,
        condition: jax.Array | KeysValues | None = None,
        condition_mask_BxS: jax.Array | None = None,
        window: Window | None = None,
    ) -> jax.Array:
        x = x_BxTxD
        num_heads = self.config.num_heads
        mlp_width = self.config.mlp_width or 4 * self.config.width
        normed = RMSNorm(name="norm_attention")(x)
        x = x + Attention(num_heads, True, self.dtype, name="attention")(normed, normed, mask_BxT)
        if condition is not None:
            x = x + Attention(num_heads, False, self.dtype, name="cross_attention")(
                x, condition, condition_mask_BxS, window
            )
        return x + SwiGLU(mlp_width, self.dtype, name="mlp")(RMSNorm(name="norm_mlp")(x))


class ConditionEncoder(nn.Module):
    """Standardised states of the source text to the condition the denoiser attends to."""

    config: DenoiserConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, states_BxSxD: jax.Array, mask_BxS: jax.Array) -> jax.Array:
        config = self.config
        x = states_BxSxD.astype(self.dtype)
        block = rematerialised(Block, config.remat)
        for i in range(config.condition_layers):
            x = block(config, self.dtype, name=f"layers_{i}")(x, mask_BxS)
        x = RMSNorm(name="norm_out")(x.astype(jnp.float32))
        positions_SxD = self.param(
            "positions", nn.initializers.normal(1.0), (config.max_source_length, config.width)
        )
        return x + positions_SxD[: x.shape[1]]


def time_features(t_B: jax.Array, width: int) -> jax.Array:
    """Cosines, then sines, of t times `width`/2 frequencies from 1 down to 1/TIME_MAX_PERIOD."""
    half = width // 2
    frequencies = jnp.exp(-math.log(TIME_MAX_PERIOD) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t_B[:, None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Denoiser(nn.Module):
    """Predicts clean latents x_0 from noised ones."""

    config: DenoiserConfig
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x_t_BxNxD: jax.Array,
        t_B: jax.Array,
        self_condition_BxNxD: jax.Array,
        condition: jax.Array | Condition | None = None,
        condition_mask_BxS: jax.Array | None = None,
        *,
        pointer_alone: bool = False,
    ) -> jax.Array:
        """Returns x_0 [B, N, D], fp32.

        `t_B` is the diffusion time in [0, 1]; `self_condition_BxNxD` is an earlier estimate of
        x_0, or zeros; the condition is what `ConditionEncoder` returned, [B, S, D], or its
        `keys_and_values`. `pointer_alone` is for `point`.
        """
        config, dtype = self.config, self.dtype
        width = config.width
        time_BxD = linear(2 * width, width, use_bias=True, dtype=dtype, name="time_up")(
            time_features(t_B, width)
        )
        time_BxD = linear(width, 2 * width, use_bias=True, dtype=dtype, name="time_down")(
            nn.silu(time_BxD)
        )
        estimate = self_condition_BxNxD.astype(dtype)
        of_block: tuple[Any, ...] = (None,) * config.num_layers
        pointer_keys, window = None, None
        if isinstance(condition, Condition):
            of_block, pointer_keys = condition
        elif condition is not None:
            of_block = (condition.astype(dtype),) * config.num_layers
            if config.pointer_length:
                keys = PointerKeys(config.num_heads, dtype, name="pointer_keys")
                pointer_keys = keys(condition)
        if pointer_keys is not None and condition_mask_BxS is not None:
            pointer = Pointer(config.num_heads, config.pointer_length, dtype, name="pointer")
            log_shares_BxS = pointer(
                x_t_BxNxD, estimate, nn.silu(time_BxD), *pointer_keys, condition_mask_BxS
            )
            if pointer_alone:
                return log_shares_BxS
            slots_LxD = self.param(
                "slots", nn.initializers.normal(1.0), (config.pointer_length, width)
            )
            shares_BxS = jax.nn.softmax(log_shares_BxS / config.pointer_temperature)
            window = Window(windows(shares_BxS, config.pointer_length), slots_LxD)
        x = x_t_BxNxD.astype(dtype)
        if config.latent_positions:
            x += self.param("positions", nn.initializers.normal(1.0), x.shape[1:]).astype(dtype)
        skips = []
        block = rematerialised(Block, config.remat)
        for i in range(config.num_layers):
            if i < config.num_layers // 2:
                skips.append(x)
            elif skips:
                x = x + skips.pop()
            time = linear(width, width, use_bias=True, dtype=dtype, name=f"time_{i}")(
                nn.silu(time_BxD)
            )
            guess = linear(width, width, use_bias=True, dtype=dtype, name=f"self_condition_{i}")(
                estimate
            )
            x = x + time[:, None] + guess
            x = block(config, dtype, name=f"layers_{i}")(
                x, None, of_block[i], condition_mask_BxS, window
            )
        x = RMSNorm(name="norm_out")(x.astype(jnp.float32))
        if config.time_gains:
            # Zeros at first, with which the estimate is that of the paper's denoiser.
            gains_Bx2D = nn.Dense(2 * width, kernel_init=nn.initializers.zeros, name="time_gains")(
                nn.silu(time_BxD.astype(jnp.float32))
            )
            gain, skip = jnp.split(gains_Bx2D[:, None], 2, axis=-1)
            x = x * (1 + gain) + x_t_BxNxD * skip
        return x

    def point(self, *inputs: Any) -> jax.Array:
        """For the same inputs, a source among them: log pi of the pointer, [B, S] fp32."""
        return self(*inputs, pointer_alone=True)


def keys_and_values(denoiser: Denoiser, params: Any, condition_BxSxD: jax.Array) -> Condition:
    """What the denoiser reads of a condition: the same in every step.

    Made once for a text it costs once what it would cost in each step, for a long source
    several times the step itself.
    """
    config, dtype = denoiser.config, denoiser.dtype
    condition_BxSxD = condition_BxSxD.astype(dtype)

    def project(block: int, name: str) -> jax.Array:
        kernel = params[f"layers_{block}"]["cross_attention"][name]["kernel"]
        projected = condition_BxSxD @ kernel.astype(dtype)
        return split_heads(projected, config.num_heads)

    of_block = tuple((project(i, "key"), project(i, "value")) for i in range(config.num_layers))
    if not config.pointer_length:
        return Condition(of_block)
    keys = PointerKeys(config.num_heads, dtype)
    of_pointer: Any = keys.apply({"params": params["pointer_keys"]}, condition_BxSxD)
    return Condition(of_block, of_pointer)
