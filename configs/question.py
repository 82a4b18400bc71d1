"""Question generation, SQuAD 2.0: a question of 64 tokens given its answer and a context.

python -m cosmos_jax.main --config=configs/question.py --workdir=runs/squad

For comparison, BART-base reaches BLEU-4 24.7 and ROUGE-L 52.7.
"""

from cosmos_jax import config as config_lib


def get_config():
    config = config_lib.base()
    config.data.source = "squad"
    config.data.conditional = True
    config.data.max_length = 64
    config.data.max_source_length = 512
    config.evaluate.protocols = "bleu,rouge,bertscore,offline"
    return config
