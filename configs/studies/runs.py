"""The runs that the studies compare, small enough for two CPU cores.

All studies in one workdir share them: what one has trained the next one finds.
"""

from ml_collections import ConfigDict

from configs import quickstart

NOTHING = {
    "autoencoder.alignment_weight": 0.0,
    "autoencoder.masked_share": 0.0,
    "autoencoder.noised_share": 0.0,
    "autoencoder.latent_dropout": 0.0,
}
# What each run changes in `base`: the recipe part by part, the depth of the decompressor, which in
# "full" is 1, and the number of latents.
RUNS = {
    "ce": NOTHING,
    "alignment": {**NOTHING, "autoencoder.alignment_weight": 1.0},
    "activation": {"autoencoder.latent_dropout": 0.0},
    "full": {},
    "decompressor_2": {"autoencoder.decompressor_layers": 2},
    "decompressor_4": {"autoencoder.decompressor_layers": 4},
    "latents_4": {"autoencoder.num_latents": 4},
    "latents_16": {"autoencoder.num_latents": 16},
}


def base() -> ConfigDict:
    """The quickstart's sizes with the paper's recipe: perturbations in full, a random head."""
    config = quickstart.get_config()
    config.data.num_train_texts = 15_000
    ae = config.autoencoder
    ae.head_init = "random"  # the regression would align the states of a run without alignment
    ae.masked_share = 0.5
    ae.noised_share = 0.5
    ae.latent_dropout = 0.4
    ae.steps = 2_400
    ae.evaluate_every = 800
    ae.checkpoint_every = 800
    df = config.diffusion
    df.steps = 2_000
    df.latent_positions = False
    df.time_gains = False
    df.sampler = "euler_sde"  # the paper's, in a quarter of its steps
    df.num_sampling_steps = 50
    config.distillation.steps = 0
    df.evaluate_every = 1_000
    df.checkpoint_every = 1_000
    config.generate.num_texts = 500
    config.evaluate.num_texts = 500
    return config


def study(name: str, *runs: str) -> ConfigDict:
    """A study: a base config, the runs in order, and what each of them changes."""
    config = ConfigDict()
    config.study = name
    config.base = base()
    config.runs = runs
    config.changes = ConfigDict({run: RUNS[run] for run in runs}, convert_dict=False)
    return config


def noise_study(name: str, *runs: str) -> ConfigDict:
    """A study of what is decoded from noised latents."""
    config = study(name, *runs)
    config.num_texts = 500
    config.noise_levels = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)  # deviations of a latent
    return config
