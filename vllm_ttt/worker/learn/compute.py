"""The device's side of a step: reads pages and masters by index, writes gradients and masters by index, waits for nothing.

On CUDA the shapes that occur most are replayed from graphs: a step is some hundred small kernels, and launching them would
take the host longer than running them takes the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.past import PastSource
from vllm_ttt.worker.clock import to_device
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.micro_step import Tail, accumulate
from vllm_ttt.worker.step.qkv import Past
from vllm_ttt.worker.step.update import picked, update


class Bench:
    """Memory of their own for steps on CUDA, and the stream to which it belongs: what one is done with, the next one takes."""

    def __init__(self) -> None:
        self.pool, self.stream = torch.cuda.MemPool(), torch.cuda.Stream()

    @contextmanager
    def at(self) -> Iterator[None]:
        """What is allocated inside is the bench's. The stream outside waits, then goes on."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream), torch.cuda.use_mem_pool(self.pool):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)


class Packed:
    """Tensors of fixed shapes and dtypes one after the other in one buffer, so that one copy takes all of them."""

    #: bytes: each begins at a multiple of it
    ALIGNED = 16

    def __init__(self, like: tuple[Tensor, ...]):
        self.like = [(x.shape, x.dtype, x.numel() * x.element_size()) for x in like]
        self.starts = list(itertools.accumulate((-(-n // self.ALIGNED) * self.ALIGNED for *_, n in self.like), initial=0))

    def empty(self, **where: Any) -> Tensor:
        """A buffer; ``where``: as torch.empty has it."""
        return torch.empty(self.starts[-1], dtype=torch.uint8, **where)

    def views(self, buffer: Tensor) -> tuple[Tensor, ...]:
        each = zip(self.like, self.starts[:-1], strict=True)
        return tuple(buffer[first : first + n].view(dtype).view(shape) for (shape, dtype, n), first in each)


@dataclass
class Graph:
    """A captured function of static inputs, which lie in ``buffer``."""

    graph: torch.cuda.CUDAGraph
    packed: Packed
    buffer: Tensor
    output: Tensor

    def __call__(self, *values: Tensor) -> Tensor:
        """Copy the host tensors ``values`` into the inputs and replay; the output is overwritten by the next call."""
        host = self.packed.empty(pin_memory=True)
        for place, value in zip(self.packed.views(host), values, strict=True):
            place.copy_(value)
        self.buffer.copy_(host, non_blocking=True)
        self.graph.replay()
        return self.output


#: Sessions, rows of each, and rows of the past of all of them together.
Shape = tuple[int, int, int]

#: Rows of the past of each session, on average, for which a step is captured, as far as a step may have so many: what is not
#: filled is read all the same. The first chunk of a prompt, often the only one, has no past.
ROOMS = (0, 1024, 4096)


class Compute:
    """Arguments are host tensors. ``flat`` [S, C] are row numbers in the flattened pages, ``weight`` [S, C] the weights of
    their losses, ``rows`` [S] rows of the masters, ``source`` what comes before those rows; None where the step needs none.
    """

    def __init__(self, tail: Tail | Head, learn: LearnConfig, backlog: Backlog, deltas: Deltas, pasts: int = 2**31):
        """``pasts``: how many tokens the chunks of a step may have before them, together."""
        self.pasts = pasts
        self.tail, self.learn, self.backlog, self.deltas = tail, learn, backlog, deltas
        self.device = tail.head_VD.device
        self.max_loss = learn.max_loss * math.log(tail.vocabulary)
        #: of each row of the last step what `accumulate` says, where ``keep_rows``; overwritten by the next one
        self.keep_rows = False
        self.rows_2SC: Tensor | None = None
        #: the same, of each graph
        self.graph_rows: dict[Shape, Tensor | None] = {}
        #: where graphs, and steps of other shapes, which are launched, do their work, one after the other
        self.bench = Bench() if self.device.type == "cuda" else None
        self.step_graphs: dict[Shape, Graph] = {}
        self.base_graphs: dict[Shape, Graph] = {}

    def step(self, flat: Tensor, weight: Tensor, rows: Tensor, share: Tensor, source: PastSource | None = None) -> Tensor:
        """Learn a chunk of each session. ``share`` [S]: rows of the chunk / rows of a full one.

        Returns:
            [3 + modules, S]: whether it was applied, the chunk's loss, the rate from now on, norms of B relative to W by
            adapted module; on the device, overwritten by the next call.
        """
        S, shape = len(rows), _fitting(self.step_graphs, flat, source)
        if shape is None:
            return self._launch(self._step, source, flat, weight, rows, share)
        more = shape[0] - S
        rows = torch.cat((rows, rows.new_full((more,), self.deltas.spare)))
        share = torch.cat((share, share.new_zeros(more)))
        values = self.step_graphs[shape](*_pad(shape, flat, weight), rows, share, *_static(source, shape))
        self.rows_2SC = self.graph_rows.get(shape, self.rows_2SC)
        return values[:, :S]

    def base_loss(self, flat: Tensor, weight: Tensor, source: PastSource | None = None) -> Tensor:
        """Losses [S] of some rows under the base model, after what comes before them as it was served; on the device,
        overwritten by the next call."""
        S, shape = len(flat), _fitting(self.base_graphs, flat, source)
        if shape is None:
            return self._launch(self._base_loss, source, flat, weight)
        return self.base_graphs[shape](*_pad(shape, flat, weight), *_static(source, shape))[:S]

    def warm_up(
        self,
        shapes: list[tuple[int, int]],
        timed: Callable[[Callable[[], None]], float],
        source: PastSource | None = None,
    ) -> list[float]:
        """Run each shape [S, C] on the spare row, on CUDA capture it; returns seconds per shape.

        Args:
            source: of no chunk; None where the step needs none.
        """
        times = []
        for S, C in shapes:
            flat, weight = torch.zeros(S, C, dtype=torch.int64), torch.full((S, C), 1.0 / C)
            rows, share = torch.full((S,), self.deltas.spare), torch.ones(S)
            if self.bench is not None and source is None:
                self._capture_shape((S, C, 0), (flat, weight, rows, share), None)
            elif self.bench is not None and self.tail.kernel.static:
                for room in sorted({min(S * room, self.pasts) for room in ROOMS}):
                    self._capture_shape((S, C, room), (flat, weight, rows, share), source)

            def once(args: Any = (flat, weight, rows, share, source)) -> None:
                self.step(*args)

            times.append(timed(once))
        for x in self.deltas.masters.tensors():
            x[self.deltas.spare].zero_()
        return times

    def _launch(self, function: Callable[..., Tensor], source: PastSource | None, flat: Tensor, *values: Tensor) -> Tensor:
        """What ``function`` returns, without a graph."""
        past = None if source is None else source.past(*flat.shape).to(self.device)
        inputs = [to_device(x, self.device) for x in (flat, *values)]
        if self.bench is None:
            return function(past, *inputs)
        with self.bench.at():
            found = function(past, *inputs)
        return found.clone()  # off the bench, which the next graph overwrites

    def _capture_shape(self, shape: Shape, values: tuple[Tensor, ...], source: PastSource | None) -> None:
        S, C, room = shape
        for graphs, function, count in ((self.step_graphs, self._step, 4), (self.base_graphs, self._base_loss, 2)):
            past = None if source is None else source.past(S, C, room)
            graphs[shape] = self._capture(function, values[:count], past)
            if graphs is self.step_graphs:
                self.graph_rows[shape] = self.rows_2SC

    def _step(self, past: Past | None, flat: Tensor, weight: Tensor, rows: Tensor, share: Tensor) -> Tensor:
        masters, grad = self.deltas.masters, self.tail.zeros(len(rows))
        served = picked(masters.delta, rows, self.tail.head_VD.dtype)
        self.rows_2SC = weight.new_empty(2, *weight.shape) if self.keep_rows else None
        loss_S = accumulate(self.tail, served, *self._gather(flat), weight, grad, past, self.rows_2SC)
        given = self.tail.norms, masters, rows, grad, loss_S, share, self.learn, self.max_loss, self.tail.ranks
        ok_S, rate_S, norm_MS = update(*given)
        return torch.cat((torch.stack((ok_S.float(), loss_S, rate_S)), norm_MS))

    def _base_loss(self, past: Past | None, flat: Tensor, weight: Tensor) -> Tensor:
        nothing = self.tail.zeros(len(flat), self.tail.head_VD.dtype)
        return accumulate(self.tail, nothing, *self._gather(flat), weight, None, past)

    def _gather(self, flat_SC: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        pages, flat = self.backlog, flat_SC.flatten()
        pick = lambda x: x.flatten(0, 1).index_select(0, flat).view(*flat_SC.shape, *x.shape[2:])  # noqa: E731
        return *self.tail.entering(pick(pages.h_PCD), pick(pages.a_PCQ), pick(pages.x_PC)), pick(pages.t_PC)

    def _capture(self, function: Callable[..., Tensor], values: tuple[Tensor, ...], past: Past | None) -> Graph:
        """A graph of ``function``, whose inputs are ``values`` and the tensors of ``past``."""
        given = (*values, *(() if past is None else past.tensors()))
        packed = Packed(given)
        with torch.inference_mode(False):  # autograd keeps some of them
            buffer = packed.empty(device=self.device)
            inputs = packed.views(buffer)
            for place, value in zip(inputs, given, strict=True):
                place.copy_(value)
        static = None if past is None else past.by(*inputs[len(values) :])
        run = lambda: function(static, *inputs[: len(values)])  # noqa: E731
        assert self.bench is not None
        with self.bench.at():  # load every kernel before the capture
            for _ in range(2):
                run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.bench.pool.id, stream=self.bench.stream):  # type: ignore[arg-type]
            output = run()
        return Graph(graph, packed, buffer, output)


def _fitting(graphs: Iterable[Shape], flat: Tensor, source: PastSource | None) -> Shape | None:
    """The smallest shape that has a graph and room for these rows."""
    (S, C), rows = flat.shape, 0 if source is None else source.rows
    return min((s for s in graphs if s[0] >= S and s[1] >= C and s[2] >= rows), default=None)


def _static(source: PastSource | None, shape: Shape) -> tuple[Tensor, ...]:
    """The inputs of a graph that say what comes before."""
    return () if source is None else source.past(*shape).tensors()


def _pad(shape: Shape, flat: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Widen to ``shape``: rows of weight 0, each a copy of its own session's first one, and sessions that copy the first."""
    (S, C, _), (s, c) = shape, flat.shape
    wide = flat[:, :1].expand(s, C).contiguous()
    wide[:, :c] = flat
    return torch.cat((wide, wide[:1].expand(S - s, C))), torch.nn.functional.pad(weight, (0, C - c, 0, S - s))
