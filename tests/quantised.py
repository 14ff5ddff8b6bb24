"""Tiny models with quantised layers, of our own making, and the same with those layers as they are read back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from vllm.platforms import current_platform

GROUP = 32
FP8 = torch.float8_e4m3fn
#: In which order AWQ packs eight columns.
_AWQ = (0, 2, 4, 6, 1, 3, 5, 7)

#: Name of a layer's part -> tensor; and the weight that it stands for, [out, in].
Parts = tuple[dict[str, Tensor], Tensor]


def _groups(weight: Tensor, zero: int) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits [out, in] of values from 0 to 15, scales [out, groups] in bfloat16, and what they stand for."""
    grouped = weight.unflatten(1, (-1, GROUP))
    scales = (grouped.abs().amax(-1) / 7).bfloat16()
    q = (grouped / scales.float()[..., None]).round().clamp(-8, 7).to(torch.int32)
    return (q + zero).flatten(1), scales, (q * scales.float()[..., None]).flatten(1)


def _packed(values: Tensor, order: tuple[int, ...] = tuple(range(8))) -> Tensor:
    """[..., n] values of four bits as [..., n / 8] int32."""
    eights = values.to(torch.int64).unflatten(-1, (-1, 8))
    found = sum(eights[..., column] << (4 * i) for i, column in enumerate(order))
    assert isinstance(found, Tensor)
    return torch.where(found >= 2**31, found - 2**32, found).to(torch.int32)


def int4(weight: Tensor) -> Parts:
    """compressed-tensors' pack-quantized, in groups of 32."""
    q, scales, dense = _groups(weight, 8)
    return {"weight_packed": _packed(q), "weight_scale": scales, "weight_shape": torch.tensor(weight.shape)}, dense


def awq(weight: Tensor) -> Parts:
    q, scales, dense = _groups(weight, 8)
    zeros = torch.full((scales.shape[1], scales.shape[0]), 8)
    return {"qweight": _packed(q.T, _AWQ), "qzeros": _packed(zeros, _AWQ), "scales": scales.T.half().contiguous()}, dense


def fp8_per_channel(weight: Tensor) -> Parts:
    """What vLLM makes of a plain checkpoint with ``--quantization fp8_per_channel``."""
    scale = weight.bfloat16().float().abs().amax(1, keepdim=True) / 448
    return {"weight": weight}, (weight.bfloat16().float() / scale).to(FP8).float() * scale


def int8(weight: Tensor) -> Parts:
    """compressed-tensors' int-quantized: a scale for each output; inputs are quantised by token."""
    scale = weight.abs().amax(1, keepdim=True) / 127
    q = (weight / scale).round()
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale


def _groups_of(weights: dict[str, Any], inputs: dict[str, Any] | None, layout: str) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors", "format": layout, "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }  # fmt: skip


_FOUR: dict[str, Any] = {
    "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": GROUP, "dynamic": False,
}  # fmt: skip
_INT8: dict[str, Any] = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
#: Name -> what it makes of a weight, and what config.json says of it; None: vLLM is told on the command line.
METHODS: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any] | None]] = {
    "int4": (int4, _groups_of(_FOUR, None, "pack-quantized")),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "zero_point": True, "version": "gemm"}),
    "fp8_per_channel": (fp8_per_channel, None),
}
#: With eight bits of integers, weights and inputs: of config.json alone.
INT8 = _groups_of(_INT8, {**_INT8, "strategy": "token", "dynamic": True}, "int-quantized")
#: What vLLM's CPU backend serves without LoRA alone.
WITHOUT_LORA: dict[str, tuple[Callable[[Tensor], Parts], dict[str, Any] | None]] = {"int8": (int8, INT8)}


def quantise(folder: Path, name: str, dense: Path) -> None:
    """Replace the linear layers of the model in ``folder`` by quantised ones, and write the model that they stand for to
    ``dense``, in float32."""
    _multiplies(name)
    make, said = (METHODS | WITHOUT_LORA)[name]
    tensors, read = load_file(folder / "model.safetensors"), {}
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        layer, _, kind = key.rpartition(".")
        if kind == "weight" and layer.endswith("_proj"):
            parts, read[key] = make(tensor.float())
            found |= {f"{layer}.{part}": x.contiguous() for part, x in parts.items()}
        else:
            found[key] = read[key] = tensor
    config = json.loads((folder / "config.json").read_text())
    dense.mkdir(parents=True)
    (dense / "config.json").write_text(json.dumps(config))
    save_file({key: x.contiguous() for key, x in read.items()}, dense / "model.safetensors", {"format": "pt"})
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    if said is not None:
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": said}))


def _multiplies(name: str) -> None:
    """Skip a test where vLLM's build for this CPU has no products of four bits: those without AVX-512 have none."""
    current_platform.import_kernels()
    if name in ("int4", "awq") and not hasattr(torch.ops._C, "cpu_gemm_wna16"):
        pytest.skip("vLLM has no products of four bits for this CPU")
