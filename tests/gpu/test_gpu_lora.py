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

    def __init__(
        self, rows: int, real: int, IN: int, OUT: int, RANK: int, parts: int, dtype: torch.dtype = torch.bfloat16,
        slots: Tensor | None = None,
    ):  # fmt: skip
        """``slots``: [rows] int32; None: random ones, with one that has no rows."""
        from vllm_ttt.worker.serve import gpu_kernels

        torch.manual_seed(0)
        cuda = torch.device("cuda")
        self.projection = torch.randn(RANK, IN, device=cuda).to(dtype) / 16
        self.a = self.projection[None, None]
        masters = [torch.randn(SLOTS, 1, OUT, RANK, device=cuda) for _ in range(parts)]
        pairs = [gpu_kernels.rounded(b) for b in masters]
        self.b, self.scales = [b8 for b8, _ in pairs], [scale for _, scale in pairs]
        if slots is None:
            slots = torch.randint(-1, SLOTS, (rows,), dtype=torch.int32)
            slots[slots == 0] = 1
            slots[0] = 3
        slots[real:] = -1
        found, counts = np.unique(slots[:real].numpy(), return_counts=True)
        active = torch.full((SLOTS + 1,), -1, dtype=torch.int32)
        tokens, starts = torch.zeros(SLOTS + 1, dtype=torch.int32), torch.zeros(SLOTS + 2, dtype=torch.int32)
        active[: len(found)] = torch.from_numpy(found)
        tokens[: len(found)] = torch.from_numpy(counts.astype("int32"))
        starts[1 : 1 + len(found)] = torch.from_numpy(np.cumsum(counts).astype("int32"))
        by_slot = torch.zeros(rows, dtype=torch.int32)
        by_slot[:real] = torch.from_numpy(np.argsort(slots[:real].numpy(), kind="stable").astype("int32"))
        self.x, self.slots = torch.randn(rows, IN, device=cuda).to(dtype), slots.to(cuda)
        self.counts: tuple[Tensor, ...] = tuple(t.to(cuda) for t in (by_slot, tokens, starts, active))

    def args(self, idle: bool = False) -> tuple[Any, ...]:
        return (self.a, self.b, self.scales, self.slots, *self.counts, torch.tensor([idle]))

    def expected(self, before: Tensor) -> Tensor:
        found, shrunk = before.float(), (self.x.float() @ self.projection.float().T).to(self.x.dtype).float()
        for slot in range(SLOTS):
            own = self.slots == slot
            b = torch.cat([b8[slot, 0] * scale[slot, 0, :, None] for b8, scale in zip(self.b, self.scales, strict=True)])
            found[own] += shrunk[own] @ b.T
        return found


def check(batch: Batch, out: int) -> Tensor:
    """Returns what the batch found."""
    from vllm_ttt.worker.serve import gpu_lora

    before = torch.randn(len(batch.x), out, device="cuda").to(batch.x.dtype)
    y = before.clone()
    gpu_lora.session_lora(y, batch.x, *batch.args())

    expected, others = batch.expected(before), batch.slots < 0
    assert torch.equal(y[others], before[others]), "a row without a session moved"
    assert float((y.float() - expected).abs().max() / expected.abs().max()) < 0.01
    return y


