"""B as a slot of vLLM on CUDA has it: in 8 bits, with a scale for each row. In plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

#: The largest number of a row becomes this one.
LARGEST = 127


def codes(b: Tensor) -> tuple[Tensor, Tensor]:
    """[..., out, R] as int8 of that shape and float32 scales [..., out]; a row of zeros has scale 0."""
    b = b.float()
    most = b.abs().amax(-1)
    inverse = torch.where(most > 0, LARGEST / most, 0)
    return (b * inverse[..., None] + 0.5).floor().to(torch.int8), most / LARGEST


def rounded(b: Tensor) -> Tensor:
    """``b`` as its codes and scales have it."""
    b8, scale = codes(b)
    return (b8 * scale[..., None]).to(b.dtype)
