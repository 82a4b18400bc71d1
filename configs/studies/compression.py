"""Reconstruction and generation with fewer and more latents.

python -m cosmos_jax.study --config=configs/studies/compression.py
"""

from configs.studies import runs


def get_config():
    return runs.study("compression", "full_n2", "full_n4", "full", "full_n16")
