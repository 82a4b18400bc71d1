"""Every field of a run's configuration.

Defaults are the paper's values but for what FAITHFUL sets back to them: how texts are sampled and
decoded, which decides how fast they come. Files in `configs/` call `base()` and change what their
task needs. `config_checks.py` refuses a combination that cannot work.
"""

import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

BERT_BASE_CASED = dict(
    name="google-bert/bert-base-cased",
    vocab_size=28_996,
    hidden_size=768,
    num_layers=12,
    num_heads=12,
    intermediate_size=3_072,
    max_positions=512,
)
MINILM = dict(
    name="minilm",
    vocab_size=30_522,
    hidden_size=384,
    num_layers=6,
    num_heads=12,
    intermediate_size=1_536,
    max_positions=512,
)


def base() -> ConfigDict:
    """Unconditional, 128 tokens in 16 latents, BERT-base."""
    config = ConfigDict()
    config.seed = 0
    # Type of the matrix products, "float32" or "bfloat16"; parameters stay fp32.
    config.dtype = "bfloat16"
    # What learns to write: "cosmos", or a baseline trained on the same data, "autoregressive" or
    # "masked". Token-level diffusion is "cosmos" without `autoencoder.compress`.
    config.system = "cosmos"

    # The frozen text encoder: a directory, "minilm", or a Hugging Face id. The sizes are
    # known here so that `--stage=describe` needs no files; a loaded encoder must match them.
    config.encoder = ConfigDict(BERT_BASE_CASED)

    config.data = ConfigDict()
    # embedded | jsonl:PATH | rocstories:PATH | paradetox:PATH | openwebtext:PATH | squad |
    # xsum | wikipedia. Rows with a source make the run conditional.
    config.data.source = "wikipedia"
    config.data.conditional = False  # what `describe` assumes; a run takes it from the rows
    config.data.directory = ""  # where TFDS keeps prepared data; empty: TFDS's own default
    config.data.max_length = 128  # tokens of a text, [CLS] and [SEP] included
    config.data.max_source_length = 512
    config.data.num_train_texts = 0  # training texts to use, spread over all; 0: all of them
    # Compute the frozen part of each stage once for all training texts and keep it on disk
    # (fp16, in the workdir) while the stage trains. Pays where small data is read many times.
    config.data.cache_features = False

    ae = config.autoencoder = ConfigDict()
    ae.steps = 100_000
    ae.batch_size = 512
    # False: no compression, a latent is the state of a token and num_latents is data.max_length.
    ae.compress = True
    ae.num_latents = 16
    ae.num_layers = 12
    # Layers of the decompressor; 0: as many. It runs once over all tokens, at large batches most of
    # the time of a few sampling steps. The paper has as many, its authors later took 3.
    ae.decompressor_layers = 3
    ae.num_heads = 12
    ae.dropout = 0.1
    # Deviation of the position tables at the start. With the paper's 1 they are some 5% of the
    # states they are added to, and training spends long before it tells positions apart.
    ae.position_std = 1.0
    # Tokens the head can say: "encoder" (all of them) or "corpus" (those of the training
    # texts; the others become [UNK]).
    ae.vocabulary = "encoder"
    # Start of the head: "random", as the paper's, or "regression", a least-squares map from
    # states to the encoder's word embeddings (`measure.head`), worth hours of training.
    ae.head_init = "random"
    ae.vocabulary_min_count = 1  # with "corpus": rarer tokens become [UNK] too
    # A workdir or exported directory whose autoencoder serves this run too; empty: train one here.
    ae.pretrained = ""
    ae.alignment_weight = 1.0
    # Each perturbation meets its share of a batch; see stages.py.
    ae.masked_share = 0.5
    ae.token_mask_rate = 0.3
    ae.zero_masked_states = False  # the authors' code means to, and does not
    ae.noised_share = 0.5
    ae.activation_noise_delta = 0.7
    ae.latent_dropout = 0.4
    ae.optimizer = _optimizer(final_learning_rate=1e-4, clip_norm=10.0)
    ae.ema_decay = 0.0
    ae.statistics_texts = 10_000  # texts from which means and deviations are taken
    _intervals(ae)

    df = config.diffusion = ConfigDict()
    df.steps = 200_000
    # A workdir or exported directory whose denoiser, its averaged weights and the statistics of
    # its latents, this one begins with; empty: random weights. `autoencoder.pretrained` must
    # then be the autoencoder whose latents it learned.
    df.pretrained = ""
    df.batch_size = 512
    df.num_layers = 12
    df.num_heads = 12
    df.condition_layers = 12  # 0: cross-attention reads the frozen states of the source
    # Not the paper's: small denoisers learn faster with them, see models/denoiser.py.
    df.latent_positions = False
    df.time_gains = False
    # Nor this: it learns which part of the source a text repeats, see models/pointer.py.
    df.pointer = False
    df.schedule_d = 5.0
    df.self_condition_rate = 0.5
    df.source_dropout_rate = 0.1  # sources hidden in training, for guidance
    df.optimizer = _optimizer(final_learning_rate=2e-4, clip_norm=1.0)
    df.ema_decay = 0.9999
    df.statistics_texts = 10_000
    # euler_sde | euler_ode | heun | ddim | ddpm | dpmpp_2m | dpmpp_2m_sde. The paper takes 200
    # steps of euler_sde, see FAITHFUL; docs/performance.md says why these.
    df.sampler = "dpmpp_2m"
    df.num_sampling_steps = 12
    df.min_time = 0.05
    df.time_grid = "time"  # what the steps are equal in: time | logsnr
    df.rescale = "none"  # of estimates of x_0 while sampling: none | threshold | standardise
    df.answer = "mean"  # what a sampler returns: mean | x0
    df.guidance = 1.0  # weight w of x0_u + w (x0_c - x0_u); 1: no guidance
    # Of a denoiser with a pointer, while sampling: below 1 it keeps to the likely parts.
    df.pointer_temperature = 1.0
    _intervals(df)

    # The denoiser taught to do with a few steps, see diffusion/distillation.py. It is then the one
    # that writes, by `sampling` below. 0 steps: none, texts are sampled as `diffusion` says.
    ds = config.distillation = ConfigDict()
    ds.steps = 10_000
    ds.batch_size = 128
    ds.num_sampling_steps = 3  # of ddim
    ds.teacher_steps = 24  # of dpmpp_2m, in which the denoiser goes the same way
    ds.optimizer = _optimizer(final_learning_rate=3e-6, clip_norm=1.0)
    ds.optimizer.learning_rate = 6e-5
    ds.ema_decay = 0.999
    _intervals(ds)
    ds.evaluate_every = 2_500
    del ds.remat  # the modules are the denoiser's

    ar = config.autoregressive = _baseline()
    ar.dropout = 0.1
    ar.decoding = "nucleus"  # nucleus | greedy | beam
    ar.temperature = 1.0  # of nucleus sampling
    ar.top_p = 0.95  # smallest share of the probability that nucleus sampling draws from
    ar.num_beams = 4
    ar.length_penalty = 1.0  # beams compete by log probability / length^length_penalty

    md = config.masked = _baseline()
    md.dropout = 0.1
    md.num_sampling_steps = 128

    config.generate = ConfigDict()
    config.generate.num_texts = 1_000
    config.generate.batch_size = 256

    config.evaluate = ConfigDict()
    config.evaluate.num_texts = 1_000  # held-out texts for reconstruction and losses
    config.evaluate.batch_size = 256
    # Protocols of `scores/protocols.py`, with commas between them; "" for none. What differs from
    # a protocol's own settings becomes part of the name under which its scores are given.
    config.evaluate.protocols = "offline"
    config.evaluate.words = "regex"  # what n-grams consist of: regex | spacy
    config.evaluate.block_size = 1_000  # texts that are scored as one set
    config.evaluate.seeds = 5  # of MAUVE's k-means
    config.evaluate.stemming = True  # in ROUGE
    # Directories or Hugging Face ids.
    config.evaluate.perplexity_model = "openai-community/gpt2-large"
    config.evaluate.feature_model = "openai-community/gpt2-large"
    config.evaluate.bertscore_model = "FacebookAI/roberta-large"
    config.evaluate.bertscore_layer = 0  # 0: the one that the authors of BERTScore chose
    # Classifiers, and name or number of the label that counts; "": a stand-in learned from the
    # references.
    config.evaluate.style_model = ""
    config.evaluate.style_label = "neutral"
    config.evaluate.fluency_model = ""
    config.evaluate.fluency_label = "1"

    # Devices along each axis; -1: what is left.
    config.mesh = ConfigDict()
    config.mesh.data = -1
    config.mesh.fsdp = 1
    config.mesh.tensor = 1
    return config


