"""The step that is written by hand, beside float64 autograd on a tiny random model of each architecture."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from vllm_ttt.config import TTTConfig
from vllm_ttt.eval.oracle import Oracle, newton_schulz, rms_norm, tail_loss
from vllm_ttt.eval.tiny import ARCHITECTURES, tiny_model
from vllm_ttt.worker import micro_step
from vllm_ttt.worker.micro_step import MODULES, Delta, Tail, accumulate, orthogonalise, update

pytestmark = pytest.mark.unit

RANK = 16
#: Pairs of each session: a batch is padded to the longest.
LENGTHS = (40, 7, 23)
CONFIG = TTTConfig.model_validate({"adapt": {"rank": RANK}, "learn": {"max_loss": 2}})


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def tail_of(oracle: Oracle, **biases: Any) -> Tail:
    w, A = oracle.weights, oracle.A
    to = lambda x: x.float()  # noqa: E731
    return Tail(
        wo_DQ=to(w.o),
        wgu_2FD=to(torch.cat((w.g, w.u))),
        wd_DF=to(w.d),
        head_VD=to(w.head),
        ln_D=w.norm_mlp.float(),
        lnf_D=w.norm_final.float(),
        eps=w.eps,
        eps_f=w.eps,
        ao_RQ=to(A["o"]),
        ai_RD=to(A["g"]),
        ad_RF=to(A["d"]),
        norm=oracle.norms,
        **biases,
    )


def deltas(tail: Tail, sessions: int, scale: float, seed: int = 50) -> Delta:
    return Delta(*(draw(seed + i, *x.shape, scale=scale) for i, x in enumerate(Delta.zeros(tail, sessions).tensors())))


def of_session(delta: Delta, s: int) -> dict[str, Tensor]:
    return {name: x[s] for name, x in delta.parts()}


@pytest.fixture(scope="module", params=ARCHITECTURES)
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tiny_model(request.param, tmp_path_factory.mktemp(request.param))
    return Oracle(folder, CONFIG, dtype=torch.float64, compute_dtype=torch.float64)


@pytest.fixture(scope="module")
def rows(oracle: Oracle) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """h, a, targets and weights of three requests, padded with large numbers that must not matter."""
    C = max(LENGTHS)
    D, Q = oracle.weights.o.shape
    h, a = torch.full((len(LENGTHS), C, D), 1e4), torch.full((len(LENGTHS), C, Q), -1e4)
    t, w = torch.zeros(len(LENGTHS), C, dtype=torch.int64), torch.zeros(len(LENGTHS), C)
    for s, n in enumerate(LENGTHS):
        ids = torch.randint(320, (n + 1,), generator=torch.Generator().manual_seed(s)).tolist()
        activations = oracle.activations(ids)
        h[s, :n], a[s, :n] = (x[:-1].float() for x in activations)
        t[s, :n], w[s, :n] = torch.tensor(ids[1:]), 1 / n
    return h, a, t, w


def autograd(
    oracle: Oracle, delta: Delta, rows: tuple[Tensor, Tensor, Tensor, Tensor], s: int
) -> tuple[float, dict[str, Tensor]]:
    h, a, t, _ = (x[s, : LENGTHS[s]] for x in rows)
    B = {name: x.double().requires_grad_() for name, x in of_session(delta, s).items()}
    loss = tail_loss(oracle.weights, oracle.A, B, h.double(), a.double(), t)
    return loss.item(), dict(zip(B, torch.autograd.grad(loss, list(B.values())), strict=True))


@pytest.mark.parametrize("scale", [0.0, 0.05], ids=["fresh", "learned"])
def test_gradient(oracle: Oracle, rows: tuple[Tensor, Tensor, Tensor, Tensor], scale: float) -> None:
    """Of several sessions at once, each with its own delta, and each as if it were alone."""
    tail = tail_of(oracle)
    delta, grad = deltas(tail, len(LENGTHS), scale), Delta.zeros(tail, len(LENGTHS))
    losses = accumulate(tail, delta, *rows, grad)
    for s in range(len(LENGTHS)):
        loss, expected = autograd(oracle, delta, rows, s)
        assert losses[s].item() == pytest.approx(loss, abs=1e-5)
        for name, found in of_session(grad, s).items():
            assert (found - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_gradient_in_tiles(oracle: Oracle, rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """A chunk that is read in several tiles adds up to the chunk; the loss is computed in tiles of its own."""
    tail = tail_of(oracle)
    delta, grad = deltas(tail, len(LENGTHS), 0.05), Delta.zeros(tail, len(LENGTHS))
    losses = torch.zeros(len(LENGTHS))
    for start in range(0, 40, 16):
        h, a, t, w = (x[:, start : start + 16] for x in rows)
        losses += accumulate(tail, delta, h, a, t, w, grad)
    for s in range(len(LENGTHS)):
        loss, expected = autograd(oracle, delta, rows, s)
        assert losses[s].item() == pytest.approx(loss, abs=1e-5)
        for name, found in of_session(grad, s).items():
            assert (found - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_loss_tiles(oracle: Oracle, rows: tuple[Tensor, Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits are bounded: more rows than fit give the same."""
    delta = deltas(tail_of(oracle), len(LENGTHS), 0.05)
    results = []
    for size in (256, 11):
        monkeypatch.setattr(micro_step, "LOSS_ROWS", size)
        tail = tail_of(oracle)
        tail.softmax_rows = min(tail.softmax_rows, 5)
        grad = Delta.zeros(tail, len(LENGTHS))
        results.append((accumulate(tail, delta, *rows, grad), *grad.tensors()))
    for whole, tiled in zip(*results, strict=True):
        assert torch.allclose(whole, tiled, rtol=1e-4, atol=1e-6)


