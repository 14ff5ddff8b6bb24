"""The device's side of a step: reads pages and masters by index, writes gradients and masters by index, waits for nothing.

On CUDA the shapes that occur most are replayed from graphs: a step is some hundred small kernels, and launching them would
take the host longer than running them takes the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.backlog import Backlog
from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.deltas import Deltas
from vllm_ttt.worker.micro_step import Delta, Tail, accumulate, update
from vllm_ttt.worker.past import Before
from vllm_ttt.worker.qkv import Past
from vllm_ttt.worker.scale import measured
from vllm_ttt.worker.scaled import scaled_losses, stacked_losses


@dataclass
class Graph:
    """A captured function of static inputs."""

    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    output: Tensor

    def __call__(self, *values: Tensor) -> Tensor:
        """Copy the host tensors ``values`` into the inputs and replay; the output is overwritten by the next call."""
        for static, value in zip(self.inputs, values, strict=True):
            static.copy_(value.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.output


#: Sessions, rows of each, and rows of the past of all of them together.
Shape = tuple[int, int, int]

#: Rows of the past of each session, on average, for which a step is captured: what is not filled is read all the same.
ROOMS = (1024, 4096)


class Compute:
    """Arguments are host tensors. ``flat`` [S, C] are row numbers in the flattened pages, ``weight`` [S, C] the weights of
    their losses, ``rows`` [S] rows of the masters, ``keep`` [S] bool: whether what the row holds belongs to this chunk,
    ``before`` what comes before those rows; None where the step needs none.
    """

    def __init__(self, tail: Tail, learn: LearnConfig, backlog: Backlog, deltas: Deltas):
        self.tail, self.learn, self.backlog, self.deltas = tail, learn, backlog, deltas
        self.device = tail.head_VD.device
        self.max_loss = learn.max_loss * math.log(tail.head_VD.shape[0])
        rows = deltas.masters.o.shape[0]
        # Sums over the tiles of the chunk that is being learned, by row of the masters.
        self.loss_R = torch.zeros(rows, device=self.device)
        #: the scales of `measure`
        self.scales_K = torch.tensor(measured(learn.scales), device=self.device)
        self.score_graphs: dict[Shape, Graph] = {}
        self.measure_graphs: dict[Shape, Graph] = {}
        self.apply_graphs: dict[int, Graph] = {}

    def score(self, flat: Tensor, weight: Tensor, rows: Tensor, keep: Tensor, before: Before | None = None) -> None:
        """Add the gradient and the loss of some rows to what their chunks have accumulated."""
        shape = _fitting(self.score_graphs, flat, before)
        if shape is None:
            past = None if before is None else before.past(*flat.shape).to(self.device)
            self._score(past, *(to_device(x, self.device) for x in (flat, weight, rows, keep)))
        else:
            padded = _pad(shape, flat, weight, rows, keep, self.deltas.spare)
            self.score_graphs[shape](*padded, *_static(before, shape))

    def measure(
        self, flat: Tensor, weight: Tensor, rows: Tensor, served: Delta | None = None, before: Before | None = None
    ) -> Tensor:
        """Losses of some rows under each of ``scales_K`` times the masters, or times ``served``, one session's B.

        Returns:
            [S, K] float32, on the device, overwritten by the next call.
        """
        (S, C), K = flat.shape, len(self.scales_K)
        shape = None if served is not None else _fitting(self.measure_graphs, flat, before)
        if shape is None:
            past = None if before is None else before.times(K).past(S * K, C).to(self.device)
            return self._measure(past, *(to_device(x, self.device) for x in (flat, weight, rows)), served=served)
        flat, weight, rows, _ = _pad(shape, flat, weight, rows, torch.zeros(S, dtype=torch.bool), self.deltas.spare)
        return self.measure_graphs[shape](flat, weight, rows, *_static(before, shape, K))[:S]

    def apply(self, rows: Tensor, share: Tensor) -> Tensor:
        """One step of the optimiser on each master. ``share`` [S]: rows of the chunk / rows of a full one.

        Returns:
            [2 + modules, S]: whether it was applied, the chunk's loss, norms of B relative to W; on the device, overwritten by
            the next call.
        """
        S = len(rows)
        size = next((s for s in sorted(self.apply_graphs) if s >= S), None)
        if size is None:
            return self._apply(None, to_device(rows, self.device), to_device(share, self.device))
        pad = size - S
        rows = torch.cat((rows, rows.new_full((pad,), self.deltas.spare)))
        return self.apply_graphs[size](rows, torch.cat((share, share.new_zeros(pad))))[:, :S]

    def warm_up(
        self,
        shapes: list[tuple[int, int]],
        timed: Callable[[Callable[[], None]], float],
        before: Before | None = None,
    ) -> list[float]:
        """Run each shape [S, C] on the spare row, on CUDA capture it; returns seconds per shape, commits included.

        Args:
            before: of no chunk; None where the step needs none.
        """
        times = []
        pool = torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None
        for S, C in shapes:
            flat, weight = torch.zeros(S, C, dtype=torch.int64), torch.full((S, C), 1.0 / C)
            rows, keep = torch.full((S,), self.deltas.spare), torch.zeros(S, dtype=torch.bool)
            share = torch.ones(S)
            if pool is not None and S not in self.apply_graphs:
                self.apply_graphs[S] = self._capture(self._apply, (rows, share), pool)
            if pool is not None and before is None:
                self._capture_shape((S, C, 0), (flat, weight, rows, keep), None, pool)
            elif pool is not None and self.tail.kernel.static:
                for room in ROOMS:
                    self._capture_shape((S, C, S * room), (flat, weight, rows, keep), before, pool)

            def once(args: Any = (flat, weight, rows, keep, before), rows: Tensor = rows, share: Tensor = share) -> None:
                self.score(*args)
                self.apply(rows, share)

            times.append(timed(once))
        for x in (*self.deltas.masters.tensors(), *self.deltas.grads.tensors()):
            x[self.deltas.spare].zero_()
        return times

    def _capture_shape(self, shape: Shape, values: tuple[Tensor, ...], before: Before | None, pool: Any) -> None:
        (S, C, room), K = shape, len(self.scales_K)
        past = None if before is None else before.past(S, C, room)
        self.score_graphs[shape] = self._capture(self._score, values, pool, past)
        if K > 1:
            past = None if before is None else before.past(S * K, C, room * K)
            self.measure_graphs[shape] = self._capture(self._measure, values[:3], pool, past)

    def _score(self, past: Past | None, flat: Tensor, weight: Tensor, rows: Tensor, keep: Tensor) -> Tensor:
        served = self.deltas.masters.select(rows).to(self.tail.head_VD.dtype)
        grad = Delta(*(torch.where(keep[:, None, None], x.index_select(0, rows), 0.0) for x in self.deltas.grads.tensors()))
        loss_S = accumulate(self.tail, served, *self._gather(flat), weight, grad, past)
        for x, part in zip(self.deltas.grads.tensors(), grad.tensors(), strict=True):
            x.index_copy_(0, rows, part)
        self._add(self.loss_R, rows, keep, loss_S)
        return loss_S

    def _measure(self, past: Past | None, flat: Tensor, weight: Tensor, rows: Tensor, served: Delta | None = None) -> Tensor:
        delta = (self.deltas.masters.select(rows) if served is None else served).to(self.tail.head_VD.dtype)
        given = self.tail, delta, self.scales_K, *self._gather(flat), weight
        return scaled_losses(*given) if past is None else stacked_losses(*given, past)

    def _apply(self, _: Past | None, rows: Tensor, share: Tensor) -> Tensor:
        masters, learn = self.deltas.masters, self.learn
        loss_S = self.loss_R.index_select(0, rows)
        new, ok_S, norm_MS = update(
            self.tail, masters.select(rows), self.deltas.grads.select(rows), loss_S, share,
            learn.rate, learn.decay, learn.max_norm, self.max_loss,
        )  # fmt: skip
        for x, part in zip(masters.tensors(), new.tensors(), strict=True):
            x.index_copy_(0, rows, part)
        return torch.cat((torch.stack((ok_S.float(), loss_S)), norm_MS))

    def _gather(self, flat_SC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pages, flat = self.backlog, flat_SC.flatten()
        pick = lambda x: x.flatten(0, 1).index_select(0, flat).view(*flat_SC.shape, *x.shape[2:])  # noqa: E731
        return pick(pages.h_PCD), pick(pages.a_PCQ), pick(pages.t_PC)

    @staticmethod
    def _add(sum_R: Tensor, rows: Tensor, keep: Tensor, loss_S: Tensor) -> None:
        sum_R.index_copy_(0, rows, torch.where(keep, sum_R.index_select(0, rows), 0.0) + loss_S)

    def _capture(
        self, function: Callable[..., Tensor], values: tuple[Tensor, ...], pool: Any, past: Past | None = None
    ) -> Graph:
        """A graph of ``function``, whose inputs are ``values`` and the tensors of ``past``."""
        with torch.inference_mode(False):  # autograd keeps some of them
            inputs = tuple(x.to(self.device) for x in (*values, *(() if past is None else past.tensors())))
        static = None if past is None else past.by(*inputs[len(values) :])
        run = lambda: function(static, *inputs[: len(values)])  # noqa: E731
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # load every kernel before the capture
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            output = run()
        return Graph(graph, inputs, output)


def _fitting(graphs: Iterable[Shape], flat: Tensor, before: Before | None) -> Shape | None:
    """The smallest shape that has a graph and room for these rows."""
    (S, C), rows = flat.shape, 0 if before is None else before.rows
    return min((s for s in graphs if s[0] >= S and s[1] >= C and s[2] >= rows), default=None)


def _static(before: Before | None, shape: Shape, copies: int = 1) -> tuple[Tensor, ...]:
    """The inputs of a graph that say what comes before."""
    S, C, room = shape
    return () if before is None else before.times(copies).past(S * copies, C, room * copies).tensors()


def _pad(shape: Shape, flat: Tensor, weight: Tensor, rows: Tensor, keep: Tensor, spare: int) -> tuple[Tensor, ...]:
    """Widen to ``shape``: more rows of weight 0, each a copy of its own session's first one; more sessions, the spare row's."""
    (S, C, _), (s, c) = shape, flat.shape
    wide = flat[:, :1].expand(s, C).contiguous()
    wide[:, :c] = flat
    more = S - s
    return (
        torch.cat((wide, wide[:1].expand(more, C))),
        torch.nn.functional.pad(weight, (0, C - c, 0, more)),
        torch.cat((rows, rows.new_full((more,), spare))),
        torch.cat((keep, keep.new_zeros(more))),
    )
