"""Summarisation of news, XSum: a summary of 64 tokens given an article of 512.

python -m cosmos_jax.main --config=configs/summarize.py --workdir=runs/xsum

For comparison, ROUGE-1/2/L on XSum: BART-base 39.9/18.0/32.6, LD4LG 38.7/16.6/31.9.
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "xsum"
    config.data.conditional = True
    config.data.max_length = 64
    config.data.max_source_length = 512
    config.evaluate.protocols = "rouge,bertscore,offline"
    return config
