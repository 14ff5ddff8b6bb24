"""A linear layer of vLLM's on CUDA with the deltas of sessions: while a batch decodes, they are computed beside its product.

At the end of a product, and at the beginning of the next kernel, most of the device waits. Two kernels of a delta after each
product of an adapted layer would wait twice more; on a stream of their own they fill those gaps. What they find is added when
both are there, to the same bits as one after the other.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm import envs
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_ttt.patches import _contract
from vllm_ttt.worker.serve.gpu_lora import add_rows, by_rows, decodes, parts_of, session_lora
from vllm_ttt.worker.step.weights import is_plain


def _session_linear(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor,
    starts: Tensor, active: Tensor, no_lora: Tensor, num_active: Tensor,
) -> Tensor:  # fmt: skip
    """x W^T + bias, and for each row of a session x A^T B^T beside it.

    Args:
        x: [N, in]. w: [out, in]. Others as for `session_lora`.
    """
    if no_lora.item():  # on the host
        return linear(x, w, bias)
    if not decodes(x, b):
        y = linear(x, w, bias)
        session_lora(y, x, a, b, slots, by_slot, counts, starts, active, no_lora, num_active)
        return y
    here, beside = torch.cuda.current_stream(), _beside(x.device)
    d, parts = torch.empty(x.shape[0], w.shape[0], device=x.device), parts_of(x, a[0, 0])
    beside.wait_stream(here)
    with torch.cuda.stream(beside):
        by_rows(d, x, a[0, 0], b, slots, parts, add=False)
    y = linear(x, w, bias)
    here.wait_stream(beside)
    add_rows(y, d, slots)
    return y


def _session_linear_fake(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: list[Tensor], slots: Tensor, by_slot: Tensor, counts: Tensor,
    starts: Tensor, active: Tensor, no_lora: Tensor, num_active: Tensor,
) -> Tensor:  # fmt: skip
    return x.new_empty(x.shape[0], w.shape[0])


direct_register_custom_op(
    op_name="ttt_session_linear", op_func=_session_linear, mutates_args=[], fake_impl=_session_linear_fake
)


@cache
def _beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class Beside:
    """Mixed into the class of a live LoRA layer by `adopt`."""

    base_layer: Any
    lora_a_stacked: tuple[Tensor, ...]
    lora_b_stacked: tuple[Tensor, ...]
    punica_wrapper: Any

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """vLLM's: the layer's own product, and the adapters'."""
        if x.ndim != 2:  # vLLM's Transformers backend
            return super().apply(x, bias)  # type: ignore[misc]
        punica, b = self.punica_wrapper, list(self.lora_b_stacked)
        args = punica.token_mapping_meta.meta_args(x.shape[0], punica.lora_config.specialize_active_lora)
        return torch.ops.vllm.ttt_session_linear(x, self.base_layer.weight, bias, self.lora_a_stacked[0], b, *args)


def adopt(layer: Any) -> None:
    """Let a live LoRA layer compute its deltas beside its product, where that is vLLM's plain one. Call before the model is
    traced, and after all slots have one A."""
    check()
    if overlaps(layer):
        layer.__class__ = type(f"Beside{type(layer).__name__}", (Beside, type(layer)), {})


def check() -> None:
    """Raises PatchContractError where vLLM's method is not the one that `Beside` stands for."""
    _contract.check(BaseLinearLayerWithLoRA, "apply", "self x bias")


def overlaps(layer: Any) -> bool:
    """Whether the layer's product is a plain one, which can be computed here to the same bits."""
    return (
        type(layer).apply is BaseLinearLayerWithLoRA.apply
        and is_plain(layer)
        and not envs.VLLM_BATCH_INVARIANT
        and layer.base_layer.quant_method._gemm_impl is default_unquantized_gemm
    )
