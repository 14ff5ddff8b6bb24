"""The oracle: are its layers the model's own, is its step the one of docs/algorithm.md, does it reproduce its curves?"""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from vllm_ttt.config import PRESETS, TTTConfig, parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.oracle import Oracle, before, load_model, newton_schulz, projection, stack_nll, update
from vllm_ttt.eval.protocols import plan, run
from vllm_ttt.eval.texts import encode, read_texts
from vllm_ttt.eval.tiny import ARCHITECTURES, tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("one_thread")]

DEMO = Path(__file__).parents[2] / "demo"
HERE = Path(__file__).parent
EVERYTHING = ("o_proj", "gate_up_proj", "down_proj")
RATE = 0.03


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tiny")
    return {name: tiny_model(name, root / name) for name in ARCHITECTURES}


def config(layers: int | str = 1, modules: tuple[str, ...] = EVERYTHING, **learn: Any) -> TTTConfig:
    adapt = {"layers": layers, "modules": modules, "rank": 16}
    return parse_config({"adapt": adapt, "learn": {"max_loss": 2, "chunk": 256, "rate": RATE, **learn}}, "deep")


def tokens(n: int, seed: int = 1) -> list[int]:
    return torch.randint(320, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


def model_nll(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(logits.double(), torch.tensor(ids[1:]), reduction="none")


def matrices(oracle: Oracle) -> list[tuple[torch.Tensor, float]]:
    """Every B, and the norm of its weight."""
    return [(b[k], norms[k]) for b, norms in zip(oracle.B, oracle.norms, strict=True) for k in b]


@pytest.mark.parametrize("layers", [1, "all"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_adapted_layers_are_the_models_own(tiny: dict[str, Path], architecture: str, layers: int | str):
    """Before learning, and after it: with W + B A written into the model's weights, the model's NLL is the oracle's."""
    for modules in (EVERYTHING, ("o_proj", "down_proj")):
        oracle = Oracle(tiny[architecture], config(layers, modules), dtype=torch.float64, compute_dtype=torch.float64)
        ids = tokens(300)
        before = oracle.score(ids)
        assert torch.allclose(before, model_nll(oracle.model, ids), atol=1e-5)

        oracle.learn(ids)
        merged: Any = load_model(tiny[architecture], torch.float64)
        adapted = list(merged.model.layers)[-len(oracle.B) :]
        assert len(adapted) == (1 if layers == 1 else 2)
        for layer, B in zip(adapted, oracle.B, strict=True):
            mlp = layer.mlp
            names = {"o": layer.self_attn.o_proj, "g": mlp.gate_proj, "u": mlp.up_proj, "d": mlp.down_proj}
            for key in B:
                names[key].weight += B[key] @ oracle.A[key]
        after = oracle.score(ids)
        assert torch.allclose(after, model_nll(merged, ids), atol=1e-5)
        assert after.mean() < before.mean() - 0.05, "learning a text must make it more probable"
        assert torch.equal(model_nll(oracle.model, ids), model_nll(load_model(tiny[architecture], torch.float64), ids))


@pytest.mark.parametrize("layers", [1, "all"])
def test_gradient_agrees_with_finite_differences(tiny: dict[str, Path], layers: int | str):
    oracle = Oracle(tiny["qwen3"], config(layers), dtype=torch.float64, compute_dtype=torch.float64)
    ids = tokens(20)
    oracle.learn(tokens(64, seed=3))
    h, a = oracle.activations(ids)
    rows = h[8:-1], a[8:-1], torch.tensor(ids[9:]), before(oracle.served(ids)[1], 8)
    loss = lambda B: stack_nll(oracle.stack, oracle.A, B, *rows)[0].mean()  # noqa: E731
    B = [{k: v.clone().requires_grad_() for k, v in layer.items()} for layer in oracle.B]
    grads = iter(torch.autograd.grad(loss(B), [x for layer in B for x in layer.values()]))
    for i, key in ((i, key) for i, layer in enumerate(B) for key in layer):
        gradient = next(grads)
        step = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64) * 1e-5
        moved = [[{**b, key: b[key] + sign * step} if j == i else b for j, b in enumerate(oracle.B)] for sign in (1, -1)]
        change = loss(moved[0]) - loss(moved[1])
        assert change.item() == pytest.approx(2 * (gradient * step).sum().item(), rel=1e-4)


@pytest.mark.parametrize("layers", [1, "all"])
def test_first_step_has_the_length_that_the_rate_says(tiny: dict[str, Path], layers: int | str):
    oracle = Oracle(tiny["llama"], config(layers))
    ids = tokens(257)
    assert oracle.learn(ids) == pytest.approx([model_nll(load_model(tiny["llama"]), ids).mean().item()], rel=1e-4)
    for delta, norm in matrices(oracle):
        assert delta.norm().item() == pytest.approx(RATE * norm, rel=1e-4)
    assert (oracle.version, oracle.rate) == (1, RATE)


def test_the_rate_follows_the_agreement_of_gradient_and_update(tiny: dict[str, Path]):
    """Up where a chunk is like the one before it; never by more than a factor of e^0.5; unchanged by what is skipped."""
    oracle = Oracle(tiny["llama"], config("all"))
    oracle.learn(tokens(257))
    oracle.learn(tokens(257))
    assert oracle.rate == pytest.approx(RATE * math.exp(0.5))
    assert oracle.learn(tokens(8)) == []
    oracle.config = config("all", max_loss=0.1)
    oracle.learn(tokens(257))
    assert (oracle.rate, oracle.version) == (pytest.approx(RATE * math.exp(0.5)), 2)
    fixed = Oracle(tiny["llama"], config("all", adapt_rate=0))
    for seed in (1, 1, 2):
        fixed.learn(tokens(257, seed))
    assert fixed.rate == RATE


def test_update_is_the_algorithm_written_out():
    """One matrix, by hand: cosine with the last update, length, decay by share, trust region."""
    learn = config(decay=0.5, max_norm=10).learn
    draw = lambda seed: torch.randn(24, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)  # noqa: E731
    B, last, G = draw(1), draw(2), draw(3) - 0.5 * draw(2)
    cosine = (G * last).sum() / (G.norm() * last.norm())
    assert cosine < -0.025, "the last step went too far: the rate falls by the most that it may"
    held, before = [{"d": B.clone()}], [{"d": last.clone()}]
    rate = update(learn, held, before, 0.01, [{"d": G}], [{"d": 3.0}], 64)
    assert rate == pytest.approx(0.01 * math.exp(-0.5))
    U = newton_schulz(G)
    expected = (1 - 0.5 / 4) * B - rate / 4 * 3.0 * U / U.norm()
    assert torch.allclose(held[0]["d"], expected)
    assert torch.equal(before[0]["d"], U.bfloat16().double())
    tight = config(decay=0.5, max_norm=0.1).learn
    update(tight, held, before, rate, [{"d": G}], [{"d": 3.0}], 256)
    assert held[0]["d"].norm().item() == pytest.approx(0.3)


def test_decay_and_short_remainder(tiny: dict[str, Path]):
    """A chunk of n < 256 uses decay * n / 256 and rate * n / 256; under min_chunk nothing is learned."""
    oracle = Oracle(tiny["llama"], config(decay=0.5))
    oracle.learn(tokens(257))
    first = [delta.clone() for delta, _ in matrices(oracle)]
    oracle.learn(tokens(65, seed=2))
    for old, (delta, norm) in zip(first, matrices(oracle), strict=True):
        moved = delta - (1 - 0.5 / 4) * old
        assert moved.norm().item() == pytest.approx(oracle.rate / 4 * norm, rel=1e-4)
    kept = [delta.clone() for delta, _ in matrices(oracle)]
    assert oracle.learn(tokens(8, seed=4)) == []
    assert all(torch.equal(x, y) for x, (y, _) in zip(kept, matrices(oracle), strict=True))
    assert oracle.version == 2
    assert oracle.tokens == {"learned": 256 + 64, "loss": 0, "nonfinite": 0, "short": 7}


def test_trust_region_and_gate(tiny: dict[str, Path]):
    oracle = Oracle(tiny["llama"], config("all", rate=0.1, max_norm=0.05))
    oracle.learn(tokens(257))
    for delta, norm in matrices(oracle):
        assert delta.norm().item() == pytest.approx(0.05 * norm, rel=1e-5)
    gated = Oracle(tiny["llama"], config("all", max_loss=0.5))
    losses = gated.learn(tokens(300))
    assert min(losses) > 0.5 * math.log(320)
    assert not any(delta.any() for delta, _ in matrices(gated))
    assert (gated.version, gated.tokens["loss"], gated.rate) == (0, 299, RATE)


@pytest.mark.parametrize("layers", [1, "all"])
def test_chunks_are_learned_in_order_and_reset_forgets(tiny: dict[str, Path], layers: int | str):
    """What comes before a chunk is as it was served, whatever the chunks before it have taught."""
    ids = tokens(500)
    whole, parts = (Oracle(tiny["llama"], config(layers, chunk=128)) for _ in range(2))
    whole.learn(ids)
    h, a = parts.activations(ids)
    kv = parts.served(ids)[1]
    for start in range(0, 499, 128):
        rows = slice(start, min(start + 128, 499))
        parts.step(h[rows], a[rows], torch.tensor(ids[1:])[rows], before(kv, start))
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(matrices(whole), matrices(parts), strict=True))
    assert whole.rate == parts.rate != RATE
    fresh = whole.score(ids)
    whole.reset()
    assert not torch.equal(whole.score(ids), fresh)
    assert torch.equal(whole.score(ids), Oracle(tiny["llama"], config(layers)).score(ids))
    assert (whole.rate, whole.version) == (RATE, 0)


def test_history_is_a_past_and_not_learned(tiny: dict[str, Path]):
    ids = tokens(300)
    oracle = Oracle(tiny["llama"], config("all"))
    losses = oracle.learn(ids, start=200)
    assert losses == pytest.approx([model_nll(load_model(tiny["llama"]), ids)[200:].mean().item()], rel=1e-4)
    assert oracle.tokens["learned"] == 99


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
        Oracle(tiny_model("llama", tmp_path / "bias", mlp_bias=True), config())
    sliding = tiny_model("mistral", tmp_path / "sliding", sliding_window=64)
    Oracle(sliding, config(1))
    with pytest.raises(ConfigError, match="sliding-window attention above the first adapted one"):
        Oracle(sliding, config("all"))


@pytest.mark.parametrize("preset", PRESETS)
def test_curves_on_demo_texts_are_the_recorded_ones(preset: str):
    """First interactions of one domain and two passes of another, of what ["about"]["command"] of the file recorded."""
    golden = json.loads((HERE / f"test_oracle_golden_{preset}.json").read_text())
    assert f"--preset {preset}" in golden["about"]["command"]
    scorer, texts = OracleScorer(DEMO / "model", parse_config(None, preset)), read_texts(DEMO / "texts")

    async def measure():
        docs = await encode({d: texts[d] for d in ("kjv", "man_fr")}, scorer.tokenize)
        p2, p3 = plan("p2", {"man_fr": docs["man_fr"]}, 1, 6), plan("p3", {"kjv": docs["kjv"]}, 1, 2)
        p2.windows[:] = [windows[: {"deep": 2, "last": 3, "head": 6}[preset]] for windows in p2.windows]
        return [await run(name, scorer, work, ("frozen", "ttt")) for name, work in (("p2", p2), ("p3", p3))]

    for name, result in zip(("p2", "p3"), asyncio.run(measure()), strict=True):
        recorded = golden["sessions"][name]
        for arm in ("frozen", "ttt"):
            for i, row in enumerate(getattr(result, arm)):
                for domain, loss in zip(result.domains, row, strict=True):
                    assert loss == pytest.approx(recorded[arm][i][recorded["domains"].index(domain)], abs=0.012)
        assert all(t < f - 0.05 for f, t in zip(result.frozen[-1], result.ttt[-1], strict=True)), "nothing was learned"
