"""GPT-2 of PyTorch and transformers, as large as the autoregressive baseline.

The comparison that others make: random weights, eager, `generate` with its cache, and a loop of
training steps. PyTorch is not needed otherwise.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cosmos_jax.errors import UserError


def make_generator(config: ConfigDict) -> Callable[[int, int], np.ndarray]:
    """(number of texts, of tokens) -> token ids in the host's memory, the start token first.

    Raises:
      UserError: PyTorch is not installed, or the texts are to have sources.
    """
    model, device = _model(config, config.dtype)
    import torch

    settings = config.autoregressive
    how = {
        "nucleus": {
            "do_sample": True,
            "top_p": settings.top_p,
            "top_k": 0,
            "temperature": settings.temperature,
        },
        "greedy": {"do_sample": False},
        "beam": {"do_sample": False, "num_beams": settings.num_beams},
    }[settings.decoding]
    model.eval()

    def generate(num_texts: int, num_tokens: int) -> np.ndarray:
        start = torch.zeros((num_texts, 1), dtype=torch.long, device=device)
        with torch.inference_mode():
            ids = model.generate(
                start,
                attention_mask=torch.ones_like(start),
                max_new_tokens=num_tokens - 1,
                use_cache=True,
                pad_token_id=0,
                **how,
            )
        return ids.cpu().numpy()

    return generate


def make_training(config: ConfigDict, batch_size: int) -> Callable[[int], None]:
    """(number of steps) -> None: trains on random tokens, with AdamW, and waits for the end.

    Products are in the config's dtype, parameters fp32, as ours.

    Raises:
      UserError: PyTorch is not installed, or the texts are to have sources.
    """
    model, device = _model(config, "float32")
    import torch

    length = config.data.max_length
    ids = torch.randint(config.encoder.vocab_size, (batch_size, length), device=device)
    clip_norm = config.autoregressive.optimizer.clip_norm
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    dtype = getattr(torch, config.dtype)
    model.train()

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            with torch.autocast(device, dtype, enabled=dtype != torch.float32):
                loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def _model(config: ConfigDict, dtype: str) -> tuple[Any, str]:
    """GPT-2 with random weights, and the device it is on."""
    if importlib.util.find_spec("torch") is None:
        raise UserError("PyTorch is not installed")
    if config.data.conditional:
        raise UserError("GPT-2 of transformers takes no source")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    settings = config.autoregressive
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=config.encoder.vocab_size,
            n_positions=config.data.max_length,
            n_embd=config.encoder.hidden_size,
            n_layer=settings.num_layers,
            n_head=settings.num_heads,
            embd_pdrop=settings.dropout,
            resid_pdrop=settings.dropout,
            attn_pdrop=0.0,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    return torch.nn.Module.to(model, device, getattr(torch, dtype)), device
