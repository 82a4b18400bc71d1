"""The paper's central claim: the full recipe against cross-entropy alone, at one number of latents.

python -m cosmos_jax.study --config=configs/studies/recipe.py
"""

from configs.studies import runs


def get_config():
    return runs.study("recipe", "ce", "full")
