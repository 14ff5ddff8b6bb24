"""Causal attention of chunks over their past and themselves, forward and backward: one interface, five implementations.

Every session brings C queries, the last C of its keys: query c of a session with P past tokens sees its keys 0 to P + c. Keys
and values of all sessions lie one after another ("packed"), so that their pasts may have any lengths.

Dimension suffixes, besides those of micro_step.py:
  H query heads   G heads of keys and values   E width of a head   U packed keys, the sum of P + C over the sessions
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import inspect
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate as running_sum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vllm_ttt.worker.clock import to_device


@dataclass
class Layout:
    """Where the keys of each session are.

    ``lengths``: tokens in the past of each of the S sessions; ``rows``: C. ``order_U`` [U] int64: which of (rows of the past,
    own rows of all sessions), in this order, each packed key is; ``own_T`` [T] int64: which packed keys are the chunks' own.
    ``starts_q`` and ``starts_k`` [S + 1] int32: where the queries and the keys of each session begin.
    """

    lengths: Sequence[int]
    rows: int
    order_U: Tensor
    own_T: Tensor
    starts_q: Tensor
    starts_k: Tensor
    #: no session has more keys
    longest: int

    @classmethod
    def of(cls, lengths: Sequence[int], rows: int, room: int | None = None) -> Layout:
        """On the host. ``room``: rows that the past is filled up to, so that all layouts of one room have the same shapes; what
        is packed beyond the last session's keys is the past's first row, which nothing reads."""
        total = sum(lengths)
        longest = max(lengths) if room is None else room
        room = total if room is None else room
        starts = list(running_sum((length + rows for length in lengths), initial=0))
        with torch.inference_mode(False):  # autograd keeps these tensors
            order, own, past = [], [], 0
            for s, length in enumerate(lengths):
                order += [torch.arange(past, past + length), room + s * rows + torch.arange(rows)]
                own.append(starts[s] + length + torch.arange(rows))
                past += length
            return cls(
                lengths,
                rows,
                torch.cat((*order, torch.zeros(room - total, dtype=torch.int64))),
                torch.cat(own),
                torch.arange(len(lengths) + 1, dtype=torch.int32) * rows,
                torch.tensor(starts, dtype=torch.int32),
                longest + rows,
            )

    def tensors(self) -> tuple[Tensor, ...]:
        """What differs from step to step; `by` takes it back."""
        return self.order_U, self.own_T, self.starts_q, self.starts_k

    def by(self, order_U: Tensor, own_T: Tensor, starts_q: Tensor, starts_k: Tensor) -> Layout:
        """With those of another step, whose sessions have no more keys."""
        return replace(self, order_U=order_U, own_T=own_T, starts_q=starts_q, starts_k=starts_k)

    def to(self, device: torch.device) -> Layout:
        with torch.inference_mode(False):
            return self.by(*(to_device(x, device) for x in self.tensors()))


#: Queries [T, H, E], keys and values [T, G, E] of the chunks.
Own = tuple[Tensor, Tensor, Tensor]
#: Keys and values [sum of the past's lengths, G, E], session after session; constants.
Before = tuple[Tensor, Tensor]


class Attention(ABC):
    """One implementation. Subclasses say how packed queries meet packed keys, in a way that autograd can follow."""

    name: str
    #: whether it reads the lengths of the pasts on the device alone, so that a CUDA graph can follow them
    static = False

    def forward(self, own: Own, past: Before, layout: Layout, scale: float) -> tuple[Tensor, Any]:
        """Attention of all sessions, [T, H, E], and what `backward` takes of it.

        Args:
            scale: of the products of queries and keys.
        """
        k_UGE, v_UGE = _packed(own, past, layout)
        return self.attend(own[0], k_UGE, v_UGE, layout, scale)

    def backward(self, own: Own, past: Before, layout: Layout, scale: float, d_THE: Tensor, saved: Any) -> Own:
        """Gradients with respect to ``own``. The keys are packed once more: all layers' would be most of a step's memory.

        Args:
            d_THE: with respect to what `forward` gives. saved: what it gives beside that.
        """
        k_UGE, v_UGE = _packed(own, past, layout)
        dq, dk, dv = self.gradient(own[0], k_UGE, v_UGE, layout, scale, d_THE, saved)
        if _alone(past):
            return dq, dk, dv
        at = layout.own_T
        return dq, dk.index_select(0, at), dv.index_select(0, at)

    @abstractmethod
    def attend(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Any]:
        """[T, H, E], the sum of the values that each query sees, in the inputs' dtype; and what `gradient` takes of it."""

    @abstractmethod
    def gradient(
        self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float, d_THE: Tensor, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """With respect to the first three arguments."""


def _alone(past: Before) -> bool:
    """Whether the chunks have no past, so that their own keys are all that is packed, as they stand."""
    return past[0].shape[0] == 0


def _packed(own: Own, past: Before, layout: Layout) -> Before:
    """Keys and values [U, G, E]."""
    if _alone(past):
        return own[1], own[2]
    k, v = (torch.cat(both).index_select(0, layout.order_U) for both in zip(past, own[1:], strict=True))
    return k, v


class AutogradAttention(Attention):
    """One whose backward attends once more, and is torch's."""

    @abstractmethod
    def output(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> Tensor:
        """As `attend`, in a way that autograd can follow."""

    def attend(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Any]:
        return self.output(q_THE, k_UGE, v_UGE, layout, scale), None

    def gradient(
        self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float, d_THE: Tensor, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        # The worker's hooks run in inference mode, whose tensors cannot take part in autograd: copies made outside can.
        with torch.inference_mode(False):
            q, k, v = (x.clone().requires_grad_() for x in (q_THE, k_UGE, v_UGE))
            with torch.enable_grad():
                out = self.output(q, k, v, layout, scale)
                return torch.autograd.grad(out, (q, k, v), d_THE.clone())  # type: ignore[return-value]


class SDPAAttention(AutogradAttention):
    """torch's scaled_dot_product_attention, session by session: the reference, and what runs on a CPU."""

    name = "sdpa"

    def output(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> Tensor:
        C, groups = layout.rows, q_THE.shape[1] // k_UGE.shape[1]
        sizes = [p + C for p in layout.lengths]
        out = []
        keys, values = (x[: sum(sizes)].split(sizes) for x in (k_UGE, v_UGE))
        for q, k, v, past in zip(q_THE.split(C), keys, values, layout.lengths, strict=True):
            seen = torch.ones(C, past + C, dtype=torch.bool, device=q.device).tril(past) if past else None
            k_HUE, v_HUE = (x.transpose(0, 1).repeat_interleave(groups, 0)[None] for x in (k, v))
            found = scaled_dot_product_attention(q.transpose(0, 1)[None], k_HUE, v_HUE, seen, is_causal=not past, scale=scale)
            out.append(found[0].transpose(0, 1))
        return torch.cat(out)


class VarlenAttention(Attention):
    """Flash Attention over all sessions in one kernel, as torch.nn.attention.varlen calls it; CUDA, bf16 or fp16. Its ops take
    fewer heads of keys than of queries as they are, and a scale, which that interface does not in every release."""

    name = "varlen"
    static = True
    #: arguments of torch's ops, which are its own affair: in their order, before those by name
    FORWARD = "query key value cum_seq_q cum_seq_k max_q max_k dropout_p is_causal return_debug_mask"
    BACKWARD = "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal rng_state unused"

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether it can run there, with this torch."""
        taken = _arguments(torch.ops.aten._flash_attention_forward, torch.ops.aten._flash_attention_backward)
        if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or taken != [cls.FORWARD, cls.BACKWARD]:
            return False
        return torch.cuda.get_device_capability(device) >= (8, 0)

    def attend(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Any]:
        of = layout.starts_q, layout.starts_k, layout.rows, layout.longest
        found = torch.ops.aten._flash_attention_forward(q_THE, k_UGE, v_UGE, *of, 0.0, True, False, scale=scale)
        return found[0], found[:4]

    def gradient(
        self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float, d_THE: Tensor, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        out, weights, *state = saved
        of = layout.starts_q, layout.starts_k, layout.rows, layout.longest
        given = d_THE, q_THE, k_UGE, v_UGE, out, weights, *of, 0.0, True, *state
        return torch.ops.aten._flash_attention_backward(*given, scale=scale)


def _arguments(*ops: Any) -> list[str]:
    """Of each op of torch's, those in their order, before those by name."""
    return [" ".join(x.name for x in op.default._schema.arguments if not x.kwarg_only) for op in ops]


class ServedAttention(VarlenAttention):
    """Its forward is that which vLLM serves with on Hopper, FlashAttention 3, which has no backward there."""

    name = "served"
    #: arguments of vLLM's function, in their order, and by name
    FIRST = "q k v max_seqlen_q cu_seqlens_q max_seqlen_k cu_seqlens_k "
    OPTIONS = ("softmax_scale", "causal", "return_softmax_lse", "fa_version")

    def attend(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Any]:
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        of = layout.rows, layout.starts_q, layout.longest, layout.starts_k
        options: dict[str, Any] = dict(zip(self.OPTIONS, (scale, True, True, 3), strict=True))
        out, weights = flash_attn_varlen_func(q_THE, k_UGE, v_UGE, *of, **options)
        # What the backward would draw its dropout from: there is none.
        return out, (out, weights, torch.empty(2, dtype=torch.uint64, device=out.device), out.new_empty(0))

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        if not super().runs(device, dtype) or torch.cuda.get_device_capability(device)[0] != 9:
            return False
        if importlib.util.find_spec("vllm") is None:
            return False
        from vllm.vllm_flash_attn import flash_attn_interface as vllms

        taken = inspect.signature(vllms.flash_attn_varlen_func).parameters
        return vllms.is_fa_version_supported(3) and " ".join(taken).startswith(cls.FIRST) and set(cls.OPTIONS) <= set(taken)


class CudnnAttention(ServedAttention):
    """Where no chunk has a past, and all have as many rows, cuDNN's: its backward is made for Hopper, and takes fewer heads of
    keys than of queries as they are. Else that which it is derived from."""

    name = "cudnn"
    #: arguments of torch's ops, as above
    DENSE = "query key value attn_bias compute_log_sumexp dropout_p is_causal return_debug_mask"
    DENSE_BACKWARD = (
        "grad_out query key value out logsumexp philox_seed philox_offset attn_bias cum_seq_q cum_seq_k max_q max_k dropout_p "
        "is_causal"
    )
    #: heads of other widths than those tried at start go the other way
    WIDTHS = (64, 128)
    #: rows, heads and heads of keys of that trial; by how much both ways may differ, relative: what bfloat16 rounds away
    TRIED, OFF = (64, 4, 2), 0.02

    @classmethod
    def takes(cls, q_THE: Tensor, layout: Layout) -> bool:
        return layout.longest == layout.rows and q_THE.shape[2] in cls.WIDTHS

    def attend(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Any]:
        if not self.takes(q_THE, layout):
            return super().attend(q_THE, k_UGE, v_UGE, layout, scale)
        given = (_dense(x, layout) for x in (q_THE, k_UGE, v_UGE))
        found = torch.ops.aten._scaled_dot_product_cudnn_attention(*given, None, True, 0.0, True, False, scale=scale)
        return _flat(found[0]), found

    def gradient(
        self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float, d_THE: Tensor, saved: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        if not self.takes(q_THE, layout):
            return super().gradient(q_THE, k_UGE, v_UGE, layout, scale, d_THE, saved)
        out, weights, first_q, first_k, most_q, most_k, *state, _ = saved
        given = (*(_dense(x, layout) for x in (d_THE, q_THE, k_UGE, v_UGE)), out, weights, *state, None, first_q, first_k)
        backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        dq, dk, dv = backward(*given, most_q, most_k, 0.0, True, scale=scale)
        return _flat(dq), _flat(dk), _flat(dv)

    @classmethod
    def runs(cls, device: torch.device, dtype: torch.dtype) -> bool:
        ops = torch.ops.aten._scaled_dot_product_cudnn_attention, torch.ops.aten._scaled_dot_product_cudnn_attention_backward
        taken = _arguments(*ops)
        return super().runs(device, dtype) and taken == [cls.DENSE, cls.DENSE_BACKWARD] and _cudnn_agrees(device, dtype)


@functools.cache
def _cudnn_agrees(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether outputs and gradients of two random chunks are those of the other way: cuDNN alone knows what it has kernels
    for."""
    rows, heads, kv_heads = CudnnAttention.TRIED
    generator, layout = torch.Generator().manual_seed(0), Layout.of([0, 0], rows).to(device)
    for width in CudnnAttention.WIDTHS:
        draw = lambda n, width=width: torch.randn(2 * rows, n, width, generator=generator).to(device, dtype)  # noqa: E731
        own, d = (draw(heads), draw(kv_heads), draw(kv_heads)), draw(heads)
        given, found = (own, (own[1][:0], own[2][:0]), layout, width**-0.5), list[Tensor]()
        for kernel in (CudnnAttention(), ServedAttention()):
            try:
                out, saved = kernel.forward(*given)
                back = kernel.backward(*given, d, saved)
            except RuntimeError:
                return False
            found.append(torch.cat([x.float().flatten() for x in (out, *back)]))
        one, other = found
        if not ((one - other).norm() / other.norm()).item() < CudnnAttention.OFF:
            return False
    return True


def _dense(x_THE: Tensor, layout: Layout) -> Tensor:
    """[S, H, C, E], a view."""
    return x_THE.unflatten(0, (-1, layout.rows)).transpose(1, 2)


def _flat(x_SHCE: Tensor) -> Tensor:
    """[T, H, E], of what lies in memory as such."""
    return x_SHCE.transpose(1, 2).flatten(0, 1)


class XformersAttention(AutogradAttention):
    """xformers' memory-efficient attention with a block-diagonal mask; CUDA. Needs the extra `xformers`."""

    name = "xformers"

    def output(self, q_THE: Tensor, k_UGE: Tensor, v_UGE: Tensor, layout: Layout, scale: float) -> Tensor:
        load_cuda_runtime()
        from xformers.ops import fmha  # pyright: ignore[reportMissingImports]

        S, (T, H, E), G = len(layout.lengths), q_THE.shape, k_UGE.shape[1]
        mask = fmha.attn_bias.BlockDiagonalCausalFromBottomRightMask.from_seqlens(
            [layout.rows] * S, [p + layout.rows for p in layout.lengths], device=q_THE.device
        )
        # Its backward takes no groups of heads: each key is shown to its H / G queries as one of their own.
        k, v = (x.repeat_interleave(H // G, 1)[None] for x in (k_UGE, v_UGE))
        return fmha.memory_efficient_attention(q_THE[None], k, v, attn_bias=mask, scale=scale).view(T, H, E)


@functools.cache
def load_cuda_runtime() -> None:
    """xformers' wheel is built for CUDA 12, also beside a torch for CUDA 13: it has its kernels only where that runtime is
    loaded before it is imported. The extra `xformers` brings the runtime."""
    spec = importlib.util.find_spec("nvidia.cuda_runtime") if importlib.util.find_spec("nvidia") is not None else None
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for library in Path(folder).glob("lib/libcudart.so.12"):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


#: Those that say whether they run; the order is that of preference, as it is below.
FAST = CudnnAttention, ServedAttention, VarlenAttention
#: By name.
IMPLEMENTATIONS: dict[str, type[Attention]] = {x.name: x for x in (*FAST, XformersAttention, SDPAAttention)}


def choose(device: torch.device, dtype: torch.dtype) -> Attention:
    """The fastest implementation that can run: Flash Attention on CUDA in bf16 or fp16, else the reference."""
    found = next((kernel() for kernel in FAST if kernel.runs(device, dtype)), None)
    if found is None and device.type == "cuda" and dtype != torch.float32:
        from vllm_ttt.log import logger_of  # it needs vLLM

        logger_of(__name__).warning(
            "vllm-ttt: torch's ops of Flash Attention are others in this release; the step will be slow"
        )
    return found or SDPAAttention()


def available(device: torch.device, dtype: torch.dtype) -> list[Attention]:
    """Every implementation that can run there."""
    found: list[Attention] = [kernel() for kernel in reversed(FAST) if kernel.runs(device, dtype)]
    if found and importlib.util.find_spec("xformers") is not None:
        found.append(XformersAttention())
    return [SDPAAttention(), *found]