def test_loss_alone_leaves_nothing(oracle: Oracle, rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    tail = tail_of(oracle)
    delta, grad = deltas(tail, len(LENGTHS), 0.05), Delta.zeros(tail, len(LENGTHS))
    assert torch.equal(accumulate(tail, delta, *rows, None), accumulate(tail, delta, *rows, grad))


@pytest.mark.parametrize("case", ["biases", "scale", "cap"])
def test_what_some_models_add(oracle: Oracle, rows: tuple[Tensor, Tensor, Tensor, Tensor], case: str) -> None:
    """Frozen biases after o_proj, gate, up and down; a scale of the logits; a soft cap on them."""
    D, F = oracle.weights.d.shape
    biases = {"bo_D": draw(1, D, scale=0.3), "bgu_2F": draw(2, 2 * F, scale=0.3), "bd_D": draw(3, D, scale=0.3)}
    tail = tail_of(oracle, **(biases if case == "biases" else {}))
    tail.logit_scale, tail.soft_cap = 0.7 if case == "scale" else 1.0, 3.0 if case == "cap" else None
    delta, grad = deltas(tail, len(LENGTHS), 0.05), Delta.zeros(tail, len(LENGTHS))
    losses = accumulate(tail, delta, *rows, grad)
    for s, n in enumerate(LENGTHS):
        B = {name: x.double().requires_grad_() for name, x in of_session(delta, s).items()}
        h, a, t, _ = (x[s, :n] for x in rows)
        loss = general_loss(tail, oracle, B, h.double(), a.double(), t)
        assert losses[s].item() == pytest.approx(loss.item(), abs=1e-5)
        assert abs(loss.item() - autograd(oracle, delta, rows, s)[0]) > 1e-4, "it must matter"
        for (name, found), expected in zip(
            of_session(grad, s).items(), torch.autograd.grad(loss, list(B.values())), strict=True
        ):
            assert (found - expected).norm() < 1e-5 * expected.norm(), name


def general_loss(tail: Tail, oracle: Oracle, B: dict[str, Tensor], h: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """`tail_loss` with what it leaves out, float64."""
    w, none = oracle.weights, torch.zeros(())
    bg, bu = (none, none) if tail.bgu_2F is None else tail.bgu_2F.double().chunk(2)
    bias = {"o": tail.bo_D, "g": bg, "u": bu, "d": tail.bd_D}

    def linear(x: Tensor, key: str) -> Tensor:
        b = bias[key]
        return x @ getattr(w, key).T + (x @ oracle.A[key].T) @ B[key].T + (none if b is None else b.double())

    r = h + linear(a, "o")
    x = rms_norm(r, w.norm_mlp, w.eps)
    r = r + linear(silu(linear(x, "g")) * linear(x, "u"), "d")
    logits = rms_norm(r, w.norm_final, w.eps) @ w.head.T
    if tail.soft_cap is not None:
        logits = tail.soft_cap * torch.tanh(logits / tail.soft_cap)
    return cross_entropy(logits * tail.logit_scale, t)


def step(tail: Tail, delta: Delta, grad: Delta, loss: Tensor, share: Tensor, **learn: float) -> tuple[Delta, Tensor, Tensor]:
    options = {"rate": 0.032, "decay": 0.015, "max_norm": 0.35, "max_loss": 2 * math.log(320), **learn}
    return update(tail, delta, grad, loss, share, **options)


def test_update_is_the_oracles_step(oracle: Oracle, rows: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Whole and short chunks of several sessions in one call, step after step."""
    tail = tail_of(oracle)
    master, share = Delta.zeros(tail, len(LENGTHS)), torch.tensor([n / 256 for n in LENGTHS])
    norms = torch.zeros(())
    for _ in range(3):
        grad = Delta.zeros(tail, len(LENGTHS))
        loss = accumulate(tail, master, *rows, grad)
        master, ok, norms = step(tail, master, grad, loss, share)
        assert ok.tolist() == [True] * len(LENGTHS)
    for s, n in enumerate(LENGTHS):
        oracle.reset()
        h, a, t, _ = (x[s, :n] for x in rows)
        for _ in range(3):
            oracle._step(h.double(), a.double(), t)
        for i, (name, found) in enumerate(of_session(master, s).items()):
            assert MODULES[i] == name
            assert (found - oracle.B[name]).norm() < 1e-3 * oracle.B[name].norm(), name
            assert norms[i, s].item() == pytest.approx(oracle.B[name].norm().item() / oracle.norms[name], rel=1e-3)


def test_update_refuses_by_session(oracle: Oracle) -> None:
    """Too large a loss, a loss or a gradient that is not finite: that session keeps its bits, the others move."""
    tail = tail_of(oracle)
    master, grad = deltas(tail, 6, 0.01), deltas(tail, 6, 1.0, seed=90)
    loss = torch.tensor([2.0, 9.0, math.nan, math.inf, 2.0, 2.0])
    grad.o[4, 3, 2] = math.nan
    grad.gu[5, 1, 1] = math.inf
    new, ok, norms = step(tail, master, grad, loss, torch.ones(6), max_loss=5.0)
    assert ok.tolist() == [True, False, False, False, False, False]
    for before, after in zip(master.tensors(), new.tensors(), strict=True):
        assert torch.equal(after[1:], before[1:])
        assert not torch.equal(after[0], before[0])
        assert after.isfinite().all()
    assert norms.isfinite().all()


def test_update_stays_in_the_trust_region(oracle: Oracle) -> None:
    tail = tail_of(oracle)
    new, ok, norms = step(
        tail, deltas(tail, 2, 0.01), deltas(tail, 2, 1.0), torch.ones(2), torch.tensor([1.0, 0.01]), rate=0.9, max_norm=0.2
    )
    assert ok.all()
    assert torch.allclose(norms[:, 0], torch.tensor(0.2), rtol=1e-4)
    assert (norms[:, 1] < 0.2).all()
    for name, x in new.parts():
        assert x[0].norm().item() == pytest.approx(0.2 * tail.norm[name], rel=1e-4)


def test_update_of_a_zero_gradient_is_finite(oracle: Oracle) -> None:
    tail = tail_of(oracle)
    new, ok, _ = step(tail, Delta.zeros(tail, 1), Delta.zeros(tail, 1), torch.ones(1), torch.ones(1))
    assert ok.all()
    assert all(not x.any() for x in new.tensors())


def test_orthogonalise_is_the_oracles() -> None:
    for shape in ((3, 96, 16), (3, 16, 96)):
        g = draw(5, *shape)
        for found, one in zip(orthogonalise(g), g, strict=True):
            assert torch.allclose(found, newton_schulz(one), atol=1e-5)
