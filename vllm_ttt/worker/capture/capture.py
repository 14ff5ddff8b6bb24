"""Keep what the micro-step needs of each token of a batch: the residual stream and the attention output of the first adapted
layer. Where that is the model's first layer nothing is kept: the step begins at the embedding.

One custom op copies them into static buffers while the model runs. It is opaque to torch.compile and sits inside CUDA graphs
like any other kernel; a flag on the host makes it return at once in batches that have no session.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.utils.torch_utils import direct_register_custom_op

from vllm_ttt.worker.step.tail import TailModules


def _capture(x: Tensor, buffer: Tensor, idle: Tensor) -> None:
    if not idle.item():  # on the host: no device sync
        buffer[: x.shape[0]].copy_(x)


def _capture_fake(x: Tensor, buffer: Tensor, idle: Tensor) -> None:
    return


direct_register_custom_op(op_name="ttt_capture", op_func=_capture, mutates_args=["buffer"], fake_impl=_capture_fake)


class CapturingNorm(RMSNorm):
    """The norm after attention: its ``residual`` argument is the stream that enters the layer."""

    ttt_buffer: Tensor
    ttt_idle: Tensor

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        assert residual is not None
        # Inductor computes the residual stream anew in each kernel that reads it, without rounding in between. An op that reads
        # the stream itself would make it a rounded buffer, and every base request would get other bits; a copy does not.
        stream = residual.float() if torch.compiler.is_compiling() else residual
        torch.ops.vllm.ttt_capture(stream, self.ttt_buffer, self.ttt_idle)
        return super().forward(x, residual)


class CapturingOutputProjection(RowParallelLinearWithLoRA):
    """o_proj: its input is the attention output."""

    ttt_buffer: Tensor
    ttt_idle: Tensor

    def apply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        torch.ops.vllm.ttt_capture(x, self.ttt_buffer, self.ttt_idle)
        return super().apply(x, bias)


class CapturingPlainProjection(RowParallelLinear):
    """The same where o_proj is not adapted."""

    ttt_buffer: Tensor
    ttt_idle: Tensor

    def forward(self, input_: Tensor) -> Any:
        torch.ops.vllm.ttt_capture(input_, self.ttt_buffer, self.ttt_idle)
        return super().forward(input_)


class Capture:
    """The static buffers: ``h_ND`` and ``a_NQ``, N rows for as many tokens as a batch can have, in the model's dtype; without
    a width where every layer is adapted."""

    def __init__(self, modules: TailModules, max_tokens: int, dtype: torch.dtype, device: torch.device, idle: Tensor):
        """``idle``: bool, on the host; whether the batch that runs has no row of a session."""
        lowest = modules.layers[0]
        if modules.embedding is not None:
            self.h_ND = self.a_NQ = torch.zeros(max_tokens, 0, dtype=dtype, device=device)
            return
        self.h_ND = torch.zeros(max_tokens, lowest.norm.hidden_size, dtype=dtype, device=device)
        inputs = getattr(lowest.o_proj, "input_size_per_partition", lowest.o_proj.input_size)  # LoRA's are this rank's own
        self.a_NQ = torch.zeros(max_tokens, inputs, dtype=dtype, device=device)
        for module, cls, buffer in (
            (lowest.norm, CapturingNorm, self.h_ND),
            (lowest.o_proj, CapturingOutputProjection if "o" in modules.adapted else CapturingPlainProjection, self.a_NQ),
        ):
            module.__class__ = type(cls.__name__, (cls, type(module)), {})  # it may be one of ours (gpu_linear.py)
            module.ttt_buffer, module.ttt_idle = buffer, idle

    def ran(self, state: object) -> None:
        """The forward of a batch has been launched: it has filled the buffers."""

    def taken(self) -> None:
        """What is to be learned of the batch has been copied."""
