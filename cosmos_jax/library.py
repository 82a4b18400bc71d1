"""Trained models in Python: `cosmos_jax.load(name)` and what it returns.

A thin layer over pure functions of weights and keys (`sampling`, `editing`, `guides`, `latents`),
which are there for whoever wants them under their own `jit`, `vmap` or mesh.
"""

import contextlib
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging as absl_logging
from ml_collections import ConfigDict

from cosmos_jax import (
    config_checks,
    consensus,
    distributed,
    editing,
    guides,
    huggingface,
    pipeline,
    programs,
    sharding,
)
from cosmos_jax.data import tokens
from cosmos_jax.errors import UserError
from cosmos_jax.run import Run

# Batches are padded to one of these, so that any number of texts needs four programs at most.
BATCH_SIZES = (1, 4, 16, 64)


def load(name: str | Path, *, dtype: str | None = None, distilled: bool = True) -> "Model":
    """The trained model called `name`, on all devices of this process.

    A run that is still in training is loaded as far as it has come, with a warning.

    Args:
      name: a workdir, an exported directory, or the hub id of one.
      dtype: of the matrix products, "float32" or "bfloat16"; None: as it was trained.
      distilled: False: the denoiser before it was distilled, if it was, whose sampler and number of
        steps can be chosen; an exported directory may have left it out.

    Raises:
      UserError: there is no such model, nothing of it is trained, or its text encoder is missing.
    """
    directory = huggingface.locate(str(name), "model")
    with _quiet():
        return Model(
            pipeline.open_trained(
                directory, dtype=dtype or "", unfinished=True, distilled=distilled
            )
        )


