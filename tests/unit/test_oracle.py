"""The oracle: is its tail the model's own, is its step the one of docs/algorithm.md, does it reproduce its curves?"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.oracle import Oracle, load_model, newton_schulz, projection, tail_loss
from vllm_ttt.eval.protocols import plan, run
from vllm_ttt.eval.texts import encode, read_texts
from vllm_ttt.eval.tiny import ARCHITECTURES, tiny_model

pytestmark = pytest.mark.unit

DEMO = Path(__file__).parents[2] / "demo"
GOLDEN = Path(__file__).with_name("test_oracle_golden.json")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_model(name, root / name) for name in ARCHITECTURES}


def config(**learn: float) -> TTTConfig:
    """Served with the delta as it is: what is looked at here is the step."""
    return TTTConfig.model_validate({"adapt": {"rank": 16}, "learn": {"max_loss": 2, "scales": [1], **learn}})


def tokens(n: int, seed: int = 1) -> list[int]:
    return torch.randint(320, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def model_nll(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_tail_is_the_models_own(tiny: dict[str, Path], architecture: str):
    """Before learning, and after it: with W + B A written into the model's weights, the model's NLL is the oracle's."""
    oracle = Oracle(tiny[architecture], config(), dtype=torch.float64, compute_dtype=torch.float64)
    ids = tokens(300)
    before = oracle.score(ids)
    assert torch.allclose(before, model_nll(oracle.model, ids), atol=1e-5)

    oracle.learn(ids)
    merged: Any = load_model(tiny[architecture], torch.float64)
    layer = merged.model.layers[-1]
    names = {"o": layer.self_attn.o_proj, "g": layer.mlp.gate_proj, "u": layer.mlp.up_proj, "d": layer.mlp.down_proj}
    for key, linear in names.items():
        linear.weight += oracle.B[key] @ oracle.A[key]
    after = oracle.score(ids)
    assert torch.allclose(after, model_nll(merged, ids), atol=1e-5)
    assert after.mean() < before.mean() - 0.05, "learning a text must make it more probable"
    assert torch.equal(model_nll(oracle.model, ids), model_nll(load_model(tiny[architecture], torch.float64), ids))


def test_gradient_agrees_with_finite_differences(tiny: dict[str, Path]):
    oracle = Oracle(tiny["qwen3"], config(), dtype=torch.float64, compute_dtype=torch.float64)
    ids = tokens(20)
    oracle.learn(tokens(64, seed=3))
    h, a = oracle.activations(ids)
    rows = h[:-1], a[:-1], torch.tensor(ids[1:])
    B = {k: v.clone().requires_grad_() for k, v in oracle.B.items()}
    grads = torch.autograd.grad(tail_loss(oracle.weights, oracle.A, B, *rows), list(B.values()))
    for key, gradient in zip(B, grads, strict=True):
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1e-5
        up, down = ({**oracle.B, key: oracle.B[key] + sign * step} for sign in (1, -1))
        change = tail_loss(oracle.weights, oracle.A, up, *rows) - tail_loss(oracle.weights, oracle.A, down, *rows)
        assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-4)


def test_first_step_has_the_length_that_the_rate_says(tiny: dict[str, Path]):
    oracle = Oracle(tiny["llama"], config())
    ids = tokens(257)
    assert oracle.learn(ids) == pytest.approx([oracle_mean(tiny["llama"], ids)], rel=1e-4)
    for key, delta in oracle.B.items():
        assert delta.norm().item() == pytest.approx(0.032 * oracle.norms[key], rel=1e-4)
    assert oracle.version == 1


def oracle_mean(folder: Path, ids: list[int]) -> float:
    return model_nll(load_model(folder), ids).mean().item()


