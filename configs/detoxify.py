"""Detoxification, ParaDetox: a neutral rewrite of a toxic sentence, 40 tokens each.

python -m cosmos_jax.main --config=configs/detoxify.py \
    --config.data.source=paradetox:PATH_TO_TSV --workdir=runs/paradetox
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "paradetox:PATH"
    config.data.conditional = True
    config.data.max_length = 40
    config.data.max_source_length = 40
    config.evaluate.protocols = "detoxification,offline"
    config.evaluate.style_model = "s-nlp/roberta_toxicity_classifier"
    config.evaluate.fluency_model = "textattack/roberta-base-CoLA"
    return config
