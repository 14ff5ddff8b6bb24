"""The attention kernels of the step on CUDA beside torch's scaled_dot_product_attention in float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

C = 96


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper")
@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float16])
def test_vllms_own_kernels_are_there(dt: torch.dtype) -> None:
    """What skips below would say so here."""
    from vllm_ttt.worker.step.attention import available

    assert {"varlen", "served", "cudnn"} <= {kernel.name for kernel in available(torch.device("cuda"), dt)}


@pytest.mark.parametrize("name", ["varlen", "served", "cudnn", "xformers"])
@pytest.mark.parametrize("dt", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(8, 2, 128), (9, 3, 64), (4, 4, 32)])
@pytest.mark.parametrize("room", [None, 900])
@pytest.mark.parametrize("lengths", [[0, 0, 0], [0, 1, 700], [333]])
def test_output_and_gradients(
    name: str, dt: torch.dtype, heads: int, kv_heads: int, width: int, room: int | None, lengths: list[int]
) -> None:
    from vllm_ttt.worker.step.attention import Layout, SDPAAttention, available

    device = torch.device("cuda")
    kernel = next((x for x in available(device, dt) if x.name == name), None)
    if kernel is None:
        pytest.skip(f"{name} does not run here")
    if room is not None and not kernel.static:
        pytest.skip(f"{name} takes no room that is not filled")
    draw = lambda rows, n, seed: torch.randn(rows, n, width, generator=torch.Generator().manual_seed(seed)).cuda()  # noqa: E731
    T, P = C * len(lengths), sum(lengths)
    own, past = (draw(T, heads, 1), draw(T, kv_heads, 2), draw(T, kv_heads, 3)), (draw(P, kv_heads, 4), draw(P, kv_heads, 5))
    d = draw(T, heads, 6)

    def both(kernel: object, layout: Layout, before: tuple[Tensor, ...], dtype: torch.dtype) -> list[Tensor]:
        given = tuple(x.to(dtype) for x in own), tuple(x.to(dtype) for x in before), layout, 0.9 * width**-0.5
        out, saved = kernel.forward(*given)  # type: ignore[attr-defined]
        return [out, *kernel.backward(*given, d.to(dtype), saved)]  # type: ignore[attr-defined]

    with torch.inference_mode():  # as the worker's hooks run
        expected = both(SDPAAttention(), Layout.of(lengths, C).to(device), past, torch.float32)
        rest = (x.new_full(((room or P) - P, *x.shape[1:]), 50.0) for x in past)  # that nothing reads
        filled = tuple(map(torch.cat, zip(past, rest, strict=True)))
        found = both(kernel, Layout.of(lengths, C, room).to(device), filled, dt)
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert ((one.float() - other).norm() / other.norm()).item() < 0.02
