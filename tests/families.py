"""Tiny random models of architectures that no preset but `head` can serve, with the demo model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).parents[1] / "demo" / "model"

_SHAPE: dict[str, Any] = {
    "vocab_size": 8192, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "initializer_range": 0.15, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
#: By name: transformers' model type, and what its configuration has besides or instead.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "moe": (
        "qwen3_moe",
        {"moe_intermediate_size": 64, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": True},
    ),
    # Norms of its own, an embedding for lm_head, layers with a sliding window.
    "gemma": (
        "gemma3_text",
        {"sliding_window": 64, "query_pre_attn_scalar": 32, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    # Attention sinks, experts with biases, another activation.
    "gpt_oss": (
        "gpt_oss",
        {
            "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 64,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    # Norms after attention and after the MLP, too; half of each head is turned.
    "glm4": ("glm4", {"partial_rotary_factor": 0.5, "attention_bias": True, "tie_word_embeddings": False}),
    # Through vLLM's Transformers backend; lm_head has a bias.
    "phi": ("phi", {"tie_word_embeddings": False, "partial_rotary_factor": 0.5}),
}  # fmt: skip


#: One that the other presets serve where its layers are not quantised.
LAYERED: dict[str, tuple[str, dict[str, Any]]] = {"llama": ("llama", {"tie_word_embeddings": False})}


def write(family: str, folder: Path) -> Path:
    """Save a random model of a family, in float32, with a tokenizer; returns ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind, own = (FAMILIES | LAYERED)[family]
    config = AutoConfig.for_model(kind, **{**_SHAPE, **own})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    for file in DEMO.glob("*token*.json"):
        shutil.copy(file, folder)
    return folder
