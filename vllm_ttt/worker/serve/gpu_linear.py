"""A linear layer of vLLM's on CUDA with the deltas of sessions: while a batch decodes, x A^T is computed beside its product.

At the end of a product, and at the beginning of the next kernel, most of the device waits. The kernels of x A^T after each
product of an adapted layer would wait twice more; on a stream of their own they fill those gaps. What reads B comes after both:
beside a product, which takes the whole device, it would run no earlier (loadtests/bench_slots.py).
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear
from vllm import envs, forward_context
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.model_executor.layers.utils import default_unquantized_gemm
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_ttt.patches import _contract
from vllm_ttt.worker.serve.gpu_kernels import decodes, expand, shrink
from vllm_ttt.worker.serve.gpu_lora import session_lora
from vllm_ttt.worker.serve.gpu_slots import halves
from vllm_ttt.worker.step.weights import is_plain

#: The name by which vLLM's forward context knows the `SessionPunicaGPU` of the engine whose batch runs.
MAPPING = "vllm_ttt.mapping"


def session_linear(
    x: Tensor, w_IO: Tensor, bias: Tensor | None, a: Tensor, b: list[Tensor], scales: list[Tensor], slots: Tensor,
    by_slot: Tensor, counts: Tensor, starts: Tensor, active: Tensor, no_lora: Tensor,
) -> Tensor:  # fmt: skip
    """x W^T + bias, and for each row of a session x A^T B^T beside it.

    Args:
        x: [N, in]. w_IO: the weight as a view [in, out]. Others as for `session_lora`.
    """
    w = w_IO.T
    if no_lora.item():  # on the host
        return linear(x, w, bias)
    if not decodes(x, b):
        y = linear(x, w, bias)
        session_lora(y, x, a, b, scales, slots, by_slot, counts, starts, active, no_lora)
        return y
    here, beside = torch.cuda.current_stream(), _beside(x.device)
    given = here.record_event()
    y = linear(x, w, bias)  # first: where it leaves a part of the device free, the other kernels have that
    beside.wait_event(given)
    with torch.cuda.stream(beside):
        r = shrink(x, a[0, 0])
    here.wait_stream(beside)
    expand(y, *r, b, scales, slots)
    return y


def _session_linear(x: Tensor, w_IO: Tensor, bias: Tensor | None, a: Tensor, b: list[Tensor], scales: list[Tensor]) -> Tensor:
    """`session_linear` of the batch that runs.

    What says whose rows are whose does not come as tensors: of an op that is given one on the host, or one that does not begin
    at 16 bytes, torch.compile takes the output for one that may not either, and the kernels which read that, stock vLLM's
    norms, load it number by number.
    """
    of = forward_context.get_forward_context().no_compile_layers[MAPPING]
    return session_linear(x, w_IO, bias, a, b, scales, *of.ttt_args(x))


def _session_linear_fake(
    x: Tensor, w_IO: Tensor, bias: Tensor | None, a: Tensor, b: list[Tensor], scales: list[Tensor]
) -> Tensor:
    return x.new_empty(x.shape[0], w_IO.shape[1])


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

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """vLLM's: the layer's own product, and the adapters'."""
        if x.ndim != 2:  # vLLM's Transformers backend
            return super().apply(x, bias)  # type: ignore[misc]
        # A view is a plain tensor, compiled or not: vLLM's class of parameters has a __torch_function__ in Python, which each
        # call of an op with one goes through, and what torch.compile makes of ``.data`` is the parameter itself.
        w_IO = self.base_layer.weight.t()
        return torch.ops.vllm.ttt_session_linear(x, w_IO, bias, self.lora_a_stacked[0], *halves(self.lora_b_stacked))


def adopt(layer: Any) -> None:
    """Let a live LoRA layer compute its deltas beside its product, where that is vLLM's plain one. Call before the model is
    traced, and after all slots have one A."""
    check()
    if overlaps(layer):
        layer.__class__ = type(f"Beside{type(layer).__name__}", (Beside, type(layer)), {})


def check() -> None:
    """Raises PatchContractError where vLLM's method is not the one that `Beside` stands for."""
    _contract.check(BaseLinearLayerWithLoRA, "apply", "self x bias")
    _contract.check(forward_context, "get_forward_context", "")


def overlaps(layer: Any) -> bool:
    """Whether the layer's product is a plain one, which can be computed here to the same bits."""
    return (
        type(layer).apply is BaseLinearLayerWithLoRA.apply
        and is_plain(layer)
        and not envs.VLLM_BATCH_INVARIANT
        and layer.base_layer.quant_method._gemm_impl is default_unquantized_gemm
    )
