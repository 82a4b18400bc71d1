"""How fluent the texts on the way from one text to another are.

python -m cosmos_jax.study --config=configs/studies/smoothness.py
"""

from configs.studies import runs


def get_config():
    config = runs.study("smoothness", "ce", "full")
    config.num_pairs = 250
    config.num_examples = 3
    config.weights = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    return config
