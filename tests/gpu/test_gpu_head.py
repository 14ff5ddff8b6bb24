"""The preset `head` on CUDA: the kernel that moves the last hidden states, and the step, beside the CPU's."""

from __future__ import annotations

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SLOTS, V = 6, 1000


@pytest.mark.parametrize(("rows", "D", "R"), [(1, 256, 128), (64, 576, 512), (256, 80, 24), (300, 576, 512)])
def test_each_row_gets_its_sessions_delta_and_no_other(rows: int, D: int, R: int) -> None:
    """With the kernel, and beyond its rows without; of sizes that fill no block too."""
    from vllm_ttt.worker.deltas.masters import Deltas
    from vllm_ttt.worker.serve.gpu_head import GPUHeadSlots
    from vllm_ttt.worker.step.head import Head

    torch.manual_seed(0)
    cuda = torch.device("cuda")
    head = Head(torch.randn(V, D, device=cuda).bfloat16(), (torch.randn(R, D, device=cuda) / D**0.5).bfloat16())
    served = GPUHeadSlots(head, Deltas(head, SLOTS, 0.01), SLOTS)
    served.b_KDR.normal_(std=R**-0.5)
    y, slots = torch.randn(rows, D, device=cuda).bfloat16(), torch.randint(-1, SLOTS, (rows,)).tolist()
    slots[0] = 3
    found = served._moved(y, slots)
    for row, slot in enumerate(slots):
        if slot < 0:
            assert torch.equal(found[row], y[row]), "a row without a session moved"
            continue
        shrunk = (head.ay_RD.float() @ y[row].float()).bfloat16().float()
        expected = y[row].float() + served.b_KDR[slot].float() @ shrunk
        assert float((found[row].float() - expected).abs().max() / expected.abs().max()) < 0.01


@pytest.mark.parametrize("bias", [False, True])
def test_the_step_is_the_cpus(bias: bool) -> None:
    from vllm_ttt.worker.step.head import Head
    from vllm_ttt.worker.step.micro_step import accumulate

    draw, results = torch.Generator().manual_seed(1), []
    weight, a = torch.randn(V, 64, generator=draw) / 8, torch.linalg.qr(torch.randn(64, 16, generator=draw))[0].T
    y, t = torch.randn(3, 40, 64, generator=draw), torch.randint(0, V, (3, 40), generator=draw)
    b, more = torch.randn(3, 1, 64, 16, generator=draw) / 4, torch.randn(V, generator=draw)
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.bfloat16)):
        head = Head(
            weight.to(device, dtype), a.to(device, dtype), bias_V=more.to(device, dtype) if bias else None, soft_cap=20.0
        )
        delta, grad = head.zeros(3, dtype), head.zeros(3)
        delta.thin.copy_(b)
        share = torch.full((3, 40), 1 / 40, device=device)
        losses = accumulate(head, delta, y.to(device, dtype), None, t.to(device), share, grad)
        results.append((losses.cpu(), grad.thin.cpu()))
    (losses, grads), (other, found) = results
    assert torch.allclose(losses, other, rtol=0.01)
    assert float((grads - found).norm() / grads.norm()) < 0.03
