"""Write a random LoRA adapter for a model, on all its linear layers or some: what bench_engine.py's stock multi-LoRA serves."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors.torch import save_file

#: Layers that vLLM fuses: what it calls them, and what they are made of.
FUSED = {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}


def write_adapter(folder: Path, hf: object, rank: int, modules: Collection[str] | None = None) -> Path:
    """An adapter in PEFT's layout.

    Args:
        hf: the model's transformers config, of a Llama-like model.
        rank: of each layer that it is on.
        modules: those layers, by vLLM's full names; None: the seven linear layers of each layer of the model.
    """
    config = vars(hf)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = config.get("head_dim") or hidden // config["num_attention_heads"]
    q, kv = head * config["num_attention_heads"], head * config["num_key_value_heads"]
    shapes = {
        "self_attn.q_proj": (hidden, q),
        "self_attn.k_proj": (hidden, kv),
        "self_attn.v_proj": (hidden, kv),
        "self_attn.o_proj": (q, hidden),
        "mlp.gate_proj": (hidden, inner),
        "mlp.up_proj": (hidden, inner),
        "mlp.down_proj": (inner, hidden),
    }
    wanted = None
    if modules is not None:
        parts = [name.split(".", 3) for name in modules]  # model, layers, number, which
        wanted = {f"{layer}.{part}" for _, _, layer, name in parts for part in FUSED.get(name, (name,))}
    tensors, present = {}, dict[str, None]()
    for layer in range(config["num_hidden_layers"]):
        for name, (width, out) in shapes.items():
            if wanted is not None and f"{layer}.{name}" not in wanted:
                continue
            present[name.rpartition(".")[2]] = None
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(rank, width, dtype=torch.bfloat16) / width**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, rank, dtype=torch.bfloat16) * 1e-3
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none"}
    settings["target_modules"] = list(present)
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
