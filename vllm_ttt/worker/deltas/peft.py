"""A session's delta as a PEFT adapter, which stock vLLM and peft load; and back.

What is written is what is served: A and B in the model's dtype, lora_alpha equal to the rank, so that W' = W + B A.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.geometry import Geometry
from vllm_ttt.worker.deltas import delta_file
from vllm_ttt.worker.deltas.delta_file import FileError

#: Adapters of other tools may be in any of these.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PREFIX = "base_model.model."


def adapter(
    deltas: dict[str, Tensor], projections: dict[int, Tensor], geometry: Geometry, base_model: str, metadata: dict[str, str]
) -> bytes:
    """``adapter_model.safetensors``. Its metadata holds ``adapter_config``, the text of adapter_config.json.

    Args:
        deltas: B by the names of ``geometry.shapes``, float32, on the host; with the preset head, lm_head times B.
        projections: A by the number of its inputs, in the dtype of the adapter, on the host.
        metadata: further entries.
    """
    tensors = {}
    for name, (width, b) in _split(deltas, geometry).items():
        a = projections[width]
        key_a, key_b = _keys(name, geometry)
        tensors[key_a] = a.clone()  # gate and up share it, which the format does not allow
        tensors[key_b] = b.to(a.dtype, copy=True)
    return delta_file.encode(tensors, {**metadata, "adapter_config": json.dumps(config(geometry, base_model))})


def config(geometry: Geometry, base_model: str) -> dict[str, Any]:
    """What adapter_config.json says. Modules are named in full: only the adapted layers have them."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "r": geometry.rank,
        "lora_alpha": geometry.rank,
        "target_modules": [_called(name, geometry) for name in _modules(geometry)],
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
    }


def read_adapter(data: bytes, settings: dict[str, Any], geometry: Geometry) -> dict[str, Tensor]:
    """B by the names of ``geometry.shapes``, float32, from an adapter that `adapter` could have written.

    Raises FileError where its configuration, its tensors or its projections A are not those of ``geometry``: only B can be
    taken over, since every session shares A.
    """
    if geometry.head:
        raise FileError(
            "a session of the preset head takes no adapter: its lora_B is lm_head times what the session has learned"
        )
    wanted = {"peft_type": "LORA", "r": geometry.rank, "lora_alpha": geometry.rank}
    for key, value in wanted.items():
        if settings.get(key) != value:
            raise FileError(f"its adapter_config has {key} {settings.get(key)!r}; expected is {value!r}")
    for key in ("use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "modules_to_save", "layer_replication"):
        if settings.get(key):
            raise FileError(f"its adapter_config has {key}, which a session cannot have")
    shapes: dict[str, tuple[int, ...]] = {}
    for name, (width, out) in _modules(geometry).items():
        key_a, key_b = _keys(name, geometry)
        shapes[key_a], shapes[key_b] = (geometry.rank, width), (out, geometry.rank)
    tensors = delta_file.decode(data, shapes, DTYPES)
    found = {}
    for name, (width, _) in _modules(geometry).items():
        a, b = (tensors[key] for key in _keys(name, geometry))
        own = projections(geometry, torch.float32)[width]
        if (a.float() - own).norm() > 0.01 * own.norm():  # what bf16 rounds away is less; another seed is 1.4
            raise FileError(f"its A of {name} is not that of adapt.seed {geometry.seed}; a session takes no other A")
        found[name] = b.float()
    for name in geometry.shapes:
        layer, _, module = name.rpartition(".")
        if module == "gate_up_proj" and not geometry.packed:
            found[name] = torch.cat((found[f"{layer}.gate_proj"], found[f"{layer}.up_proj"]))
    return {name: found[name] for name in geometry.shapes}


@lru_cache(maxsize=4)
def projections(geometry: Geometry, dtype: torch.dtype) -> dict[int, Tensor]:
    """A by the number of its inputs, as worker/step/tail.py draws it; another build of LAPACK may differ in the last digits."""
    from vllm_ttt.worker.step.tail import make_projection

    widths = {geometry.hidden} if geometry.head else {geometry.attention, geometry.hidden, geometry.feed_forward}
    return {width: make_projection(width, geometry.rank, geometry.seed).to(dtype) for width in widths}


def _called(name: str, geometry: Geometry) -> str:
    """What transformers' model calls a module of ours."""
    return name.replace("model.layers", geometry.peft, 1)


def _keys(name: str, geometry: Geometry) -> tuple[str, str]:
    """Of its A and its B."""
    called = f"{_PREFIX}{_called(name, geometry)}"
    return f"{called}.lora_A.weight", f"{called}.lora_B.weight"


def _modules(geometry: Geometry) -> dict[str, tuple[int, int]]:
    """PEFT's module, by our name of the layer -> (inputs, outputs); those of lm_head are the model's vocabulary, which no
    geometry knows: 0."""
    if geometry.head:
        return {"lm_head": (geometry.hidden, 0)}
    D, F = geometry.hidden, geometry.feed_forward
    widths = {
        "o_proj": {"self_attn.o_proj": (geometry.attention, D)},
        "gate_up_proj": {"mlp.gate_proj": (D, F), "mlp.up_proj": (D, F)},
        "down_proj": {"mlp.down_proj": (F, D)},
    }
    if geometry.packed:
        widths["gate_up_proj"] = {"mlp.gate_up_proj": (D, 2 * F)}
    adapted = {name: sizes for module in geometry.outputs for name, sizes in widths[module].items()}
    layers = range(geometry.layer, geometry.layer + geometry.layers)
    return {f"model.layers.{i}.{module}": sizes for i in layers for module, sizes in adapted.items()}


def _split(deltas: dict[str, Tensor], geometry: Geometry) -> dict[str, tuple[int, Tensor]]:
    """PEFT's module -> (inputs, B)."""
    parts = dict(deltas)
    for name, b in deltas.items():
        layer, _, module = name.rpartition(".")
        if module == "gate_up_proj" and not geometry.packed:
            parts[f"{layer}.gate_proj"], parts[f"{layer}.up_proj"] = b.split(geometry.feed_forward)
    return {name: (width, parts[name]) for name, (width, _) in _modules(geometry).items()}
