"""The step that is written by hand, beside float64 autograd on tiny random models of each architecture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, silu

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.eval.oracle import KV, LayerWeights, Oracle, _attention, projection, rms_norm, stack_logits, stack_nll
from vllm_ttt.eval.tiny import ARCHITECTURES, tiny_model
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.step import loss as losses_of
from vllm_ttt.worker.step.attention import CudnnAttention, Layout, SDPAAttention, VarlenAttention, available, choose
from vllm_ttt.worker.step.block import Block
from vllm_ttt.worker.step.micro_step import Tail, accumulate
from vllm_ttt.worker.step.qkv import QKV, HeadNorm, Past

pytestmark = pytest.mark.unit

RANK = 16
#: Of each session of a batch: pairs of its chunk, and tokens before it.
ROWS, PASTS = (40, 7, 23), (0, 1, 700)
LAYERS = (1, 2, "all")
#: What is adapted: the default, everything, and what leaves out the modules that write to, or read from, the residual stream.
SUBSETS = (("o_proj", "down_proj"), ("o_proj", "gate_up_proj", "down_proj"), ("down_proj",), ("gate_up_proj",))
EVERYTHING = SUBSETS[1]


def config_of(layers: int | str, modules: tuple[str, ...] = EVERYTHING, **learn: Any) -> TTTConfig:
    adapt = {"layers": layers, "modules": modules, "rank": RANK}
    return parse_config({"adapt": adapt, "learn": {"max_loss": 2, **learn}}, "deep")


def tail_of(oracle: Oracle, dtype: torch.dtype = torch.float32, **more: Any) -> Tail:
    """The step's weights, from those of the oracle."""
    stack = oracle.stack
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

    adapt, lowest, embedding = oracle.config.adapt, stack.layers[0], None
    if oracle.first == 0:  # as the engine does: the step begins at the embedding
        embedding = oracle.model.model.embed_tokens.weight.data.to(dtype)
    drawn = (projection(getattr(lowest, k).shape[1], adapt.rank, adapt.seed).to(dtype) for k in "ogd")
    blocks = [block(layer, norm) for layer, norm in zip(stack.layers, oracle.norms, strict=True)]
    return Tail(
        **blocks[-1], modules=adapt.letters, head_VD=stack.head.to(dtype), lnf_D=stack.norm_final.float(), eps_f=stack.eps,
        **dict(zip(("ao_RQ", "ai_RD", "ad_RF"), drawn, strict=True)),
        lower=tuple(Block(**b) for b in blocks[:-1]),
        attentions=tuple(qkv(layer) for layer in stack.layers[embedding is None :]),
        embedding_VD=embedding, **more,
    )  # fmt: skip


def joined(tail: Tail) -> Tail:
    """With A below each weight that has a delta, as on CUDA."""
    thin = {key: a for key, a in (("o", tail.ao_RQ), ("d", tail.ad_RF)) if key in tail.modules}

    def own(block: Block | Tail) -> dict[str, Tensor]:
        return {key: torch.cat((block.wo_DQ if key == "o" else block.wd_DF, a)) for key, a in thin.items()}

    return replace(tail, joined=own(tail), lower=tuple(replace(b, joined=own(b)) for b in tail.lower))


@dataclass
class Kept:
    """What stands for vLLM's cache: keys and values [slots, G, E] of each layer whose attention the step computes."""

    keys: list[Tensor]
    values: list[Tensor]

    def read(self, layer: int, slots_P: Tensor) -> tuple[Tensor, Tensor]:
        return self.keys[layer].index_select(0, slots_P), self.values[layer].index_select(0, slots_P)

    def map(self, change: Callable[[Tensor], Tensor]) -> Kept:
        return Kept([change(x) for x in self.keys], [change(x) for x in self.values])


