"""The optimiser: its step is the oracle's, the rate sets itself, and what must not move a session does not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_gradient import ROWS, SUBSETS, batch_of, config_of, of_session, relative, tail_of
from torch import Tensor

from vllm_ttt.config import LearnConfig
from vllm_ttt.eval.oracle import Oracle, load_model, newton_schulz
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.worker.delta import Delta, State
from vllm_ttt.worker.step.micro_step import accumulate
from vllm_ttt.worker.step.update import LARGEST_MOVE, RATES, Norms, orthogonalise, update

pytestmark = pytest.mark.unit

D, F, R, LAYERS = 24, 40, 8, 2
NORMS = {"o": 3.0, "g": 5.0, "u": 7.0, "d": 11.0}
#: Of a model that was widened by its lowest layer, which changes nothing yet: o_proj and down_proj are zero.
WIDENED = [NORMS | {"o": 0.0, "d": 0.0}, NORMS]
LEARN = LearnConfig(decay=0.015)


def draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def drawn(seed: int, sessions: int, modules: str = "ogud", scale: float = 1.0) -> Delta:
    zeros = Delta.zeros(modules, LAYERS, sessions, D, F, R)
    return zeros.by(*(draw(seed + i, *x.shape, scale=scale) for i, x in enumerate(zeros.tensors())))


def fresh(sessions: int, rate: float = 0.01, modules: str = "ogud") -> State:
    zeros = lambda dtype: Delta.zeros(modules, LAYERS, sessions, D, F, R, dtype)  # noqa: E731
    return State(zeros(torch.float32), zeros(torch.bfloat16), torch.full((sessions,), rate))


def stepped(norms: Norms, state: State, *args: Any) -> tuple[State, Tensor, Tensor]:
    """A step of all sessions of ``state``, whose masters lie in another order among others'; ``state`` stays."""
    S = len(state.rate_S)
    rows = torch.arange(S).flip(0) + 1
    masters = state.by(*(torch.full((S + 2, *x.shape[1:]), 7.0, dtype=x.dtype) for x in state.tensors()))
    for x, own in zip(masters.tensors(), state.tensors(), strict=True):
        x[rows] = own
    ok, rate, sizes = update(norms, masters, rows, *args)
    assert torch.equal(rate, masters.rate_S[rows])
    assert all((x[[0, -1]] == 7).all() for x in masters.tensors()), "of others nothing is touched"
    return masters.by(*(x[rows] for x in masters.tensors())), ok, sizes


def step(
    state: State, grad: Delta, loss: Tensor | None = None, share: Tensor | None = None, learn: LearnConfig = LEARN,
    max_loss: float = 10.0, layers: Sequence[dict[str, float]] = (NORMS,) * LAYERS,
) -> tuple[State, Tensor, Tensor]:  # fmt: skip
    S = len(state.rate_S)
    each = [{k: (i + 1) * n for k, n in layer.items()} for i, layer in enumerate(layers)]
    norms = Norms(grad.modules, each, torch.device("cpu"))
    loss, share = (torch.ones(S) if x is None else x for x in (loss, share))
    return stepped(norms, state, grad, loss, share, learn, max_loss)


# The oracle's step


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tiny_model("qwen3", tmp_path_factory.mktemp("qwen3"), num_hidden_layers=3, max_position_embeddings=1024)
    return load_model(folder, torch.float64)


@pytest.fixture(scope="module")
def widened(model: Any) -> Any:
    """The same, with a layer that changes nothing yet."""
    model = deepcopy(model)
    layer = model.model.layers[1]
    for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
        linear.weight.data.zero_()
    return model


@pytest.mark.parametrize("layers", [1, "all"])
@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_the_step_is_the_oracles(model: Any, layers: int | str, modules: tuple[str, ...]) -> None:
    """Four chunks of three sessions, whole and short ones in one call: the same B in every layer and module, the same rate."""
    the_same_step(model, layers, modules)


def test_the_step_is_the_oracles_where_a_weight_is_zero(widened: Any) -> None:
    the_same_step(widened, "all", SUBSETS[0])


def the_same_step(model: Any, layers: int | str, modules: tuple[str, ...]) -> None:
    config = config_of(layers, modules, chunk=max(ROWS))
    oracle = Oracle(model, config, compute_dtype=torch.float64)
    tail, share = tail_of(oracle), torch.tensor([n / max(ROWS) for n in ROWS])
    one, other = batch_of(oracle), batch_of(oracle, seed=10)
    sequence = (one, one, other, one)
    state = State(tail.zeros(3), tail.zeros(3, torch.bfloat16), torch.full((3,), config.learn.rate))
    rates, norms = [], torch.zeros(())
    for batch in sequence:
        grad = tail.zeros(3)
        loss = accumulate(tail, state.delta, *batch.rows(), grad, batch.past)
        state, ok, norms = stepped(tail.norms, state, grad, loss, share, config.learn, 100.0)
        assert ok.all()
        rates.append(state.rate_S.clone())
    for s in range(3):
        oracle.reset()
        for batch, rate in zip(sequence, rates, strict=True):
            oracle.step(*batch.each[s])
            assert rate[s].item() == pytest.approx(oracle.rate, rel=1e-3)
        for found, last, expected, before in zip(
            of_session(state.delta, s), of_session(state.last, s), oracle.B, oracle.last, strict=True
        ):
            assert list(found) == list(expected)
            for name in expected:
                if not expected[name].any():
                    assert not found[name].any(), name
                else:
                    assert relative(found[name], expected[name]) < 2e-3, name
                assert relative(last[name].float(), before[name]) < 5e-3, "but for what bfloat16 rounds away"
        parts = zip(oracle.B, oracle.norms, strict=True)
        sizes = [[b[k].norm().item() / (n[k] or 1.0) for k in config.adapt.letters] for b, n in parts]
        assert norms[:, s].tolist() == pytest.approx([max(x) for x in zip(*sizes, strict=True)], rel=2e-3)
    moved = torch.stack(rates).log().diff(dim=0)
    assert (moved[0] > 0.01).all(), "the same chunk twice: the rate rises"
    assert moved.abs().min() > 0, "each chunk but the first moves it"


