"""The optimiser with its kernels compiled, beside plain torch on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from vllm_ttt.config import LearnConfig
from vllm_ttt.worker.delta import Delta, State

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODULES, LAYERS, D, F = "ogud", 2, 1024, 1500
LEARN = LearnConfig(decay=0.015, max_norm=0.3)


def drawn(seed: int, sessions: int, rank: int) -> Delta:
    shapes = Delta.zeros(MODULES, LAYERS, sessions, D, F, rank)
    generator = torch.Generator().manual_seed(seed)
    return shapes.by(*(torch.randn(x.shape, generator=generator) for x in shapes.tensors()))


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.cpu().float() - expected.float()).norm() / expected.float().norm()).item()


def equal(one: Any, other: Any) -> bool:
    tensors = ((*state.tensors(), ok, sizes) for state, ok, sizes in (one, other))
    return all(torch.equal(x, y) for x, y in zip(*tensors, strict=True))


@pytest.mark.parametrize("rank", [16, 64])
@torch.inference_mode()
def test_the_update_is_the_cpus(rank: int) -> None:
    """One session that steps, one cut by the trust region, one whose gradient is NaN, one whose loss is too large, one of a
    short chunk; again, and replayed from a graph, it is the same."""
    from vllm_ttt.worker.step.update import Norms, update

    rows = torch.arange(5), torch.arange(5).cuda()

    def stepped(norms: Norms, state: State, *args: Any) -> tuple[State, torch.Tensor, torch.Tensor]:
        masters = state.by(*(x.clone() for x in state.tensors()))
        ok, _, sizes = update(norms, masters, rows[state.rate_S.is_cuda], *args)
        return masters, ok, sizes

    scale = torch.tensor([1e-3, 100.0, 1e-3, 1e-3, 1e-3])[:, None, None, None]
    before, last = drawn(1, 5, rank), drawn(3, 5, rank)
    grad = drawn(2, 5, rank)
    grad = grad.by(*(g + 0.01 * u for g, u in zip(grad.tensors(), last.tensors(), strict=True)))
    grad.thin[2, 1, 7, 3] = torch.nan
    state = State(before.by(*(x * scale for x in before.tensors())), last.to(torch.bfloat16), torch.full((5,), 0.02))
    loss, share = torch.tensor([1.0, 1.0, 1.0, 20.0, 1.0]), torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])
    layers = [dict.fromkeys(MODULES, 30.0 * (i + 1)) for i in range(LAYERS)]
    new, ok, sizes = stepped(Norms(MODULES, layers, torch.device("cpu")), state, grad, loss, share, LEARN, 10.0)

    norms, there = Norms(MODULES, layers, torch.device("cuda")), state.by(*(x.cuda() for x in state.tensors()))
    args: Any = norms, there, grad.by(*(x.cuda() for x in grad.tensors())), loss.cuda(), share.cuda(), LEARN, 10.0
    found, found_ok, found_sizes = first = stepped(*args)
    assert found_ok.tolist() == ok.tolist() == [True, True, False, False, True]
    assert relative(found_sizes, sizes) < 1e-4
    assert relative(found.rate_S, new.rate_S) < 1e-5
    assert (new.rate_S[ok] > 0.0201).all()
    for x, expected in zip(found.delta.tensors(), new.delta.tensors(), strict=True):
        assert all(relative(x[s], expected[s]) < 1e-4 for s in range(5))
    for x, expected in zip(found.last.tensors(), new.last.tensors(), strict=True):
        assert relative(x, expected) < 1e-3, "but for numbers that bfloat16 rounds the other way"
    for x, old in zip(found.tensors(), state.tensors(), strict=True):
        assert torch.equal(x[2:4].cpu(), old[2:4])

    assert equal(stepped(*args), first)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = stepped(*args)
    graph.replay()
    torch.cuda.synchronize()
    for x, expected in zip(captured[0].tensors(), found.tensors(), strict=True):
        assert relative(x, expected.cpu()) < 1e-3