@dataclass
class Batch:
    """Chunks of three requests, as the step takes them and as the oracle does. ``a`` is None at full depth."""

    h: Tensor
    a: Tensor | None
    t: Tensor
    w: Tensor
    past: Past
    each: list[tuple[Tensor, Tensor, Tensor, list[KV]]]

    def rows(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        return self.h, self.a, self.t, self.w


def batch_of(oracle: Oracle, dtype: torch.dtype = torch.float32, seed: int = 0) -> Batch:
    """Rows after the end of a chunk are copies of its first, at weight 0."""
    S, C, stack = len(ROWS), max(ROWS), oracle.stack
    each, served, h, a = [], [], [], []
    t, w, positions = torch.zeros(S, C, dtype=torch.int64), torch.zeros(S, C), torch.zeros(S, C, dtype=torch.int64)
    for s, (n, past) in enumerate(zip(ROWS, PASTS, strict=True)):
        ids = torch.randint(320, (past + n + 1,), generator=torch.Generator().manual_seed(seed + s)).tolist()
        with torch.no_grad():
            _, kv = oracle.served(ids)
            if oracle.first == 0:
                x = rms_norm(oracle.activations(ids)[0][:-1], stack.layers[0].norm_attention, stack.eps)
                kv = [_attention(stack, stack.layers[0], x, oracle.nothing()[0])[1], *kv]
        served.append([(k[:past], v[:past]) for k, v in kv])
        hs, as_ = (x[past : past + n] for x in oracle.activations(ids))
        each.append((hs, as_, torch.tensor(ids[past + 1 :]), served[-1][oracle.first == 0 :]))
        pad = lambda x, n=n: torch.cat((x, x[:1].expand(C - n, -1))).to(dtype)  # noqa: E731
        h.append(pad(hs))
        a.append(pad(as_))
        t[s, :n], w[s, :n], positions[s] = each[-1][2], 1 / n, torch.arange(past, past + C)
    layers = range(len(served[0]))
    keys, values = ([torch.cat([kv[i][j] for kv in served]).to(dtype) for i in layers] for j in (0, 1))
    past = Past(Layout.of(PASTS, C), positions.flatten(), torch.arange(sum(PASTS)), Kept(keys, values))
    return Batch(torch.stack(h), torch.stack(a) if oracle.first else None, t, w, past, each)


@pytest.fixture(scope="module", params=[(a, k) for a in ARCHITECTURES for k in LAYERS], ids=lambda p: f"{p[0]}-{p[1]}")
def oracle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    architecture, layers = request.param
    shape: dict[str, Any] = {"num_hidden_layers": 3, "max_position_embeddings": 1024}
    folder = tiny_model(architecture, tmp_path_factory.mktemp(f"{architecture}-{layers}"), **shape)
    return Oracle(folder, config_of(layers), dtype=torch.float64, compute_dtype=torch.float64)


@pytest.fixture(scope="module")
def batch(oracle: Oracle) -> Batch:
    return batch_of(oracle)


def of_modules(oracle: Oracle, modules: tuple[str, ...]) -> Oracle:
    """Of the same layers of the same model."""
    config = config_of(oracle.config.adapt.layers, modules)
    return Oracle(oracle.model, config, compute_dtype=torch.float64)


def random_deltas(tail: Tail, scale: float, seed: int = 50) -> Delta:
    draw = lambda i, shape: torch.randn(shape, generator=torch.Generator().manual_seed(seed + i)) * scale  # noqa: E731
    zeros = tail.zeros(len(ROWS))
    return zeros.by(*(draw(i, x.shape) for i, x in enumerate(zeros.tensors())))


def of_session(delta: Delta, s: int) -> list[dict[str, Tensor]]:
    """As the oracle has B."""
    parts, count = [(name, x[s]) for name, x in delta.parts()], len(delta.modules)
    return [dict(parts[i : i + count]) for i in range(0, len(parts), count)]


def autograd(oracle: Oracle, delta: Delta, batch: Batch, s: int) -> tuple[float, list[Tensor]]:
    B = [{k: x.double().requires_grad_() for k, x in layer.items()} for layer in of_session(delta, s)]
    h, a, targets, past = batch.each[s]
    loss = stack_nll(oracle.stack, oracle.A, B, h, a, targets, past)[0].mean()
    return loss.item(), list(torch.autograd.grad(loss, [x for layer in B for x in layer.values()]))


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("inference", [False, True], ids=["plain", "inference-mode"])
@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_gradient(oracle: Oracle, batch: Batch, modules: tuple[str, ...], inference: bool) -> None:
    """Of three sessions at once, with pasts of 0, 1 and 700 tokens, fresh and learned; as the worker's hooks run, too."""
    oracle = of_modules(oracle, modules)
    tail = tail_of(oracle)
    for scale in (0.0, 0.05):
        delta, grad = random_deltas(tail, scale), tail.zeros(len(ROWS))
        with torch.inference_mode(inference):
            h, a, t, w = (None if x is None else x.clone() for x in batch.rows())
            assert h is not None and t is not None and w is not None  # noqa: PT018
            past = replace(batch.past, layout=Layout.of(PASTS, max(ROWS)), positions_T=batch.past.positions_T.clone())
            losses = accumulate(tail, delta, h, a, t, w, grad, past)
            assert torch.allclose(accumulate(tail, delta, *batch.rows(), None, batch.past), losses, atol=1e-6)
        for s in range(len(ROWS)):
            loss, expected = autograd(oracle, delta, batch, s)
            assert losses[s].item() == pytest.approx(loss, abs=1e-5)
            found = [x for layer in of_session(grad, s) for x in layer.values()]
            for one, other in zip(found, expected, strict=True):
                assert relative(one, other) < 1e-4


def test_what_is_said_of_each_row(oracle: Oracle, batch: Batch) -> None:
    """Its loss, and that of the model's first choice; with a gradient, which is made where the logits were, and without."""
    tail = tail_of(oracle)
    delta, rows = random_deltas(tail, 0.05), torch.zeros(2, 2, len(ROWS), max(ROWS))
    accumulate(tail, delta, *batch.rows(), None, batch.past, rows[0])
    accumulate(tail, delta, *batch.rows(), tail.zeros(len(ROWS)), batch.past, rows[1])
    for s, n in enumerate(ROWS):
        h, a, targets, past = batch.each[s]
        B = [{k: x.double() for k, x in layer.items()} for layer in of_session(delta, s)]
        x = stack_logits(oracle.stack, oracle.A, B, h, a, past)[0].log_softmax(-1)
        for losses, tops in rows:
            assert torch.allclose(n * losses[s, :n].double(), -x.gather(1, targets[:, None])[:, 0], atol=1e-4)
            assert torch.allclose(tops[s, :n].double(), -x.amax(-1), atol=1e-4)


def test_past_matters(oracle: Oracle, batch: Batch) -> None:
    """A wrong past would be noticed: without it the loss is another, and so is the gradient of every layer but the last."""
    if len(oracle.stack.layers) == 1:
        return
    tail = tail_of(oracle)
    delta = random_deltas(tail, 0.05)
    right, wrong = tail.zeros(len(ROWS)), tail.zeros(len(ROWS))
    loss = accumulate(tail, delta, *batch.rows(), right, batch.past)
    assert isinstance(batch.past.cache, Kept)
    other = replace(batch.past, cache=batch.past.cache.map(torch.neg))
    lost = accumulate(tail, delta, *batch.rows(), wrong, other)
    assert abs(loss[0] - lost[0]) < 1e-6
    assert (loss[1:] - lost[1:]).abs().min() > 1e-4
    assert relative(of_session(wrong, 2)[0]["o"], of_session(right, 2)[0]["o"]) > 0.01


def test_a_past_that_is_filled_up_changes_nothing(oracle: Oracle, batch: Batch) -> None:
    """As a CUDA graph needs it: the same shapes whatever the lengths are."""
    tail = tail_of(oracle)
    delta, room = random_deltas(tail, 0.05), sum(PASTS) + 50
    source = torch.cat((batch.past.source_P, torch.zeros(50, dtype=torch.int64)))
    wide = replace(batch.past, layout=Layout.of(PASTS, max(ROWS), room), source_P=source)
    one, other = tail.zeros(len(ROWS)), tail.zeros(len(ROWS))
    loss = accumulate(tail, delta, *batch.rows(), one, batch.past)
    torch.testing.assert_close(accumulate(tail, delta, *batch.rows(), other, wide), loss)
    for x, y in zip(one.tensors(), other.tensors(), strict=True):
        torch.testing.assert_close(x, y)


def test_sessions_do_not_meet(oracle: Oracle, batch: Batch) -> None:
    """What is not finite in one session never reaches another, forward or backward."""
    tail = tail_of(oracle)
    delta, grad = random_deltas(tail, 0.05), tail.zeros(len(ROWS))
    h = batch.h.clone()
    h[1] = torch.nan
    losses = accumulate(tail, delta, h, *batch.rows()[1:], grad, batch.past)
    assert not losses[1].isfinite()
    assert losses[[0, 2]].isfinite().all()
    assert all(x[[0, 2]].isfinite().all() for x in grad.tensors())


def test_bfloat16_is_near(oracle: Oracle, batch: Batch) -> None:
    """In the dtype that models are served in, the gradient points where it should."""
    exact, tail = tail_of(oracle), tail_of(oracle, torch.bfloat16)
    delta, expected = random_deltas(exact, 0.05), exact.zeros(len(ROWS))
    accumulate(exact, delta, *batch.rows(), expected, batch.past)
    half = batch_of(oracle, torch.bfloat16)
    for kind in (tail, joined(tail)):
        found = exact.zeros(len(ROWS))
        accumulate(kind, delta.to(torch.bfloat16), *half.rows(), found, half.past)
        for one, other in zip(expected.tensors(), found.tensors(), strict=True):
            assert torch.cosine_similarity(one.flatten(), other.flatten(), 0) > 0.97


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_one_product_for_a_weight_and_what_lies_below_it(oracle: Oracle, batch: Batch, modules: tuple[str, ...]) -> None:
    tail, found = tail_of(of_modules(oracle, modules)), []
    delta = random_deltas(tail, 0.05)
    for one in (tail, joined(tail)):
        grad = one.zeros(len(ROWS))
        found.append((accumulate(one, delta, *batch.rows(), grad, batch.past), *grad.tensors()))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_loss_tiles(oracle: Oracle, batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of logits are bounded: more rows than fit give the same."""
    delta, results = random_deltas(tail_of(oracle), 0.05), []
    for size in (256, 11):
        monkeypatch.setattr(losses_of, "LOSS_ROWS", size)
        tail = tail_of(oracle)
        tail.softmax_rows = min(tail.softmax_rows, 5)
        grad = tail.zeros(len(ROWS))
        results.append((accumulate(tail, delta, *batch.rows(), grad, batch.past), *grad.tensors()))
    for whole, tiled in zip(*results, strict=True):
        assert torch.allclose(whole, tiled, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
@pytest.mark.parametrize("case", ["biases", "scale", "cap"])
def test_what_some_models_add(tmp_path: Path, case: str, modules: tuple[str, ...]) -> None:
    """Frozen biases after o_proj, gate, up and down; a scale of the logits; a soft cap on them."""
    folder = tiny_model("llama", tmp_path, max_position_embeddings=1024)
    oracle = Oracle(folder, config_of(1, modules), dtype=torch.float64, compute_dtype=torch.float64)
    D, F = oracle.stack.layers[-1].d.shape
    draw = lambda seed, n: torch.randn(n, generator=torch.Generator().manual_seed(seed)) * 0.3  # noqa: E731
    biases: dict[str, Any] = {"bo_D": draw(1, D), "bgu_2F": draw(2, 2 * F), "bd_D": draw(3, D)}
    tail, batch = tail_of(oracle, **(biases if case == "biases" else {})), batch_of(oracle)
    tail.logit_scale, tail.soft_cap = 0.7 if case == "scale" else 1.0, 3.0 if case == "cap" else None
    delta, grad = random_deltas(tail, 0.05), tail.zeros(len(ROWS))
    losses = accumulate(tail, delta, *batch.rows(), grad)
    for s in range(len(ROWS)):
        (B,) = [{name: x.double().requires_grad_() for name, x in layer.items()} for layer in of_session(delta, s)]
        loss = general_loss(tail, oracle, B, *batch.each[s][:3])
        assert losses[s].item() == pytest.approx(loss.item(), abs=1e-5)
        assert abs(loss.item() - autograd(oracle, delta, batch, s)[0]) > 1e-4, "it must matter"
        (found,) = of_session(grad, s)
        for (name, one), other in zip(found.items(), torch.autograd.grad(loss, list(B.values())), strict=True):
            assert relative(one, other) < 1e-5, name


def general_loss(tail: Tail, oracle: Oracle, B: dict[str, Tensor], h: Tensor, a: Tensor, t: Tensor) -> Tensor:
    """`stack_nll` of one layer, with what it leaves out, float64."""
    stack, layer, none = oracle.stack, oracle.stack.layers[-1], torch.zeros(())
    bg, bu = (none, none) if tail.bgu_2F is None else tail.bgu_2F.double().chunk(2)
    bias = {"o": tail.bo_D, "g": bg, "u": bu, "d": tail.bd_D}

    def linear(x: Tensor, key: str) -> Tensor:
        b, y = bias[key], x @ getattr(layer, key).T
        y = y + (x @ oracle.A[key].T) @ B[key].T if key in B else y
        return y if b is None else y + b.double()

    r = h + linear(a, "o")
    x = rms_norm(r, layer.norm_mlp, stack.eps)
    r = r + linear(silu(linear(x, "g")) * linear(x, "u"), "d")
    logits = rms_norm(r, stack.norm_final, stack.eps) @ stack.head.T
    if tail.soft_cap is not None:
        logits = tail.soft_cap * torch.tanh(logits / tail.soft_cap)
    return cross_entropy(logits * tail.logit_scale, t)


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
    layout = Layout.of(lengths, C)
    out, saved = kernel.forward((q, k, v), past, layout, 0.3)
    found = kernel.backward((q, k, v), past, layout, 0.3, d, saved)
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    rows = []
    for s, c, h in ((s, c, h) for s in range(S) for c in range(C) for h in range(H)):
        before = [past[i][sum(lengths[:s]) : sum(lengths[: s + 1]), h // 2] for i in (0, 1)]
        keys, values = (torch.cat((b, x[s * C : s * C + c + 1, h // 2])) for b, x in zip(before, own[1:], strict=True))
        rows.append((0.3 * keys @ own[0][s * C + c, h]).softmax(0) @ values)
    expected = torch.stack(rows).view(S * C, H, E)
    assert torch.allclose(out, expected)
    for one, other in zip(found, torch.autograd.grad(expected, own, d), strict=True):
        assert torch.allclose(one, other)


def test_torchs_flash_attention_is_asked_as_it_wants_to_be() -> None:
    """Its ops are torch's own affair: where their arguments are others, the step takes the reference."""
    for op, arguments in (
        (torch.ops.aten._flash_attention_forward, VarlenAttention.FORWARD),
        (torch.ops.aten._flash_attention_backward, VarlenAttention.BACKWARD),
        (torch.ops.aten._scaled_dot_product_cudnn_attention, CudnnAttention.DENSE),
        (torch.ops.aten._scaled_dot_product_cudnn_attention_backward, CudnnAttention.DENSE_BACKWARD),
    ):
        schema = op.default._schema  # pyright: ignore[reportAttributeAccessIssue]
        assert [x.name for x in schema.arguments if not x.kwarg_only] == arguments.split()
        assert "scale" in [x.name for x in schema.arguments]
    assert type(choose(torch.device("cpu"), torch.bfloat16)) is SDPAAttention
    assert [x.name for x in available(torch.device("cpu"), torch.bfloat16)] == ["sdpa"]