@pytest.mark.parametrize("shape", [(3, 96, 16), (3, 16, 96), (1, 576, 64), (2, 64, 64)])
@pytest.mark.parametrize("spread", [0, 3], ids=["even", "steep"])
def test_orthogonalise_is_the_oracles(shape: tuple[int, int, int], spread: int) -> None:
    """Also where singular values differ by a factor of a thousand, as those of a gradient do."""
    _, rows, columns = shape
    g = draw(5, *shape)
    if spread:
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        g = u * torch.logspace(0, -spread, min(rows, columns)) @ v * 1e-3
    for found, one in zip(orthogonalise(g), g, strict=True):
        assert relative(found, newton_schulz(one.double())) < 1e-3
    assert (torch.linalg.svdvals(orthogonalise(g)[:, :, : min(rows, columns)])[:, 0] < 1.3).all()


# The rate


def test_it_rises_where_gradients_agree_and_falls_where_they_oppose() -> None:
    grad = drawn(1, 2)
    first, ok, _ = step(fresh(2), grad)
    assert ok.all()
    assert first.rate_S.tolist() == pytest.approx([0.01, 0.01]), "there was no update before the first chunk"
    signs = torch.tensor([1.0, -1.0])[:, None, None, None]
    second, _, _ = step(first, grad.by(*(x * signs for x in grad.tensors())))
    assert second.rate_S.tolist() == pytest.approx([0.01 * math.exp(0.5), 0.01 * math.exp(-0.5)])


@pytest.mark.parametrize("modules", ["ogud", "od", "gu", "d"])
def test_it_follows_the_mean_cosine_over_modules_and_layers(modules: str) -> None:
    """Of the new gradient and the update before; each matrix counts as much, however large it is."""
    first, _, _ = step(fresh(1, modules=modules), drawn(1, 1, modules))
    grad = drawn(20, 1, modules)
    grad = grad.by(*(x + 0.5 * y.float() for x, y in zip(grad.tensors(), first.last.tensors(), strict=True)))
    second, _, _ = step(first, grad, learn=LearnConfig(adapt_rate=2.0))
    pairs = [(g[0].flatten(), u[0].flatten().float()) for (_, g), (_, u) in zip(grad.parts(), first.last.parts(), strict=True)]
    assert len(pairs) == LAYERS * len(modules)
    mean = sum(torch.cosine_similarity(g, u, 0).item() for g, u in pairs) / len(pairs)
    assert 0.005 < mean < LARGEST_MOVE / 2, "neither nothing nor cut off"
    assert second.rate_S.item() == pytest.approx(0.01 * math.exp(2.0 * mean), rel=1e-4)
    fixed, _, _ = step(first, grad, learn=LearnConfig(adapt_rate=0.0))
    assert fixed.rate_S.item() == pytest.approx(0.01)


@settings(max_examples=20)
@given(st.lists(st.sampled_from([1.0, -1.0]), min_size=1, max_size=12), st.sampled_from([1e-5, 3e-4, 0.012, 0.1]))
def test_it_stays_within_its_bounds(signs: list[float], rate: float) -> None:
    """And a chunk moves its logarithm by 0.5 at most."""
    grad, state = drawn(1, 1, "d"), fresh(1, rate, "d")
    for sign in signs:
        before = state.rate_S.item()
        state, _, _ = step(state, grad.by(*(sign * x for x in grad.tensors())))
        now = state.rate_S.item()
        assert RATES[0] * 0.9999 <= now <= RATES[1] * 1.0001
        assert abs(math.log(now / before)) <= LARGEST_MOVE + 1e-4


def test_both_bounds_are_reached() -> None:
    grad = drawn(1, 2, "d")
    state = fresh(2, 0.01, "d")
    flips = torch.tensor([1.0, -1.0])[:, None, None, None]
    for i in range(30):  # the first session's gradients agree, the second's oppose one another
        state, _, _ = step(state, grad.by(*(x * flips**i for x in grad.tensors())))
    assert state.rate_S.tolist() == pytest.approx([RATES[1], RATES[0]])


