"""The LoRA ops of the CUDA worker beside a plain loop over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

SLOTS = 8


class Batch:
    """Rows of sessions, of the base model, and of a graph's padding, and what vLLM's wrapper says of them."""

    def __init__(self, rows: int, real: int, IN: int, OUT: int, RANK: int, parts: int):
        torch.manual_seed(0)
        cuda = torch.device("cuda")
        self.projection = torch.randn(RANK, IN, device=cuda).bfloat16() / 16
        self.a = self.projection[None, None]
        self.b = [torch.randn(SLOTS, 1, OUT, RANK, device=cuda).bfloat16() for _ in range(parts)]
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
        self.x, self.slots = torch.randn(rows, IN, device=cuda).bfloat16(), slots.to(cuda)
        self.counts: tuple[Tensor, ...] = tuple(t.to(cuda) for t in (by_slot, tokens, starts, active))

    def args(self, idle: bool = False) -> tuple[Any, ...]:
        return (self.a, self.b, self.slots, *self.counts, torch.tensor([idle]), torch.tensor([SLOTS + 1], dtype=torch.int32))

    def expected(self, before: Tensor) -> Tensor:
        found = before.float()
        for row, slot in enumerate(self.slots.tolist()):
            if slot >= 0:
                shrunk = (self.x[row].float() @ self.projection.float().T).bfloat16().float()
                found[row] += torch.cat([part[slot, 0].float() @ shrunk for part in self.b])
        return found


@pytest.mark.parametrize(("IN", "OUT", "RANK"), [(256, 512, 128), (576, 576, 64), (12288, 4096, 64), (4100, 300, 16)])
@pytest.mark.parametrize(("rows", "real"), [(1, 1), (64, 64), (128, 100), (256, 256)])
def test_each_row_gets_its_sessions_delta_and_no_other(rows: int, real: int, IN: int, OUT: int, RANK: int) -> None:
    from vllm_ttt.worker.serve import gpu_lora

    batch = Batch(rows, real, IN, OUT, RANK, parts=2)
    before = torch.randn(rows, 2 * OUT, device="cuda").bfloat16()
    y = before.clone()
    gpu_lora.session_lora(y, batch.x, *batch.args())

    expected, others = batch.expected(before), batch.slots < 0
    assert torch.equal(y[others], before[others]), "a row without a session moved"
    assert float((y.float() - expected).abs().max() / expected.abs().max()) < 0.01


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize(("IN", "OUT", "RANK"), [(576, 576, 64), (12288, 4096, 64), (4096, 304, 16)])
@pytest.mark.parametrize(("rows", "real"), [(1, 1), (64, 64), (128, 100), (256, 256)])
def test_a_delta_beside_the_product_is_the_delta_after_it(
    rows: int, real: int, IN: int, OUT: int, RANK: int, captured: bool
) -> None:
    from vllm_ttt.worker.serve import gpu_linear, gpu_lora

    batch = Batch(rows, real, IN, OUT, RANK, parts=1)
    w = torch.randn(OUT, IN, device="cuda").bfloat16() / IN**0.5
    before = torch.nn.functional.linear(batch.x, w)
    after = before.clone()
    gpu_lora.session_lora(after, batch.x, *batch.args())

    args = batch.args()
    run = lambda: gpu_linear._session_linear(batch.x, w, None, *args)  # noqa: E731
    if captured:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = run()
        for _ in range(3):
            graph.replay()
    else:
        y = run()

    assert torch.equal(y, after)
    assert not torch.equal(y, before)
    assert torch.equal(y[batch.slots < 0], before[batch.slots < 0]), "a row without a session moved"
    assert torch.equal(gpu_linear._session_linear(batch.x, w, None, *batch.args(idle=True)), before)
