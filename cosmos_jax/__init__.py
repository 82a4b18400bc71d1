"""Cosmos in JAX: text generation by diffusion in a compressed, smooth latent space."""

__version__ = "0.1.0"