@pytest.mark.parametrize(
    ("IN", "OUT", "RANK"),
    [
        (256, 512, 128),
        (576, 576, 64),
        (12288, 4096, 64),
        (4100, 300, 16),
        (256, 96, 8),
        (512, 200, 320),
        (900, 300, 256),
        (900, 96, 512),
    ],
)
@pytest.mark.parametrize(("rows", "real"), [(1, 1), (64, 64), (128, 100), (256, 256), (512, 300)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_each_row_gets_its_sessions_delta_and_no_other(
    rows: int, real: int, IN: int, OUT: int, RANK: int, dtype: torch.dtype
) -> None:
    check(Batch(rows, real, IN, OUT, RANK, 2, dtype), 2 * OUT)


@pytest.mark.parametrize(("OUT", "RANK"), [(300, 64), (1024, 16)])
@pytest.mark.parametrize("slots", ["many", "one", "few rows beside a prompt", "none but one row"])
def test_a_prompt_gets_its_sessions_delta(slots: str, OUT: int, RANK: int) -> None:
    """Rows of a session lie beside each other, or all over the batch; and most slots have no rows."""
    rows, table = 16384, torch.full((16384,), -1, dtype=torch.int32)
    if slots == "many":
        table = torch.randint(-1, SLOTS, (rows,), dtype=torch.int32)
    elif slots == "one":
        table[:] = 5
    elif slots == "few rows beside a prompt":
        table[:16000], table[16100], table[16200:16203] = 2, 7, 0
    else:
        table[77] = 0
    check(Batch(rows, rows, 256, OUT, RANK, 1, slots=table), OUT)


def test_a_rows_sums_are_its_own() -> None:
    """The same bits, whatever else is in the batch and wherever in it the row is."""
    from vllm_ttt.worker.serve import gpu_kernels

    batch = Batch(700, 700, 256, 576, 64, 1)
    r = torch.randn(700, 64, device="cuda").bfloat16()
    y, alone = (torch.zeros(700, 576, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    gpu_kernels.by_slots(y, r, batch.b, batch.scales, *batch.counts)
    slots = batch.slots.cpu()
    slots[torch.arange(700) % 3 > 0] = -1
    kept = slots.cuda() >= 0
    gpu_kernels.by_slots(alone, r, batch.b, batch.scales, *Batch(700, 700, 256, 576, 64, 1, slots=slots).counts)
    assert torch.equal(alone[kept], y[kept])
    assert not alone[~kept].any()


@pytest.mark.parametrize("RANK", [16, 64, 512])
def test_few_rows_are_multiplied_exactly(RANK: int) -> None:
    """Four numbers an instruction, both digits."""
    from vllm_ttt.worker.serve import gpu_kernels

    rows, OUT, slots = 5, 96, [0, 2, -1, 1, 2]
    draw = torch.Generator().manual_seed(RANK)
    b8 = torch.randint(-127, 128, (3, 1, OUT, RANK), generator=draw).to(torch.int8)
    digits = torch.randint(-128, 128, (rows, 2, RANK), generator=draw).to(torch.int8)
    b8[2], digits[4, 0], digits[4, 1] = 127, 127, 0  # the largest sum that there is
    steps, scales = torch.rand(rows, generator=draw), torch.rand(3, 1, OUT, generator=draw) + 0.5
    y = torch.randn(rows, OUT, generator=draw)
    expected = y.double()
    for row, slot in enumerate(slots):
        if slot >= 0:
            whole = 256 * digits[row, 0].long() + digits[row, 1].long()
            expected[row] += (b8[slot, 0].long() @ whole) * scales[slot, 0].double() * steps[row]
    on_device = y.cuda()
    gpu_kernels.expand(
        on_device, steps.cuda(), digits.cuda(), [b8.cuda()], [scales.cuda()], torch.tensor(slots, dtype=torch.int32).cuda()
    )
    assert ((on_device.cpu() - expected).abs() <= 1e-6 * expected.abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("RANK", [8, 64, 320])
def test_a_row_is_rounded_by_half_a_step_at_most(RANK: int) -> None:
    from vllm_ttt.worker.serve import gpu_kernels

    b = torch.randn(3, 500, RANK, device="cuda") * 10.0 ** torch.linspace(-20, 5, 500, device="cuda")[:, None]
    b[1, 7] = 0
    b8, scales = gpu_kernels.rounded(b)
    assert (b - b8 * scales[..., None]).abs().le(scales[..., None] * 0.50001).all()
    assert b8.abs().amax(-1).eq(127).sum() == 3 * 500 - 1
    assert not b8[1, 7].any()
    assert scales[1, 7] == 0


@pytest.mark.parametrize("modules", ["od", "ogud"])
def test_both_ways_into_a_slot_are_the_same_bits(modules: str) -> None:
    """What vLLM copies when it activates an adapter, from the device or the host, and what is copied after a step."""
    from vllm_ttt.worker.delta import Delta
    from vllm_ttt.worker.serve import gpu_kernels, gpu_slots

    delta = Delta.zeros(modules, 4, 1, 576, 1536, 64, device=torch.device("cuda"))
    for x in delta.tensors():
        x.normal_()
    parts = [b[0] for _, b in delta.parts()]
    b8, scales = ([*x] for x in zip(*(gpu_slots.in_8_bits((b.expand(SLOTS, 1, -1, -1),)) for b in parts), strict=True))
    gpu_slots.fill(b8, scales, 5, delta)
    for b, stack, scale in zip(parts, b8, scales, strict=True):
        for given in (b, b.cpu().pin_memory().cuda(non_blocking=True)):
            codes, own = torch.empty_like(stack[5, 0]), torch.empty_like(scale[5, 0])
            gpu_kernels.round_into(codes, own, given)
            assert torch.equal(stack[5, 0], codes)
            assert torch.equal(scale[5, 0], own)
        assert stack[5].any()
        assert not stack[[0, 4, 6]].any(), "another slot moved"
    gpu_slots.fill(b8, scales, 6, delta.by(*(x.cpu().pin_memory() for x in delta.tensors())))
    for stack, scale in zip(b8, scales, strict=True):
        assert torch.equal(stack[6], stack[5]), "a master may lie on the host"
        assert torch.equal(scale[6], scale[5])


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
    run = lambda: gpu_linear.session_linear(batch.x, w.T, None, *args)  # noqa: E731
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
    assert torch.equal(gpu_linear.session_linear(batch.x, w.T, None, *batch.args(idle=True)), before)