class Model:
    """A trained model.

    Texts come back for the same arguments and seed on the same device; text i is a function of
    (seed, i) and its source. Any number of texts can be asked for.

    Attributes:
      config: of its training.
      tokenizer: of its texts.
      conditional: whether it writes a text for a source.
      system: the modules, `models.cosmos.Cosmos`, or those of a baseline.
      weights: all that the methods of `system` take, on the devices of `mesh`, which is to be set
        (`jax.set_mesh`) around functions of them.
      identity: what the weights are: their data, and the step of each stage.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        with jax.set_mesh(run.mesh):
            finished = pipeline.finished(run)
        self.mesh = run.mesh
        self.config: ConfigDict = run.config
        self.tokenizer: Any = run.encoder.tokenizer
        self.conditional: bool = run.config.data.conditional
        self.system: Any = finished.model
        self.weights: dict[str, Any] = finished.weights
        self.identity: dict[str, Any] = finished.identity
        self._compile = functools.cache(self._compile)  # type: ignore[method-assign]

    # Texts from noise

    def generate(
        self,
        num: int | None = None,
        *,
        sources: Sequence[str] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        guide: guides.Guide | None = None,
        guide_scale: float = 1.0,
        best_of: int = 1,
    ) -> list[str]:
        """`num` texts, or one for each source (arXiv 2506.21170, section 4).

        Args:
          num: how many; 1 unless there are sources.
          sources: what a conditional model is given; cut to `config.data.max_source_length`.
          guidance: weight w of the source, x_0u + w (x_0c - x_0u); None: the config's.
          steps, sampler: of sampling, see `config.diffusion`; None: the config's. Like `guidance`
            not of a distilled denoiser, see `load`.
          guide: a differentiable function that is to be large, see `guides.Guide`; give the same
            function again, not a new one like it, and nothing is compiled again.
          guide_scale: its weight.
          best_of: candidates for each text, of which the one that the others agree with most is
            taken (minimum Bayes risk, `consensus.py`); for conditional models.

        Raises:
          UserError: the model does not go with the arguments, or a source has no tokens.
        """
        batches = self.stream(
            num,
            sources=sources,
            seed=seed,
            guidance=guidance,
            steps=steps,
            sampler=sampler,
            guide=guide,
            guide_scale=guide_scale,
            best_of=best_of,
        )
        return [text for batch in batches for text in batch]

    def stream(
        self,
        num: int | None = None,
        *,
        sources: Sequence[str] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        guide: guides.Guide | None = None,
        guide_scale: float = 1.0,
        best_of: int = 1,
        first: int = 0,
        batch_size: int = BATCH_SIZES[-1],
    ) -> Iterator[list[str]]:
        """As `generate`, batch by batch as they are finished; the first text has number `first`."""
        batch = self._inputs(num, sources, first)
        if best_of < 1:
            raise UserError(f"best_of is {best_of}; it must be at least 1")
        if guide is not None:
            self._require_latents("guide")
        settings = self._settings(guidance=guidance, num_sampling_steps=steps, sampler=sampler)
        compiled = self._compile("generate", settings, guide)

        def batches() -> Iterator[list[str]]:
            key = self._key(seed)
            for part in _parts(batch, batch_size):
                candidates = []
                for candidate in range(best_of):
                    own = jax.random.fold_in(key, candidate) if candidate else key
                    candidates.append(self._texts(compiled, own, part, guide_scale))
                yield [consensus.best(texts) for texts in zip(*candidates, strict=True)]

        return batches()

    def trace(
        self,
        num: int | None = None,
        *,
        sources: Sequence[str] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
    ) -> list[list[str]]:
        """For each text what its estimate reads after each sampling step: [text][step].

        With the same arguments `generate` ends in the last of them or close by, as it takes what
        `config.diffusion.answer` says.
        """
        self._require_latents("trace")
        batch = self._inputs(num, sources, 0)
        settings = self._settings(guidance=guidance, num_sampling_steps=steps, sampler=sampler)
        compiled = self._compile("trace", settings, None)
        found: list[list[str]] = []
        for ids_BxTxL in self._call(compiled, batch, self._key(seed)):
            found += [tokens.decode(self.tokenizer, ids_TxL) for ids_TxL in ids_BxTxL]
        return found

    # Texts and latents

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Standardised latents of texts, [n, N, D] fp32; UserError if one has no tokens."""
        self._require_latents("encode")
        shape = (0, self.config.autoencoder.num_latents, self.config.encoder.hidden_size)
        compiled = self._compile("encode", (), None)
        parts = list(self._call(compiled, self._tokens(texts)))
        return np.concatenate([np.zeros(shape, np.float32), *parts])

    def decode(self, latents_nxNxD: np.ndarray | jax.Array) -> list[str]:
        """The texts that standardised latents stand for."""
        self._require_latents("decode")
        latents_nxNxD = np.asarray(latents_nxNxD, np.float32)
        shape = (self.config.autoencoder.num_latents, self.config.encoder.hidden_size)
        if latents_nxNxD.shape[1:] != shape:
            raise UserError(
                f"latents have shape {latents_nxNxD.shape}; it must be (texts, {shape[0]}, "
                f"{shape[1]})"
            )
        return self._texts(self._compile("decode", (), None), None, {"latents": latents_nxNxD})

    def reconstruct(self, texts: Sequence[str]) -> list[str]:
        """What the autoencoder makes of texts, cut to `config.data.max_length` tokens."""
        return self.decode(self.encode(texts))

    def interpolate(self, a: str, b: str, num: int = 7, *, strength: float = 0.0) -> list[str]:
        """Texts on the straight line between two in latent space, ends included.

        With a `strength` above 0 each is edited so far, which brings it nearer to real texts.
        """
        if num < 2:
            raise UserError(f"num is {num}; it must be at least 2, as both ends belong to the path")
        first, last = self.encode([a, b])
        path = np.asarray(editing.interpolate(first, last, num))
        return self._edited(path, strength, 0, None, {}) if strength else self.decode(path)

    # Texts that are changed

    def edit(
        self,
        texts: Sequence[str],
        strength: float = 0.4,
        *,
        sources: Sequence[str] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        first: int = 0,
    ) -> list[str]:
        """Paraphrases: latents are noised part of the way and denoised again (SDEdit).

        Args:
          strength: share of noise in the variance where denoising begins, from 0, the
            reconstruction, to 1, another text.
          sources: one for each text, of a conditional model.
          first: the number of the first text, which says with the seed what is random of it.
        """
        settings = {"guidance": guidance, "num_sampling_steps": steps, "sampler": sampler}
        return self._edited(self.encode(texts), strength, seed, sources, settings, first)

    def infill(
        self,
        texts: Sequence[str],
        *,
        sources: Sequence[str] | None = None,
        seed: int = 0,
        guidance: float | None = None,
        steps: int | None = None,
        sampler: str | None = None,
        exact: bool = True,
        first: int = 0,
    ) -> list[str]:
        """Texts with other words for each [MASK], which stands for one token.

        Args:
          exact: write the given tokens as they were given; otherwise as they are decoded, by a
            good autoencoder nearly all alike (`tests/control.py` counts them).
          first: as of `edit`.
        """
        self._require_latents("infill")
        batch = self._tokens(texts) | self._inputs(len(texts), sources, first)
        batch["given"] = batch["mask"] & (batch["ids"] != self.tokenizer.mask_token_id)
        settings = self._settings(guidance=guidance, num_sampling_steps=steps, sampler=sampler)
        compiled = self._compile("infill", settings, None)
        found: list[str] = []
        start = 0
        for ids_BxL in self._call(compiled, batch, self._key(seed)):
            rows = slice(start, start := start + len(ids_BxL))
            if exact:
                ids_BxL = np.where(batch["given"][rows], batch["ids"][rows], ids_BxL)
            found += tokens.decode(self.tokenizer, ids_BxL)
        return found

    def _edited(
        self,
        latents_nxNxD: np.ndarray,
        strength: float,
        seed: int,
        sources: Sequence[str] | None,
        settings: dict[str, Any],
        first: int = 0,
    ) -> list[str]:
        if not 0 <= strength <= 1:
            raise UserError(f"strength is {strength}; it must be between 0 and 1")
        batch = self._inputs(len(latents_nxNxD), sources, first) | {"latents": latents_nxNxD}
        if strength == 0:
            return self.decode(latents_nxNxD)
        compiled = self._compile("edit", self._settings(**settings), None)
        # At 1 the signal-to-noise ratio is 0 and its logarithm infinite.
        return self._texts(compiled, self._key(seed), batch, min(strength, 1 - 1e-6))

    # How it is done

    def _key(self, seed: int) -> jax.Array:
        """That of the stage "generate" of a run with this seed."""
        return jax.random.fold_in(jax.random.key(seed), zlib.crc32(b"generate"))

    def _require_latents(self, method: str) -> None:
        if self.config.system != "cosmos":
            raise UserError(f"{method}: a model of system {self.config.system!r} has no latents")

    def _inputs(self, num: int | None, sources: Sequence[str] | None, first: int) -> dict:
        """Rows, and the tokens of the sources."""
        if not self.conditional:
            if sources is not None:
                raise UserError("this model takes no sources: it was trained on texts alone")
            if num is None:
                num = 1
            if num < 0:
                raise UserError(f"num is {num}; it must be 0 or more")
            return {"rows": first + np.arange(num)}
        if sources is None:
            raise UserError("this model writes a text for a source: give sources=[...]")
        _require_texts(sources, "sources")
        if num not in (None, len(sources)):
            raise UserError(f"there are {len(sources)} sources for {num} texts")
        encoded = tokens.encode(self.tokenizer, sources, self.config.data.max_source_length)
        return {
            "rows": first + np.arange(len(sources)),
            "source_ids": encoded.ids_BxL,
            "source_mask": encoded.mask_BxL,
        }

    def _tokens(self, texts: Sequence[str]) -> dict[str, np.ndarray]:
        _require_texts(texts, "texts")
        encoded = tokens.encode(self.tokenizer, texts, self.config.data.max_length)
        return {"ids": encoded.ids_BxL, "mask": encoded.mask_BxL}

    def _settings(self, **changes: Any) -> tuple[tuple[str, Any], ...]:
        """Changes of `config.diffusion` that were asked for, checked."""
        asked = {name: value for name, value in changes.items() if value is not None}
        if asked and self.config.system != "cosmos":
            raise UserError(f"a model of system {self.config.system!r} has no {', '.join(asked)}")
        if asked and self.config.distillation.steps:
            names = ", ".join(asked).replace("num_sampling_steps", "steps")
            raise UserError(
                f"{names} cannot be chosen: this denoiser was distilled to "
                f"{self.config.distillation.num_sampling_steps} steps; load the one it learned "
                "from with distilled=False (--nodistilled)"
            )
        self._configured(tuple(asked.items()))
        return tuple(asked.items())

    def _configured(self, settings: tuple[tuple[str, Any], ...]) -> ConfigDict:
        config = ConfigDict(self.config.to_dict())
        for name, value in settings:
            was = config.diffusion[name]
            try:
                config.diffusion[name] = value
            except TypeError as error:
                raise UserError(f"{name} is {value!r}; it must be as {was!r} is") from error
        config_checks.validate(config)
        return config

    def _compile(
        self, name: str, settings: tuple[tuple[str, Any], ...], guide: guides.Guide | None
    ) -> Callable[..., jax.Array]:
        """(weights, batch, key, dial) -> arrays of one row for each text; made once."""
        function = programs.PROGRAMS[name](self._configured(settings), self.system, guide)
        return jax.jit(function, out_shardings=sharding.batch_layout(self.mesh))

    def _call(self, compiled: Callable, batch: dict, *rest: Any) -> Iterator[np.ndarray]:
        """What a compiled function gives for the rows of a batch, in parts."""
        for part in _parts(batch, BATCH_SIZES[-1]):
            count = _count(part)
            size = self._run.even_batch_size(min(s for s in BATCH_SIZES if s >= count))
            padded = {name: _pad(array, size) for name, array in part.items()}
            with jax.set_mesh(self.mesh):
                on_mesh = sharding.put_batch(padded, self.mesh)
                found = distributed.gather(compiled(self.weights, on_mesh, *rest))
            yield found[:count]  # after the mesh is taken back: whoever asks may stop here

    def _texts(self, compiled: Callable, key: Any, batch: dict, dial: float = 1.0) -> list[str]:
        found: list[str] = []
        for ids_BxL in self._call(compiled, batch, key, np.float32(dial)):
            found += tokens.decode(self.tokenizer, ids_BxL)
        return found


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps to itself what Orbax has to say about folders that are only read."""
    verbosity = absl_logging.get_verbosity()
    absl_logging.set_verbosity(absl_logging.ERROR)
    try:
        yield
    finally:
        absl_logging.set_verbosity(verbosity)


def _require_texts(texts: Any, what: str) -> None:
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"{what} must be a list of strings, not {type(texts).__name__}")


def _count(batch: dict) -> int:
    return len(next(iter(batch.values())))


def _parts(batch: dict, size: int) -> Iterator[dict]:
    for start in range(0, _count(batch), size):
        yield {name: array[start : start + size] for name, array in batch.items()}


def _pad(array: np.ndarray, size: int) -> np.ndarray:
    """Repeats the last row until there are `size`."""
    return array[np.minimum(np.arange(size), len(array) - 1)]
