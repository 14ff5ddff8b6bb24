"""The step over several layers, beside float64 autograd of the whole tail on tiny random models of each architecture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from vllm_ttt.config import parse_config
from vllm_ttt.eval.deep_oracle import KV, DeepOracle, LayerWeights, stack_nll
from vllm_ttt.eval.tiny import ARCHITECTURES, tiny_model
from vllm_ttt.worker.attention import Layout, SDPAAttention
from vllm_ttt.worker.block import Block
from vllm_ttt.worker.micro_step import MODULES, Delta, Tail, accumulate, update
from vllm_ttt.worker.qkv import QKV, HeadNorm, Past
from vllm_ttt.worker.scaled import STRIDE, stacked_losses

pytestmark = pytest.mark.unit

RANK = 16
#: Of each session of a batch: pairs of its chunk, and tokens before it.
ROWS, PASTS = (40, 7, 23), (0, 1, 700)
LAYERS = (1, 2, 4)


def tail_of(oracle: DeepOracle, dtype: torch.dtype = torch.float32) -> Tail:
    """The step's weights, from those of the oracle."""
    stack, A = oracle.stack, oracle.A
    to = lambda x: x.to(dtype)  # noqa: E731

    def block(layer: LayerWeights, norm: dict[str, float]) -> dict[str, Any]:
        gate_up = torch.cat((layer.g, layer.u))
        weights = {"wo_DQ": to(layer.o), "wgu_2FD": to(gate_up), "wd_DF": to(layer.d), "ln_D": layer.norm_mlp.float()}
        return {**weights, "eps": stack.eps, "norm": norm}

    def qkv(layer: LayerWeights) -> QKV:
        biases = [x for x in (layer.q_bias, layer.k_bias, layer.v_bias) if x is not None]
        table = torch.cat([x[:, : stack.E // 2] for x in stack.turns], 1)
        weight = torch.cat((layer.q, layer.k, layer.v)).to(dtype)
        heads, kv_heads = layer.q.shape[0] // stack.E, layer.k.shape[0] // stack.E
        q_norm, k_norm = (None if x is None else HeadNorm(x.float(), stack.eps) for x in (layer.q_norm, layer.k_norm))
        return QKV(
            weight, layer.norm_attention.float(), stack.eps, heads, kv_heads, stack.E**-0.5, table.to(dtype),
            torch.cat(biases).float() if biases else None, q_norm, k_norm,
        )  # fmt: skip

    blocks = [block(layer, norm) for layer, norm in zip(stack.layers, oracle.norms, strict=True)]
    return Tail(
        **blocks[-1], head_VD=stack.head.to(dtype), lnf_D=stack.norm_final.float(), eps_f=stack.eps,
        ao_RQ=A["o"].to(dtype), ai_RD=A["g"].to(dtype), ad_RF=A["d"].to(dtype),
        lower=tuple(Block(**b) for b in blocks[:-1]), attentions=tuple(qkv(layer) for layer in stack.layers[1:]),
    )  # fmt: skip


@dataclass
class Batch:
    """Chunks of three requests, as the step takes them and as the oracle does."""

    h: Tensor
    a: Tensor
    t: Tensor
    w: Tensor
    past: Past
    each: list[tuple[Tensor, Tensor, Tensor, list[KV]]]

    def rows(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.h, self.a, self.t, self.w


def batch_of(oracle: DeepOracle, dtype: torch.dtype = torch.float32) -> Batch:
    """Rows after the end of a chunk are copies of its first, at weight 0."""
    S, C = len(ROWS), max(ROWS)
    each, h, a = [], [], []
    t, w, positions = torch.zeros(S, C, dtype=torch.int64), torch.zeros(S, C), torch.zeros(S, C, dtype=torch.int64)
    for s, (n, past) in enumerate(zip(ROWS, PASTS, strict=True)):
        ids = torch.randint(320, (past + n + 1,), generator=torch.Generator().manual_seed(s)).tolist()
        with torch.no_grad():
            _, kv = oracle.served(ids)
        hs, as_ = (x[past : past + n] for x in oracle.activations(ids))
        each.append((hs, as_, torch.tensor(ids[past + 1 :]), [(k[:past], v[:past]) for k, v in kv]))
        pad = lambda x, n=n: torch.cat((x, x[:1].expand(C - n, -1))).to(dtype)  # noqa: E731
        h.append(pad(hs))
        a.append(pad(as_))
        t[s, :n], w[s, :n], positions[s] = each[-1][2], 1 / n, torch.arange(past, past + C)
    layers = range(len(oracle.stack.layers) - 1)
    keys, values = ([torch.cat([e[3][i][j] for e in each]).flatten(1).to(dtype) for i in layers] for j in (0, 1))
    heads = oracle.stack.layers[0].k.shape[0] // oracle.stack.E
    past = Past(Layout.of(PASTS, C), positions.flatten(), torch.arange(sum(PASTS)), keys, values, heads)
    return Batch(torch.stack(h), torch.stack(a), t, w, past, each)


@pytest.fixture(scope="module", params=[(a, k) for a in ARCHITECTURES for k in LAYERS], ids=lambda p: f"{p[0]}-{p[1]}")
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DeepOracle:
    architecture, layers = request.param
    shape: dict[str, Any] = {"num_hidden_layers": 5, "max_position_embeddings": 1024}
    folder = tiny_model(architecture, tmp_path_factory.mktemp(f"{architecture}-{layers}"), **shape)
    config = parse_config({"adapt": {"layers": layers, "rank": RANK}, "learn": {"max_loss": 2}}, "deep")
    return DeepOracle(folder, config, dtype=torch.float64, compute_dtype=torch.float64)


@pytest.fixture(scope="module")
def batch(oracle: DeepOracle) -> Batch:
    return batch_of(oracle)


def random_deltas(tail: Tail, scale: float, seed: int = 50) -> Delta:
    draw = lambda i, shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) * scale  # noqa: E731
    return Delta(*(draw(i, x.shape) for i, x in enumerate(Delta.zeros(tail, len(ROWS)).tensors())))


def of_session(delta: Delta, s: int) -> list[dict[str, Tensor]]:
    return [{name: x[s] for name, x in layer.parts()} for layer in delta.layers()]


def autograd(oracle: DeepOracle, delta: Delta, batch: Batch, s: int) -> tuple[float, list[Tensor]]:
    B = [{k: x.double().requires_grad_() for k, x in layer.items()} for layer in of_session(delta, s)]
    h, a, targets, past = batch.each[s]
    loss = stack_nll(oracle.stack, oracle.A, B, h, a, targets, past)[0].mean()
    return loss.item(), list(torch.autograd.grad(loss, [x for layer in B for x in layer.values()]))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference-mode"])
@pytest.mark.parametrize("scale", [0.0, 0.05], ids=["fresh", "learned"])
def test_gradient(oracle: DeepOracle, batch: Batch, scale: float, inference: bool) -> None:
    """Of three sessions at once, with pasts of 0, 1 and 700 tokens; as the worker's hooks run, too."""
    tail = tail_of(oracle)
    delta, grad = random_deltas(tail, scale), Delta.zeros(tail, len(ROWS))
    with torch.inference_mode(inference):
        h, a, t, w = (x.clone() for x in batch.rows())
        past = replace(batch.past, layout=Layout.of(PASTS, max(ROWS)), positions_T=batch.past.positions_T.clone())
        losses = accumulate(tail, delta, h, a, t, w, grad, past)
        assert torch.allclose(accumulate(tail, delta, *batch.rows(), None, batch.past), losses, atol=1e-6)
    for s in range(len(ROWS)):
        loss, expected = autograd(oracle, delta, batch, s)
        assert losses[s].item() == pytest.approx(loss, abs=1e-5)
        found = [x for layer in of_session(grad, s) for x in layer.values()]
        for one, other in zip(found, expected, strict=True):
            assert relative(one, other) < 1e-4


def test_past_matters(oracle: DeepOracle, batch: Batch) -> None:
    """A wrong past would be noticed: without it the loss is another, and so is the gradient of every layer but the last."""
    if len(oracle.stack.layers) == 1:
        return
    tail = tail_of(oracle)
    delta = random_deltas(tail, 0.05)
    right, wrong = Delta.zeros(tail, len(ROWS)), Delta.zeros(tail, len(ROWS))
    loss = accumulate(tail, delta, *batch.rows(), right, batch.past)
    other = replace(batch.past, keys=[-x for x in batch.past.keys], values=[-x for x in batch.past.values])
    lost = accumulate(tail, delta, *batch.rows(), wrong, other)
    assert abs(loss[0] - lost[0]) < 1e-6
    assert (loss[1:] - lost[1:]).abs().min() > 1e-4
    assert relative(wrong.layer(0).o[2], right.layer(0).o[2]) > 0.01


def test_a_past_that_is_filled_up_changes_nothing(oracle: DeepOracle, batch: Batch) -> None:
    """As a CUDA graph needs it: the same shapes whatever the lengths are."""
    tail = tail_of(oracle)
    delta, room = random_deltas(tail, 0.05), sum(PASTS) + 50
    source = torch.cat((batch.past.source_P, torch.zeros(50, dtype=torch.int64)))
    wide = replace(batch.past, layout=Layout.of(PASTS, max(ROWS), room), source_P=source)
    one, other = Delta.zeros(tail, len(ROWS)), Delta.zeros(tail, len(ROWS))
    loss = accumulate(tail, delta, *batch.rows(), one, batch.past)
    torch.testing.assert_close(accumulate(tail, delta, *batch.rows(), other, wide), loss)
    for x, y in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(x, y)


def test_losses_under_a_scale_are_those_of_a_scaled_delta(oracle: DeepOracle, batch: Batch) -> None:
    """All scales in one batch, under the past as it was served."""
    tail, scales = tail_of(oracle), torch.tensor([0.0, 0.5, 1.25])
    delta, past, K, S = random_deltas(tail, 0.05), batch.past, 3, len(ROWS)
    source = [x for part in past.source_P.split(PASTS) for x in [part] * K]
    positions = past.positions_T.view(S, -1).repeat_interleave(K, 0).flatten()
    lengths = [p for p in PASTS for _ in range(K)]
    many = replace(past, layout=Layout.of(lengths, max(ROWS)), positions_T=positions, source_P=torch.cat(source))
    weight = batch.w.clone()
    weight[:, 1::STRIDE] = 0
    found = stacked_losses(tail, delta, scales, batch.h, batch.a, batch.t, weight, many)
    for k, scale in enumerate(scales.tolist()):
        expected = accumulate(tail, delta.times(scale), batch.h, batch.a, batch.t, weight, None, past)
        torch.testing.assert_close(found[:, k], expected, atol=1e-5, rtol=1e-4)
    assert float((found[:, 0] - found[:, 2]).abs().min()) > 1e-4, "the delta does nothing: the comparison would prove nothing"


def test_sessions_do_not_meet(oracle: DeepOracle, batch: Batch) -> None:
    """What is not finite in one session never reaches another, forward or backward."""
    tail = tail_of(oracle)
    delta, grad = random_deltas(tail, 0.05), Delta.zeros(tail, len(ROWS))
    h = batch.h.clone()
    h[1] = torch.nan
    losses = accumulate(tail, delta, h, *batch.rows()[1:], grad, batch.past)
    assert not losses[1].isfinite()
    assert losses[[0, 2]].isfinite().all()
    assert all(x[[0, 2]].isfinite().all() for x in grad.tensors())


def test_update_is_the_oracles_step(oracle: DeepOracle, batch: Batch) -> None:
    """Three chunks one after another on each session: the same B in every layer and module."""
    tail = tail_of(oracle)
    master, share, norms = Delta.zeros(tail, len(ROWS)), torch.tensor([n / 256 for n in ROWS]), torch.zeros(())
    for _ in range(3):
        grad = Delta.zeros(tail, len(ROWS))
        loss = accumulate(tail, master, *batch.rows(), grad, batch.past)
        master, ok, norms = update(tail, master, grad, loss, share, 0.016, 0.015, 0.35, 100.0)
        assert ok.all()
    for s in range(len(ROWS)):
        oracle.reset()
        h, a, targets, kv = batch.each[s]
        for _ in range(3):
            oracle.step(h, a, targets, kv)
        for found, expected in zip(of_session(master, s), oracle.B, strict=True):
            for name in MODULES:
                assert relative(found[name], expected[name]) < 2e-3
        largest = [max(b[k].norm().item() / n[k] for b, n in zip(oracle.B, oracle.norms, strict=True)) for k in MODULES]
        assert norms[:, s].tolist() == pytest.approx(largest, rel=2e-3)


def test_bfloat16_is_near(oracle: DeepOracle, batch: Batch) -> None:
    """In the dtype that models are served in, the gradient points where it should."""
    exact, tail = tail_of(oracle), tail_of(oracle, torch.bfloat16)
    delta = random_deltas(exact, 0.05)
    grads = Delta.zeros(exact, len(ROWS)), Delta.zeros(exact, len(ROWS))
    accumulate(exact, delta, *batch.rows(), grads[0], batch.past)
    half = batch_of(oracle, torch.bfloat16)
    accumulate(tail, delta.to(torch.bfloat16), *half.rows(), grads[1], half.past)
    for one, other in zip(grads[0].tensors(), grads[1].tensors(), strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.97


def test_layout_packs_each_session_after_its_past() -> None:
    layout = Layout.of([2, 0], 3)
    assert layout.order_U.tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert Layout.of([1, 2], 2).order_U.tolist() == [0, 3, 4, 1, 2, 5, 6]
    assert Layout.of([1, 2], 2, room=5).order_U.tolist() == [0, 5, 6, 1, 2, 7, 8, 0, 0]
    assert layout.own_T.tolist() == [2, 3, 4, 5, 6, 7]
    assert layout.starts_q.tolist() == [0, 3, 6]
    assert layout.starts_k.tolist() == [0, 5, 8]
    assert (layout.longest, Layout.of([2, 0], 3, room=9).longest) == (5, 12)


def test_a_query_sees_its_past_and_what_comes_before_it() -> None:
    """By brute force, with groups of heads; and the gradient is that of the chunk's own keys alone."""
    S, C, H, G, E = 2, 5, 4, 2, 8
    draw = lambda seed, *shape: torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()  # noqa: E731
    lengths = [3, 0]
    q, k, v = draw(1, S * C, H, E), draw(2, S * C, G, E), draw(3, S * C, G, E)
    past = draw(4, 3, G, E), draw(5, 3, G, E)
    kernel, d = SDPAAttention(), draw(6, S * C, H, E)
    saved = kernel.forward((q, k, v), past, Layout.of(lengths, C), 0.3, True)
    found = kernel.backward(saved, d)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    rows = []
    for s, c, h in ((s, c, h) for s in range(S) for c in range(C) for h in range(H)):
        before = [past[i][sum(lengths[:s]) : sum(lengths[: s + 1]), h // 2] for i in (0, 1)]
        keys, values = (torch.cat((b, x[s * C : s * C + c + 1, h // 2])) for b, x in zip(before, own[1:], strict=True))
        rows.append((0.3 * keys @ own[0][s * C + c, h]).softmax(0) @ values)
    expected = torch.stack(rows).view(S * C, H, E)
    assert torch.allclose(saved.out_THE, expected)
    for one, other in zip(found, torch.autograd.grad(expected, own, d), strict=True):
        assert torch.allclose(one, other)
