"""Cosmos in JAX: text generation by diffusion in a compressed, smooth latent space.

`load(name)` opens a trained model; see `library.py`.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cosmos_jax.library import Model, load

__all__ = ["Model", "load"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Imports the library when it is asked for: commands start without it."""
    if name in __all__:
        from cosmos_jax import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
