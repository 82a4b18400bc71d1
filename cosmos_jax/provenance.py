"""What to record beside a result so that it can be made again."""

import importlib.metadata
import platform
from typing import Any

import jax

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers")


def versions() -> dict[str, Any]:
    """Versions of this package, Python and what computes, and the device."""
    from cosmos_jax import __version__

    return {
        "versions": {
            "cosmos-jax": __version__,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in PACKAGES},
        },
        "device": {"kind": jax.devices()[0].device_kind, "count": jax.device_count()},
    }
