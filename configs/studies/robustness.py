"""How much of a text survives noise on its latents, with the recipe part by part.

python -m cosmos_jax.study --config=configs/studies/robustness.py
"""

from configs.studies import runs


def get_config():
    return runs.noise_study("robustness", "ce", "alignment", "activation", "full")
