"""The weight of a live linear layer of vLLM's, whatever it is stored in: what the layer makes of an identity matrix.

vLLM's kernels permute, pack and scale what they multiply with, each in its own way; their product alone says what is served.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

from vllm_ttt.errors import ConfigError

#: Columns of a weight that are read at once.
COLUMNS = 256
#: Random inputs that a layer is tried with.
ROWS = 8
#: By how much products with a weight that has been read may differ from the layer's own: what 16 bits round away, and what a
#: quantised layer rounds of its inputs.
PLAIN, QUANTISED = 0.02, 0.15
#: Powers of two by which a static scale of inputs is multiplied: those products are exact in the type that it belongs to.
_STEPS = {torch.float8_e4m3fn: 256.0, torch.int8: 64.0}


def is_plain(layer: Any) -> bool:
    """Whether the layer is not quantised."""
    return isinstance(_base(layer).quant_method, UnquantizedLinearMethod | UnquantizedEmbeddingMethod)


def is_shared(layer: Any, dtype: torch.dtype) -> bool:
    """Whether `dense` gives the model's own tensor in ``dtype``, and no copy."""
    weight = getattr(_base(layer), "weight", None)
    return is_plain(layer) and weight is not None and weight.numel() > 0 and weight.dtype == dtype


def shape(layer: Any) -> tuple[int, int]:
    """Of the weight, [out, in]."""
    layer = _base(layer)
    return layer.output_size_per_partition, _width(layer)


def copied(layer: Any, dtype: torch.dtype, rows: int | None = None) -> int:
    """Bytes of the weight that a step in ``dtype`` has for itself: none where it has the model's own tensor.

    Args:
        rows: as for `dense`.
    """
    layer = _base(layer)
    outputs = layer.output_size_per_partition if rows is None else rows
    return 0 if is_shared(layer, dtype) else outputs * _width(layer) * dtype.itemsize


def dense(layer: Any, dtype: torch.dtype, rows: int | None = None) -> Tensor:
    """The weight as [out, in], in the model's ``dtype``: the model's own tensor where there is one, else it is read.

    Args:
        layer: a linear layer or lm_head, also inside a LoRA wrapper. rows: how many of its outputs; None: all.
    """
    layer = _base(layer)
    if is_shared(layer, dtype):
        return layer.weight.data[:rows]
    width, scale, found = _width(layer), probe(layer), []
    with torch.inference_mode():
        for first in range(0, width, COLUMNS):
            n = min(COLUMNS, width - first)
            eye = torch.zeros(n, width, dtype=dtype, device=_device(layer))
            eye[torch.arange(n), first + torch.arange(n)] = scale
            columns = layer.quant_method.apply(layer, eye, bias=None)[:, :rows].T
            found.append(columns.to(dtype) if scale == 1.0 else (columns.float() / scale).to(dtype))
        return torch.cat(found, 1)


def joins(layer: Any, dtype: torch.dtype, ways: str) -> bool:
    """Whether A is to lie below the weight: on CUDA, where the step in ``dtype`` multiplies with the model's own. ``ways``:
    `learn.fp8`."""
    if ways != "none" or not is_shared(layer, dtype):
        return False
    weight = _base(layer).weight
    return weight.is_cuda and weight.is_contiguous()


def joined(layer: Any, a_RI: Tensor) -> Tensor:
    """[out + R, in]: the model's own weight, moved, with ``a_RI`` below it. The layer has the first rows of it from now on, and
    multiplies with the same numbers."""
    layer = _base(layer)
    whole = torch.cat((layer.weight.data, a_RI))
    layer.weight.data = whole[: layer.weight.shape[0]]
    return whole


def probe(layer: Any) -> float:
    """What stands for 1 in the identity. A layer whose inputs have one scale for all would round 1, or cut it off."""
    scale = getattr(layer, "input_scale", None)
    if not isinstance(scale, Tensor) or scale.numel() == 0:
        return 1.0
    kind = next((x.dtype for x in layer.parameters() if x.dtype in _STEPS), torch.float8_e4m3fn)
    return _STEPS[kind] * scale.max().item()


def bias_of(layer: Any, dtype: torch.dtype) -> Tensor | None:
    """The bias as [out], float32; some kernels permute it, too."""
    layer = _base(layer)
    if getattr(layer, "bias", None) is None:
        return None
    if is_plain(layer):
        return layer.bias.data.float()
    with torch.inference_mode():
        nothing = torch.zeros(1, _width(layer), dtype=dtype, device=_device(layer))
        return layer.quant_method.apply(layer, nothing, bias=layer.bias)[0].float()


def product(layer: Any, dtype: torch.dtype) -> Callable[[Tensor], Tensor] | None:
    """x W^T as it is served; None where that is the product with what `dense` says."""
    layer = _base(layer)
    if is_plain(layer):
        return None
    return lambda x: layer.quant_method.apply(layer, x.to(dtype), bias=None).to(x.dtype)


def error(layer: Any, weight: Tensor, name: str) -> float:
    """By how much products of random inputs with ``weight``, which was read from it, differ from the layer's own, relative.

    Raises ConfigError where that is more than a kernel can round away.
    """
    layer = _base(layer)
    x = torch.randn(ROWS, _width(layer), generator=torch.Generator().manual_seed(0)) * (probe(layer) / 6)
    x = x.to(weight)
    with torch.inference_mode():
        served = layer.quant_method.apply(layer, x, bias=None).float()[:, : len(weight)]
        found = ((x.float() @ weight.float().T - served).norm() / served.norm().clamp(min=1e-30)).item()
    limit = PLAIN if is_plain(layer) else QUANTISED
    if not found < limit:
        raise ConfigError(
            f"{name} ({type(layer.quant_method).__name__}) cannot be read: products with what was read are off by {found:.1%}, "
            f"and {limit:.0%} is allowed; serve with --ttt-preset head, or name a model that is not quantised"
        )
    return found


def _base(layer: Any) -> Any:
    return getattr(layer, "base_layer", layer)


def _width(layer: Any) -> int:
    """Its inputs."""
    width = getattr(layer, "input_size_per_partition", None)
    return layer.embedding_dim if width is None else width


def _device(layer: Any) -> torch.device:
    return next((x.device for x in layer.parameters()), torch.device("cpu"))