def _baseline() -> ConfigDict:
    """What the baselines share: the size and training of the denoiser."""
    stage = ConfigDict()
    stage.steps = 200_000
    stage.pretrained = ""  # a workdir or exported directory to begin with, as the denoiser's
    stage.batch_size = 512
    stage.num_layers = 12
    stage.num_heads = 12
    stage.optimizer = _optimizer(final_learning_rate=2e-4, clip_norm=1.0)
    stage.ema_decay = 0.9999
    stage.statistics_texts = 10_000
    _intervals(stage)
    return stage


def _optimizer(*, final_learning_rate: float, clip_norm: float) -> ConfigDict:
    """AdamW with a linear warm-up, then a cosine from the first rate to the final one."""
    return ConfigDict(
        dict(
            learning_rate=2e-4,
            final_learning_rate=final_learning_rate,
            warmup_steps=1_000,
            warmup_from=1e-8,
            weight_decay=1e-5,
            b1=0.9,
            b2=0.98,
            eps=1e-6,
            clip_norm=clip_norm,
        )
    )


def _intervals(stage: ConfigDict) -> None:
    """Steps between log lines, evaluations and checkpoints; how a batch is computed."""
    # A batch is computed in this many parts, one after the other, to save memory.
    stage.accumulate = 1
    # Compute the activations of each block again in the backward pass, to save memory.
    stage.remat = False
    stage.log_every = 50
    stage.evaluate_every = 5_000
    stage.checkpoint_every = 1_000
    stage.keep_checkpoints = 2  # the last ones
    # Keep also the best checkpoint by this metric, such as "validation_loss", and let the later
    # stages use that one; empty: they use the last. Every step that is evaluated competes.
    stage.best_metric = ""


