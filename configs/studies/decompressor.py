"""What a deeper decompressor gives back of a text, from clean latents and from noised ones.

python -m cosmos_jax.study --config=configs/studies/decompressor.py
"""

from configs.studies import runs


def get_config():
    return runs.noise_study("decompressor", "full", "decompressor_2", "decompressor_4")
