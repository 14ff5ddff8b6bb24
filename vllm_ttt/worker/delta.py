"""What a session owns: the B of each adapted module, the last update U of each, and its rate.

Modules of one shape are one tensor, so that a step of the optimiser is a few large kernels, however many layers are adapted.

Dimension suffixes:
  S sessions   M modules as wide as the residual stream (o, d, y)   N modules of the feed-forward (g, u)
  D hidden size   F intermediate size   R rank
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

#: The modules that can be adapted, in the order in which a layer applies them. gate and up are one tensor of vLLM's. "y" is the
#: last hidden state, which has a delta where no layer has one.
MODULES = "ogudy"
#: Those whose B is [D, R], and those whose B is [F, R].
THIN, WIDE = "ody", "gu"


class LayerDelta(NamedTuple):
    """Views of one layer: o [S, D, R], gu [S, 2F, R] (gate first), d and y [S, D, R]; None: that module is not adapted."""

    o: Tensor | None
    gu: Tensor | None
    d: Tensor | None
    y: Tensor | None = None


class Delta:
    """One matrix [out, R] for each session and adapted module: B, a gradient, or an update.

    ``thin`` [S, M, D, R] and ``wide`` [S, N, F, R]: layer by layer from the lowest, in the order of MODULES; M or N may be 0.
    """

    __slots__ = ("modules", "thin", "wide")

    def __init__(self, modules: str, thin: Tensor, wide: Tensor):
        """``modules``: the adapted ones, a part of MODULES in its order."""
        self.modules, self.thin, self.wide = modules, thin, wide

    @classmethod
    def zeros(
        cls, modules: str, layers: int, sessions: int, hidden: int, intermediate: int, rank: int,
        dtype: torch.dtype = torch.float32, device: torch.device | None = None,
    ) -> Delta:  # fmt: skip
        thin, wide = (layers * len(set(modules) & set(kind)) for kind in (THIN, WIDE))
        return cls(
            modules,
            torch.zeros(sessions, thin, hidden, rank, dtype=dtype, device=device),
            torch.zeros(sessions, wide, intermediate, rank, dtype=dtype, device=device),
        )

    @classmethod
    def of(cls, like: Delta, matrices: Sequence[Tensor]) -> Delta:
        """Of one session, from what `matrices` gives, on the host, in the dtype of the first; of the modules of ``like``."""
        dtype = matrices[0].dtype
        delta = like.by(*(torch.zeros(1, *x.shape[1:], dtype=dtype) for x in like.tensors()))
        for own, given in zip(delta.matrices(), matrices, strict=True):
            own.copy_(given)
        return delta

    def tensors(self) -> tuple[Tensor, Tensor]:
        return self.thin, self.wide

    def by(self, thin: Tensor, wide: Tensor) -> Delta:
        """Another of the same modules."""
        return Delta(self.modules, thin, wide)

    def to(self, dtype: torch.dtype) -> Delta:
        return self.by(*(x.to(dtype) for x in self.tensors()))

    @property
    def layers(self) -> int:
        kind, matrices = (THIN, self.thin) if self.thin.shape[1] else (WIDE, self.wide)
        return matrices.shape[1] // len(set(self.modules) & set(kind))

    def layer(self, i: int) -> LayerDelta:
        """Of one layer, counted from the lowest."""
        if self.modules == "y":
            return LayerDelta(None, None, None, self.thin[:, i])
        count = len(set(self.modules) & set(THIN))
        thin = self.thin[:, i * count : (i + 1) * count]
        gu = self.wide[:, 2 * i : 2 * i + 2].flatten(1, 2) if "g" in self.modules else None
        return LayerDelta(thin[:, 0] if "o" in self.modules else None, gu, thin[:, count - 1] if "d" in self.modules else None)

    def parts(self) -> Iterator[tuple[str, Tensor]]:
        """(module, [S, out, R] view), layer by layer, in the order of MODULES."""
        for i in range(self.layers):
            layer = self.layer(i)
            if layer.o is not None:
                yield "o", layer.o
            if layer.gu is not None:
                yield "g", self.wide[:, 2 * i]
                yield "u", self.wide[:, 2 * i + 1]
            if layer.d is not None:
                yield "d", layer.d
            if layer.y is not None:
                yield "y", layer.y

    def matrices(self) -> Iterator[Tensor]:
        """[out, R] views of the first session, as `Geometry.shapes` names them: gate and up are one."""
        for i in range(self.layers):
            yield from (x[0] for x in self.layer(i) if x is not None)


class State:
    """All that a step reads and writes of some sessions.

    ``delta``: B, float32. ``last``: the last update, bfloat16; zero where there was none, or it was lost. ``rate_S``: float32.
    """

    __slots__ = ("delta", "last", "rate_S")

    def __init__(self, delta: Delta, last: Delta, rate_S: Tensor):
        self.delta, self.last, self.rate_S = delta, last, rate_S

    def tensors(self) -> tuple[Tensor, ...]:
        return *self.delta.tensors(), *self.last.tensors(), self.rate_S

    def by(self, *tensors: Tensor) -> State:
        """Another of the same modules."""
        return State(self.delta.by(*tensors[:2]), self.last.by(*tensors[2:4]), tensors[4])

    def row(self, i: int) -> State:
        """A view of one session."""
        return self.by(*(x[i : i + 1] for x in self.tensors()))

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.tensors())
