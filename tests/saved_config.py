"""A test's config for the command in a process of its own: --config=tests/saved_config.py:JSON.

Even tiny tensors are split there, as large ones are in earnest.
"""

from pathlib import Path

from cosmos_jax import config as config_lib
from cosmos_jax import sharding


def get_config(path=""):
    sharding.MIN_SPLIT_SIZE = 64
    return config_lib.from_json(Path(path).read_text())
