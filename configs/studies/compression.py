"""Reconstruction and generation with fewer and more latents.

python -m cosmos_jax.study --config=configs/studies/compression.py
"""

from configs.studies import runs


def get_config():
    return runs.study("compression", "latents_4", "full", "latents_16")
