"""The kernels of worker/serve/gpu_kernels.py and the slots that they fill, beside plain torch: test_int8.py runs this file in
Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vllm_ttt.eval import int8
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.serve import gpu_kernels as kernels
from vllm_ttt.worker.serve import gpu_slots
from vllm_ttt.worker.serve.slots import Slots, share

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.*(invalid value|divide by zero).*")]

SLOTS, IN, OUTS = 4, 96, (40, 24)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


class Layer:
    """A LoRA layer of vLLM's, as far as `share` goes, with the slots of a gate and an up projection."""

    n_slices = 2

    def __init__(self, rank: int):
        self.lora_a_stacked = tuple(torch.zeros(SLOTS, 1, rank, IN) for _ in OUTS)
        self.lora_b_stacked = tuple(torch.zeros(SLOTS, 1, out, rank) for out in OUTS)


def filled(rank: int) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """B of all slots in 8 bits, its scales, and what these stand for."""
    pairs = [kernels.rounded(draw(SLOTS, 1, out, rank, seed=i)) for i, out in enumerate(OUTS)]
    return [b8 for b8, _ in pairs], [s for _, s in pairs], [b8 * s[..., None] for b8, s in pairs]


def told(slots: list[int]) -> list[Tensor]:
    """by_slot, counts, starts and active of rows with these slots, as SessionPunicaGPU lays them out."""
    table = torch.tensor(slots, dtype=torch.int32)
    found, sizes = table.unique(return_counts=True)
    counts, starts, active = torch.zeros(SLOTS + 1), torch.zeros(SLOTS + 2), torch.full((SLOTS + 1,), -1)
    counts[: len(found)], active[: len(found)], starts[1 : 1 + len(found)] = sizes, found, sizes.cumsum(0)
    return [x.to(torch.int32) for x in (table.argsort(stable=True), counts, starts, active)]


def expected(y: Tensor, r: Tensor, b: list[Tensor], slots: list[int]) -> Tensor:
    moved = [torch.cat([part[slot, 0] @ row.float() for part in b]) for row, slot in zip(r, slots, strict=True) if slot >= 0]
    found = y.to(torch.float32, copy=True)
    found[[slot >= 0 for slot in slots]] += torch.stack(moved)
    return found


BATCHES = {
    "sessions beside the base model": [2, 2, -1, 0, 2, -1, 3, 0, 2, 2, 2, 2, -1, 2, 2, 2, 2, 2, 2, 2, 2, 2],
    "one session": [1] * 35,
    "one row": [3],
    "two sessions of whole tiles": [0] * 16 + [3] * 32,
}


