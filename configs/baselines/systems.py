"""What each system that Cosmos is compared with changes in the config of a task."""

from ml_collections import ConfigDict

from cosmos_jax.errors import UserError


def change(config: ConfigDict, system: str) -> ConfigDict:
    """The config with "autoregressive", "masked" or "token_level" in the place of Cosmos."""
    if system in ("autoregressive", "masked"):
        config.system = system
    elif system == "token_level":
        ae = config.autoencoder
        ae.compress = False
        ae.num_latents = config.data.max_length
        # As in TEncDM (arXiv 2402.19097): a small decoder, trained on noised states of tokens,
        # and more noise in the schedule.
        ae.decompressor_layers = 3
        ae.alignment_weight = 0.0
        ae.masked_share = 0.0
        ae.noised_share = 1.0
        ae.latent_dropout = 0.0
        config.diffusion.schedule_d = 9.0
    else:
        raise UserError(f"--config: no system {system!r}: autoregressive, masked or token_level")
    return config