# What `best_metric` may be.
METRICS = {
    "autoregressive": ("loss", "token_accuracy"),
    "masked": ("loss",),
    "autoencoder": ("loss", "crossentropy", "alignment", "token_accuracy", "exact_match"),
    "diffusion": ("loss", "self_conditioned_loss"),
    "distillation": ("loss",),
}

SAMPLERS = ("euler_sde", "euler_ode", "heun", "ddim", "ddpm", "dpmpp_2m", "dpmpp_2m_sde")

# The stages that train a system, in order; see `training`.
SYSTEMS = {
    "cosmos": ("autoencoder", "diffusion", "distillation"),
    "autoregressive": ("autoregressive",),
    "masked": ("masked",),
}
TRAINED = tuple(stage for stages in SYSTEMS.values() for stage in stages)

# How the last stage of a system is used to generate.
SAMPLING = {
    "diffusion": (
        "sampler",
        "num_sampling_steps",
        "min_time",
        "time_grid",
        "rescale",
        "answer",
        "guidance",
        "pointer_temperature",
    ),
    "autoregressive": ("decoding", "temperature", "top_p", "num_beams", "length_penalty"),
    "masked": ("num_sampling_steps",),
}

# Of these what a distilled denoiser has learned, so that it can be sampled in no other way.
LEARNED = ("min_time", "time_grid", "guidance", "pointer_temperature")

# The paper, where the defaults are not.
FAITHFUL = {
    "autoencoder.decompressor_layers": 0,
    "distillation.steps": 0,
    "diffusion.sampler": "euler_sde",
    "diffusion.num_sampling_steps": 200,
    "diffusion.min_time": 0.05,
    "diffusion.time_grid": "time",
    "diffusion.rescale": "none",
    "diffusion.answer": "mean",
}


# What a run has that was begun when there were no such fields, and fields that there were.
_BEFORE = {"autoencoder.decompressor_layers": 0, "distillation.steps": 0}
_NO_MORE = ("distilled_steps", "teacher_steps", "teacher_guidance")


def recorded(content: Mapping[str, Any]) -> ConfigDict:
    """The config that a workdir or an exported directory has recorded, an older one's filled up."""
    config = base()
    config.update_from_flattened_dict(_BEFORE)
    config.update(content)
    for name in _NO_MORE:
        if name in config.diffusion:
            del config.diffusion[name]
    return config


def training(config: ConfigDict) -> tuple[str, ...]:
    """The stages that train a run, in order; the last one is sampled."""
    stages = SYSTEMS[config.system]
    return stages if config.distillation.steps else tuple(s for s in stages if s != "distillation")


def stages(config: ConfigDict) -> tuple[str, ...]:
    """What a run goes through, in order."""
    return (*training(config), "generate", "evaluate")


def sampling(config: ConfigDict) -> dict[str, Any]:
    """How texts are generated: the settings of the last stage that trains.

    A distilled denoiser takes its own number of steps, and has guidance learned.
    """
    stage = training(config)[-1]
    if stage != "distillation":
        return {name: config[stage][name] for name in SAMPLING[stage]}
    return {
        **{name: config.diffusion[name] for name in SAMPLING["diffusion"]},
        "sampler": "ddim",
        "num_sampling_steps": config.distillation.num_sampling_steps,
        "guidance": 1.0,
    }


def flatten(config: ConfigDict) -> dict[str, Any]:
    """{"diffusion.steps": 200000, ...}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict):
            flat.update({f"{key}.{inner}": leaf for inner, leaf in flatten(value).items()})
        else:
            flat[key] = value
    return flat


def to_json(config: ConfigDict) -> str:
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> ConfigDict:
    return ConfigDict(json.loads(text))
