"""Tiny random models of every supported architecture, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")

SHAPE: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / heads: the attention is wider than the residual stream
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def tiny_model(
    architecture: str, folder: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> Path:
    """Save a random model of ``architecture`` (one of ARCHITECTURES) to ``folder``, without a tokenizer.

    Norm weights and the biases of q, k and v (Qwen2) are random too: left at one and zero they would hide errors.
    Its loss is about ln(vocabulary), so a test that wants it to learn must raise ``learn.max_loss`` (to 2).

    Args:
        overrides: entries of the model's config, over those of SHAPE.
    Returns:
        ``folder``.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r}; allowed: {', '.join(ARCHITECTURES)}")
    shape = {**SHAPE, **overrides}
    if architecture == "qwen2":
        shape.pop("head_dim")  # Qwen2 always divides the hidden size by the number of heads
    config = AutoConfig.for_model(architecture, tie_word_embeddings=architecture == "qwen3", **shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            elif name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.3)
    model.to(dtype).save_pretrained(folder)
    return Path(folder)
