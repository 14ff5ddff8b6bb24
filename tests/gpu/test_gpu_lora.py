"""The LoRA op of the CUDA worker beside a plain loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SLOTS = 8


@pytest.mark.parametrize(("IN", "OUT", "RANK"), [(256, 512, 128), (576, 576, 64), (12288, 4096, 64), (4100, 300, 16)])
@pytest.mark.parametrize(("rows", "real"), [(1, 1), (64, 64), (128, 100), (256, 256)])
def test_each_row_gets_its_sessions_delta_and_no_other(rows: int, real: int, IN: int, OUT: int, RANK: int) -> None:
    from vllm_ttt.worker.serve import gpu_lora

    torch.manual_seed(0)
    cuda = torch.device("cuda")
    projection = torch.randn(RANK, IN, device=cuda).bfloat16() / 16
    a = projection[None, None]
    b = [torch.randn(SLOTS, 1, OUT, RANK, device=cuda).bfloat16() for _ in range(2)]
    slots = torch.randint(-1, SLOTS, (rows,), dtype=torch.int32)
    slots[slots == 0] = 1
    slots[real:] = -1
    slots[0] = 3
    found, counts = np.unique(slots[:real].numpy(), return_counts=True)
    active = torch.full((SLOTS + 1,), -1, dtype=torch.int32)
    tokens, starts = torch.zeros(SLOTS + 1, dtype=torch.int32), torch.zeros(SLOTS + 2, dtype=torch.int32)
    active[: len(found)] = torch.from_numpy(found)
    tokens[: len(found)] = torch.from_numpy(counts.astype("int32"))
    starts[1 : 1 + len(found)] = torch.from_numpy(np.cumsum(counts).astype("int32"))
    by_slot = torch.zeros(rows, dtype=torch.int32)
    by_slot[:real] = torch.from_numpy(np.argsort(slots[:real].numpy(), kind="stable").astype("int32"))
    x = torch.randn(rows, IN, device=cuda).bfloat16()
    before = torch.randn(rows, 2 * OUT, device=cuda).bfloat16()
    y = before.clone()

    everybody = torch.tensor([SLOTS + 1], dtype=torch.int32)
    gpu_lora._session_lora(
        y, x, a, b, slots.to(cuda), by_slot.to(cuda), tokens.to(cuda), starts.to(cuda), active.to(cuda),
        torch.tensor([False]), everybody,
    )  # fmt: skip

    expected = before.float()
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            shrunk = (x[row].float() @ projection.float().T).bfloat16().float()
            expected[row] += torch.cat([part[slot, 0].float() @ shrunk for part in b])
    assert torch.equal(y[slots.to(cuda) < 0], before[slots.to(cuda) < 0]), "a row without a session moved"
    assert float((y.float() - expected).abs().max() / expected.abs().max()) < 0.01