@pytest.mark.parametrize(("rank", "dtype"), [(8, torch.float32), (16, torch.float16), (40, torch.float16)])
@pytest.mark.parametrize("slots", BATCHES.values(), ids=BATCHES)
def test_many_rows(slots: list[int], rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and blocks, ends that fill none of them, a rank of several pieces; a row's sums are its own. The
    interpreter has no product in bfloat16."""
    for name, size in {"MANY_M": 16, "MANY_N": 16, "MANY_R": 16, "MANY_TIMES": 2}.items():
        monkeypatch.setattr(kernels, name, size)
    b8, scales, b = filled(rank)
    r, before = draw(len(slots), rank).to(dtype), draw(len(slots), sum(OUTS) + 3).to(dtype)
    y = before.clone()
    kernels.by_slots(y, r, b8, scales, *told(slots))
    close = 1e-5 if dtype == torch.float32 else 2e-3
    assert torch.allclose(y[:, : sum(OUTS)].float(), expected(before[:, : sum(OUTS)], r, b, slots), rtol=close, atol=close * 9)
    others = torch.tensor(slots) < 0
    assert torch.equal(y[others], before[others]), "a row without a session moved"
    assert torch.equal(y[:, sum(OUTS) :], before[:, sum(OUTS) :]), "what lies beside it moved"

    alone = before.clone()
    kernels.by_slots(alone, r, b8, scales, *told([s if i == len(slots) - 1 else -1 for i, s in enumerate(slots)]))
    assert torch.equal(alone[-1], y[-1])
    assert torch.equal(alone[:-1], before[:-1])


@pytest.mark.parametrize("rank", [16, 32])
def test_few_rows(rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BYTES", 16 * rank)
    slots, (b8, scales, b) = [2, -1, 0, 3, 2], filled(rank)
    x, a, before = draw(5, IN), draw(rank, IN) / IN**0.5, draw(5, sum(OUTS))
    y, on_device = before.clone(), torch.tensor(slots, dtype=torch.int32)
    kernels.expand(y, *kernels.shrink(x, a), b8, scales, on_device)
    found = expected(before, x @ a.T, b, slots)
    found[1] = before[1]
    half = (x @ a.T).abs().amax(1) / (2 * 32512)  # of a step of r, which is rounded to 16 bits
    bound = half[:, None] * torch.cat([torch.stack([part[s, 0].abs().sum(1) for s in slots]) for part in b], 1)
    assert ((y - found).abs() <= bound + 1e-5 * found.abs() + 1e-5).all()
    assert torch.equal(y[1], before[1]), "a row without a session moved"


@pytest.mark.parametrize("rank", [8, 64, 40])
def test_a_row_is_rounded_by_half_a_step_at_most(rank: int) -> None:
    """Rows far apart in size lose nothing by it, and a row of zeros stays one."""
    b = draw(3, 50, rank) * 10.0 ** torch.arange(-30, 20).clamp(-25, 15)[:, None]
    b[1, 7] = 0
    b8, scales = kernels.rounded(b)
    assert (b - b8 * scales[..., None]).abs().le(scales[..., None] * 0.50001).all()
    assert b8.abs().amax(-1).eq(127).sum() == 3 * 50 - 1
    assert not b8[1, 7].any()
    assert scales[1, 7] == 0
    codes, plain = int8.codes(b)
    assert torch.allclose(scales, plain, rtol=1e-6)
    assert (b8.int() - codes.int()).abs().max() <= 1, "a number in the middle between two may go either way"
    assert (b8 != codes).float().mean() < 1e-3


@pytest.mark.parametrize("modules", ["ogud", "od", "gu"])
def test_both_ways_into_a_slot_are_the_same_bits(modules: str) -> None:
    """What vLLM copies when it activates an adapter, and what is copied after a step; no other slot moves."""
    layers, rank, hidden, inner = 3, 16, 24, 40
    zeros = Delta.zeros(modules, layers, 1, hidden, inner, rank)
    delta = zeros.by(*(draw(*x.shape) if x.numel() else x for x in zeros.tensors()))
    parts = [b[0] for _, b in delta.parts()]
    stacks = [gpu_slots.in_8_bits((torch.ones(SLOTS, 1, len(b), rank),)) for b in parts]
    slots = Slots.__new__(Slots)
    slots.rounded, slots.stacks, slots.scales = True, [b8 for b8, _ in stacks], [s for _, s in stacks]
    slots._copy(2, delta)
    for b, (b8, scale) in zip(parts, stacks, strict=True):
        layer = Layer(rank)
        layer.lora_b_stacked = (torch.ones(SLOTS, 1, len(b), rank, dtype=torch.bfloat16),)
        share(layer, torch.zeros(rank, IN), rounded=True)
        layer.set_lora(2, None, b)  # pyright: ignore[reportAttributeAccessIssue]
        assert [x.dtype for x in layer.lora_b_stacked] == [torch.int8, torch.float32]
        for one, other in zip(layer.lora_b_stacked, (b8, scale), strict=True):
            assert torch.equal(one, other)
            assert one[2].any()
            assert not one[[0, 1, 3]].any(), "another slot moved"


def test_a_slot_is_emptied_and_takes_a_smaller_rank() -> None:
    """vLLM's dummies at start, of fewer columns and in 16 bits, over what was there."""
    layer = Layer(16)
    share(layer, torch.zeros(16, IN), rounded=True)
    b = [draw(out, 16) for out in OUTS]
    layer.set_lora(1, None, b)  # pyright: ignore[reportAttributeAccessIssue]
    layer.set_lora(1, None, [x[:, :8].half() for x in b])  # pyright: ignore[reportAttributeAccessIssue]
    for given, b8, scale in zip(b, *gpu_slots.halves(layer.lora_b_stacked), strict=True):
        assert not b8[1, 0, :, 8:].any()
        assert torch.allclose(b8[1, 0, :, :8] * scale[1, 0, :, None], given[:, :8], atol=0.02)
    layer.reset_lora(1)  # pyright: ignore[reportAttributeAccessIssue]
    assert not any(x.any() for x in layer.lora_b_stacked)