def test_a_lost_update_leaves_it() -> None:
    state, _, _ = step(fresh(1), drawn(1, 1))
    state, _, _ = step(state, drawn(1, 1))
    assert state.rate_S.item() > 0.011
    lost = State(state.delta, state.last.by(*(torch.zeros_like(x) for x in state.last.tensors())), state.rate_S)
    again, _, _ = step(lost, drawn(1, 1))
    assert torch.equal(again.rate_S, state.rate_S)
    assert any(x.any() for x in again.last.tensors()), "and there is one for the next chunk"


# What does not move


def test_a_skipped_chunk_leaves_everything() -> None:
    """Too large a loss; a loss, a gradient or a step that is not finite: that session keeps its bits, the others move."""
    state, _, _ = step(fresh(8), drawn(1, 8))
    grad, loss = drawn(1, 8), torch.tensor([2.0, 9.0, math.nan, math.inf, 2.0, 2.0, 2.0, 2.0])
    grad.thin[4, 3, 2, 1], grad.wide[5, 1, 1, 0] = math.nan, math.inf
    grad.thin[6, 3, 2, 1] = grad.wide[7, 1, 1, 0] = 1e30  # finite, and its square is not
    new, ok, norms = step(state, grad, loss, max_loss=5.0)
    assert ok.tolist() == [True, False, False, False, False, False, False, False]
    for before, after in zip(state.tensors(), new.tensors(), strict=True):
        assert torch.equal(after[1:], before[1:])
        assert after.isfinite().all()
    assert all(not torch.equal(x[0], y[0]) for x, y in zip(new.delta.tensors(), state.delta.tensors(), strict=True))
    assert new.rate_S[0] > state.rate_S[0]
    assert norms.isfinite().all()


def test_the_delta_of_a_weight_that_is_zero_stays_zero() -> None:
    """All others learn on."""
    state = fresh(2)
    for seed in (1, 2):
        state, ok, norms = step(state, drawn(seed, 2), layers=WIDENED)
        assert ok.all()
        assert norms.isfinite().all()
        assert norms.all(), "those of the other layer"
        for i, (name, x) in enumerate(state.delta.parts()):
            assert x.isfinite().all()
            assert x.any() == (i >= 4 or name in "gu")


def test_the_trust_region_holds_by_matrix() -> None:
    learn = LearnConfig(max_norm=0.05)
    new, ok, norms = step(fresh(2, 0.1), drawn(30, 2), share=torch.tensor([1.0, 0.1]), learn=learn)
    assert ok.all()
    assert torch.allclose(norms[:, 0], torch.tensor(0.05), rtol=1e-4)
    assert torch.allclose(norms[:, 1], torch.tensor(0.01), rtol=1e-4), "a tenth of a chunk is a tenth of a step"
    for i, (name, x) in enumerate(new.delta.parts()):
        layer = i // 4 + 1
        assert x[0].norm().item() == pytest.approx(0.05 * layer * NORMS[name], rel=1e-4)
        assert x[1].norm().item() == pytest.approx(0.01 * layer * NORMS[name], rel=1e-4)


def test_decay_is_by_share() -> None:
    state = State(drawn(7, 2, scale=0.001), fresh(2).last, torch.full((2,), 1e-5))
    new, _, _ = step(state, drawn(1, 2), share=torch.tensor([1.0, 0.25]), learn=LearnConfig(decay=0.5))
    for (name, before), (_, after) in zip(state.delta.parts(), new.delta.parts(), strict=True):
        for s, kept in enumerate((0.5, 0.875)):
            assert relative(after[s], kept * before[s]) < 0.05, name


def test_a_zero_gradient_moves_nothing_and_is_finite() -> None:
    new, ok, _ = step(fresh(1), Delta.zeros("ogud", LAYERS, 1, D, F, R))
    assert ok.all()
    assert not any(x.any() for x in (*new.delta.tensors(), *new.last.tensors()))
    assert new.rate_S.item() == pytest.approx(0.01)


def test_the_norms_are_those_of_the_layer_in_which_they_are_largest() -> None:
    for modules in ("ogud", "od", "gu", "d", "ogu"):
        state = State(drawn(3, 1, modules, scale=0.01), fresh(1, modules=modules).last, torch.full((1,), 1e-5))
        new, _, norms = step(state, drawn(4, 1, modules))
        sizes: dict[str, list[float]] = {m: [] for m in modules}
        for i, (name, x) in enumerate(new.delta.parts()):
            sizes[name].append(x.norm().item() / ((i // len(modules) + 1) * NORMS[name]))
        assert norms[:, 0].tolist() == pytest.approx([max(sizes[m]) for m in modules], rel=1e-4)


def test_what_is_lost_of_a_master_is_only_what_was_asked_for() -> None:
    """Nothing is changed in place: the state that a step was given is as it was."""
    state = State(drawn(7, 2, scale=0.01), drawn(9, 2).to(torch.bfloat16), torch.full((2,), 0.02))
    before: list[Any] = [x.clone() for x in state.tensors()]
    new, _, _ = step(state, drawn(1, 2))
    assert all(torch.equal(x, y) for x, y in zip(state.tensors(), before, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(new.tensors(), before, strict=True))
