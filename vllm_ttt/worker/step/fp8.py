"""Products of the step with frozen weights in FP8 (`learn.fp8`): both sides in E4M3, each with a scale for each row.

A product sums over what lies next to each other in both of its sides, so that the way forward and the way back need forms of
their own of a weight: W with a scale for each output, and its transpose with a scale for each input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vllm_ttt.errors import ConfigError
from vllm_ttt.worker.step import pointwise

#: Both widths of a weight are multiples of it (torch._scaled_mm, on CUDA).
MULTIPLE = 16
#: Rows of a weight that are rounded at once.
ROWS = 1024
#: Random inputs that a product is tried with, and by how much it may differ from that in the step's dtype: E4M3 has three bits
#: after the point, so that each side is off by 2.6 % and the product by 3.7 %.
TRIED, OFF = 8, 0.1


class Product:
    """x M^T, [T, N] of [T, K], in x's dtype; ``m_NK`` is a weight, or the transpose of one."""

    def __init__(self, m_NK: Tensor):
        self.m8_NK = torch.empty(m_NK.shape, dtype=torch.float8_e4m3fn, device=m_NK.device)
        self.scale_1N = torch.empty(1, m_NK.shape[0], device=m_NK.device)
        for rows, m8, scale in zip(m_NK.split(ROWS), self.m8_NK.split(ROWS), self.scale_1N.split(ROWS, 1), strict=True):
            found, scales = pointwise.scaled(rows)
            m8.copy_(found)
            scale.copy_(scales.T)

    def __call__(self, x_TK: Tensor) -> Tensor:
        x8_TK, scale_T1 = pointwise.scaled(x_TK)
        # Sums in fewer bits than float32 take half as long on Hopper, and are off by less than what E4M3 rounds away.
        sides, fast = (x8_TK, self.m8_NK.T, scale_T1, self.scale_1N), x_TK.is_cuda
        return torch._scaled_mm(*sides, out_dtype=x_TK.dtype, use_fast_accum=fast)  # pyright: ignore[reportPrivateImportUsage]


def fits(outputs: int, inputs: int) -> bool:
    """Whether products with such a weight can be in FP8."""
    return outputs % MULTIPLE == inputs % MULTIPLE == 0


def bytes_of(outputs: int, inputs: int) -> tuple[int, int]:
    """What both forms of a weight take: that for the way forward, and that for the way back."""
    return outputs * inputs + 4 * outputs, outputs * inputs + 4 * inputs


def product(m_NK: Tensor, name: str) -> Product:
    """Raises ConfigError where this device multiplies otherwise. ``name``: of the layer, for people."""
    found = Product(m_NK)
    x = torch.randn(TRIED, m_NK.shape[1], generator=torch.Generator().manual_seed(0)).to(m_NK)
    expected = (x @ m_NK.T).float()
    off = ((found(x).float() - expected).norm() / expected.norm().clamp(min=1e-30)).item()
    if not off < OFF:
        raise ConfigError(f"learn.fp8: products with {name} are off by {off:.1%} here, and {OFF:.0%} is allowed; leave it out")
    return found
