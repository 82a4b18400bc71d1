"""How much of a text survives noise on its latents, with the recipe part by part.

python -m cosmos_jax.study --config=configs/studies/robustness.py
"""

from configs.studies import runs


def get_config():
    config = runs.study("robustness", "ce", "alignment", "activation", "full")
    config.num_texts = 500
    config.noise_levels = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # deviations of a latent
    return config
