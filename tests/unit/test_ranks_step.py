"""A step of two ranks, each with its part of the weights as vLLM shards them, beside the step of one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from several import cut, together
from test_gradient import EVERYTHING, ROWS, SUBSETS, Batch, Kept, batch_of, config_of, joined, tail_of
from test_update import stepped
from torch import Tensor

from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.worker.delta import Delta, State
from vllm_ttt.worker.ranks import Several
from vllm_ttt.worker.step.micro_step import accumulate

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Case:
    architecture: str
    layers: int | str
    modules: tuple[str, ...] = EVERYTHING
    kv_heads: int = 2
    #: tokens of the first rank's part of the vocabulary
    first: int = 160
    scale: float = 1.0
    cap: float | None = None


CASES = {
    "last": Case("llama", 1),
    "biases": Case("qwen2", 2, first=256),
    "one-kv-head": Case("mistral", 2, SUBSETS[0], kv_heads=1),
    "all-layers": Case("qwen3", "all", SUBSETS[0], first=192),
    "gate-and-up": Case("llama", 2, SUBSETS[3]),
    "one-matrix": Case("qwen2", 1, SUBSETS[2]),
    "no-vocabulary": Case("llama", 1, first=320, scale=0.7, cap=3.0),
}


@dataclass
class Found:
    losses: list[Tensor]
    #: of each row of the first chunk
    rows: Tensor
    grad: Delta
    state: State
    oks: list[Tensor]
    norms: Tensor


def learned(case: Case, folder: Path, ranks: Several | None = None) -> Found:
    """Three chunks of three sessions; the last of the second session is not finite."""
    oracle = Oracle(folder, config_of(case.layers, case.modules), dtype=torch.float64, compute_dtype=torch.float64)
    tail, batches = tail_of(oracle), [batch_of(oracle), batch_of(oracle, seed=10), batch_of(oracle)]
    tail.logit_scale, tail.soft_cap = case.scale, case.cap
    if ranks is not None:
        tail, batches = joined(cut(tail, ranks, case.first)), [cut_batch(batch, ranks) for batch in batches]
    state = State(tail.zeros(3), tail.zeros(3, torch.bfloat16), torch.full((3,), 0.01))
    found = Found([], torch.zeros(2, 3, max(ROWS)), tail.zeros(3), state, [], torch.zeros(()))
    share = torch.tensor([n / max(ROWS) for n in ROWS])
    for i, batch in enumerate(batches):
        grad = tail.zeros(3)
        if i == 2:
            batch.w[1, 0] = torch.nan
        loss = accumulate(tail, state.delta, *batch.rows(), grad, batch.past, None if i else found.rows)
        alone = accumulate(tail, state.delta, *batch.rows(), None, batch.past)
        torch.testing.assert_close(alone, loss, equal_nan=True)
        state, ok, found.norms = stepped(tail.norms, state, grad, loss, share, config_of(1).learn, 100.0, tail.ranks)
        found.losses.append(loss)
        found.oks.append(ok)
        found.grad = grad if i == 1 else found.grad
    found.state = state
    return found


def cut_batch(batch: Batch, ranks: Several) -> Batch:
    cache = batch.past.cache
    assert isinstance(cache, Kept)
    own = cache.map(lambda x: x if x.shape[1] == 1 else ranks.part(x, 1))
    a = None if batch.a is None else ranks.part(batch.a, 2)
    return replace(batch, a=a, past=replace(batch.past, cache=own))


def folder_of(case: Case, root: Path) -> Path:
    return root / f"{case.architecture}-{case.kv_heads}"


def on_a_rank(ranks: Several, root: Path) -> dict[str, Found]:
    with torch.inference_mode():  # as the worker's hooks run
        return {name: learned(case, folder_of(case, root), ranks) for name, case in CASES.items()}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for case in CASES.values():
        shape: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 1024, "num_key_value_heads": case.kv_heads}
        tiny_model(case.architecture, folder_of(case, root), **shape)
    return root


@pytest.fixture(scope="module")
def both(models: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Found]]:
    folder = tmp_path_factory.mktemp("ranks")
    found, codes = together(2, folder, on_a_rank, models)
    assert codes == [0, 0], (folder / "0.log").read_text() + (folder / "1.log").read_text()
    return found


def whole(*wide: Tensor) -> Tensor:
    return torch.cat(wide, 2)


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_learn_what_one_does(models: Path, both: list[dict[str, Found]], name: str) -> None:
    one, (first, second) = learned(CASES[name], folder_of(CASES[name], models)), [found[name] for found in both]
    for loss, expected in zip(first.losses, one.losses, strict=True):
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(first.rows, one.rows, rtol=1e-4, atol=1e-6)
    assert [x.tolist() for x in first.oks] == [x.tolist() for x in one.oks] == [[True] * 3] * 2 + [[True, False, True]]
    torch.testing.assert_close(first.grad.thin, one.grad.thin, rtol=1e-4, atol=2e-6)
    torch.testing.assert_close(whole(first.grad.wide, second.grad.wide), one.grad.wide, rtol=1e-4, atol=2e-6)
    delta = first.state.delta.by(first.state.delta.thin, whole(first.state.delta.wide, second.state.delta.wide))
    for found, expected in zip(delta.tensors(), one.state.delta.tensors(), strict=True):
        if expected.numel():
            assert ((found - expected).norm() / expected.norm()).item() < 0.002
    torch.testing.assert_close(first.state.rate_S, one.state.rate_S, rtol=1e-3, atol=0)
    torch.testing.assert_close(first.norms, one.norms, rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_have_the_same_bits_of_what_is_theirs_alike(both: list[dict[str, Found]], name: str) -> None:
    first, second = (found[name] for found in both)
    equal = lambda x, y: torch.equal(x.nan_to_num(), y.nan_to_num())  # noqa: E731
    for x, y in zip(first.losses, second.losses, strict=True):
        assert equal(x, y)
    assert equal(first.rows, second.rows)
    alike = lambda x: (x.state.delta.thin, x.state.last.thin, x.state.rate_S, x.norms)  # noqa: E731
    for x, y in zip(alike(first), alike(second), strict=True):
        assert torch.equal(x, y)
    for x, y in zip(first.oks, second.oks, strict=True):
        assert torch.equal(x, y)