def test_decay_and_short_remainder(tiny: dict[str, Path]):
    """A chunk of n < 256 uses decay * n / 256 and rate * n / 256; under min_chunk nothing is learned."""
    oracle = Oracle(tiny["llama"], config(decay=0.5))
    oracle.learn(tokens(257))
    before = {k: v.clone() for k, v in oracle.B.items()}
    oracle.learn(tokens(65, seed=2))
    for key, old in before.items():
        moved = oracle.B[key] - (1 - 0.5 / 4) * old
        assert moved.norm().item() == pytest.approx(0.032 / 4 * oracle.norms[key], rel=1e-4)
    kept = {k: v.clone() for k, v in oracle.B.items()}
    assert oracle.learn(tokens(8, seed=4)) == []
    assert all(torch.equal(oracle.B[k], kept[k]) for k in kept)
    assert oracle.version == 2
    assert oracle.tokens == {"learned": 256 + 64, "loss": 0, "nonfinite": 0, "short": 7}


def test_trust_region_and_gate(tiny: dict[str, Path]):
    oracle = Oracle(tiny["llama"], config(rate=1.0, max_norm=0.2))
    oracle.learn(tokens(257))
    for key, delta in oracle.B.items():
        assert delta.norm().item() == pytest.approx(0.2 * oracle.norms[key], rel=1e-5)
    gated = Oracle(tiny["llama"], config(max_loss=0.5))
    losses = gated.learn(tokens(300))
    assert min(losses) > 0.5 * math.log(320)
    assert not any(delta.any() for delta in gated.B.values())
    assert (gated.version, gated.tokens["loss"]) == (0, 299)


def test_chunks_are_learned_in_order_and_reset_forgets(tiny: dict[str, Path]):
    ids = tokens(500)
    whole, parts = Oracle(tiny["llama"], config(chunk=128)), Oracle(tiny["llama"], config(chunk=128))
    whole.learn(ids)
    h, a = parts.activations(ids)
    for start in range(0, 499, 128):
        rows = slice(start, min(start + 128, 499))
        parts._step(h[rows], a[rows], torch.tensor(ids[1:])[rows])
    assert all(torch.equal(whole.B[k], parts.B[k]) for k in whole.B)
    fresh = whole.score(ids)
    whole.reset()
    assert not torch.equal(whole.score(ids), fresh)
    assert torch.equal(whole.score(ids), Oracle(tiny["llama"], config()).score(ids))


def test_newton_schulz_levels_singular_values():
    for shape in ((96, 16), (16, 96)):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = torch.linalg.svdvals(newton_schulz(gradient))
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_projection_is_orthonormal_and_bounded():
    A = projection(64, 16, seed=0)
    assert torch.allclose(A @ A.T, torch.eye(16), atol=1e-6)
    assert not torch.equal(A, projection(64, 16, seed=1))
    with pytest.raises(ConfigError, match="at most 64"):
        projection(64, 128, seed=0)


def test_models_without_this_tail_are_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="bias"):
        Oracle(tiny_model("llama", tmp_path, mlp_bias=True), config())


def test_curves_on_demo_texts_are_the_recorded_ones():
    """First interactions of two domains and two passes of one, of what GOLDEN["about"]["command"] recorded: the delta as it is,
    whatever scale would serve it."""
    golden = json.loads(GOLDEN.read_text())
    plain = TTTConfig.model_validate({"learn": {"scales": [1]}})
    scorer, domains = OracleScorer(DEMO / "model", plain), ("kjv", "man_fr")
    texts = read_texts(DEMO / "texts")

    async def measure():
        docs = await encode({d: texts[d] for d in domains}, scorer.tokenize)
        p2 = plan("p2", docs, 1, 6)
        p2.windows[:] = [windows[:3] for windows in p2.windows]
        p3 = plan("p3", {"kjv": docs["kjv"]}, 1, 2)
        return [await run(name, scorer, work, ("frozen", "ttt")) for name, work in (("p2", p2), ("p3", p3))]

    for name, result in zip(("p2", "p3"), asyncio.run(measure()), strict=True):
        recorded = golden["sessions"][name]
        for arm in ("frozen", "ttt"):
            for i, row in enumerate(getattr(result, arm)):
                for domain, loss in zip(result.domains, row, strict=True):
                    assert loss == pytest.approx(recorded[arm][i][recorded["domains"].index(domain)], abs=0.012)
        assert all(t < f - 0.05 for f, t in zip(result.frozen[-1], result.ttt[-1], strict=True)), "nothing was learned"
