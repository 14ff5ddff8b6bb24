"""How a session's matrices lie in memory, whichever modules are adapted: as the step, the slots and the files see them."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from vllm_ttt.config import LETTERS, AdaptConfig
from vllm_ttt.geometry import PATHS, Geometry
from vllm_ttt.worker.delta import Delta, LayerDelta, State

pytestmark = pytest.mark.unit

D, F, R, LAYERS, SESSIONS = 6, 10, 2, 3, 2
SUBSETS = [modules for n in (1, 2, 3) for modules in combinations(PATHS, n)]
ROWS = {"o": D, "g": F, "u": F, "d": D}


def letters(modules: tuple[str, ...]) -> str:
    return AdaptConfig(modules=modules).letters  # type: ignore[arg-type]


def numbered(modules: tuple[str, ...]) -> Delta:
    """Every number is another one."""
    delta = Delta.zeros(letters(modules), LAYERS, SESSIONS, D, F, R)
    start = 0
    for x in delta.tensors():
        x.copy_(torch.arange(start, start + x.numel()).view_as(x))
        start += x.numel()
    return delta


def whole(layer: LayerDelta) -> dict[str, Tensor]:
    """By module of vLLM."""
    return {name: x for name, x in zip(LETTERS, layer, strict=True) if x is not None}


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_layers_parts_and_matrices_are_the_same_numbers(modules: tuple[str, ...]) -> None:
    delta = numbered(modules)
    assert delta.layers == LAYERS
    parts = list(delta.parts())
    assert [name for name, _ in parts] == list(letters(modules)) * LAYERS, "layer by layer"
    assert all(x.shape == (SESSIONS, ROWS[name], R) for name, x in parts)
    assert sum(x.numel() for _, x in parts) == sum(x.numel() for x in delta.tensors()), "each number once"
    assert len({n for _, x in parts for n in x.flatten().tolist()}) == sum(x.numel() for x in delta.tensors())

    layers = [whole(delta.layer(i)) for i in range(LAYERS)]
    assert all(list(layer) == list(modules) for layer in layers)
    by_letter = iter(x for _, x in parts)
    for layer in layers:
        for name, found in layer.items():
            assert torch.equal(found, torch.cat([next(by_letter) for _ in LETTERS[name]], 1)), "gate first"

    geometry = Geometry(4, R, 0, D, 8, F, LAYERS, 4, modules)
    matrices = list(delta.matrices())
    assert [tuple(x.shape) for x in matrices] == list(geometry.shapes.values())
    for found, (name, expected) in zip(matrices, [kv for layer in layers for kv in layer.items()], strict=True):
        assert torch.equal(found, expected[0]), name
    assert [name.rpartition(".")[2] for name in geometry.shapes] == list(modules) * LAYERS


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_what_is_written_to_a_view_is_in_the_delta(modules: tuple[str, ...]) -> None:
    """A gradient is added to a layer, and a file's tensors to matrices."""
    delta = numbered(modules)
    for name, x in whole(delta.layer(1)).items():
        x[1] = -1.0
        assert bool((whole(delta.layer(1))[name][1] == -1).all())
    changed = [bool((x[1] == -1).all()) for _, x in delta.parts()]
    count = len(letters(modules))
    assert changed == [i // count == 1 for i in range(count * LAYERS)]
    assert not any(bool((x[0] == -1).any()) for _, x in delta.parts()), "of the other session nothing"


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_a_delta_comes_back_from_its_matrices(modules: tuple[str, ...]) -> None:
    delta = numbered(modules)
    again = Delta.of(delta, [x.clone() for x in delta.matrices()])
    for x, y in zip(again.tensors(), delta.tensors(), strict=True):
        assert torch.equal(x, y[:1])
        assert x.is_contiguous()
    narrow = Delta.of(delta, [x.to(torch.bfloat16) for x in delta.matrices()])
    assert all(x.dtype == torch.bfloat16 for x in narrow.tensors())
    with pytest.raises(ValueError, match="zip"):
        Delta.of(delta, list(delta.matrices())[:-1])


def test_a_row_is_a_view() -> None:
    delta = numbered(("o_proj", "down_proj"))
    state = State(delta, delta.to(torch.bfloat16), torch.tensor([0.1, 0.2]))
    row = state.row(1)
    row.rate_S.fill_(0.5)
    row.last.thin.fill_(3.0)
    assert state.rate_S.tolist() == pytest.approx([0.1, 0.5])
    assert bool((state.last.thin[1] == 3).all())
    assert not bool((state.last.thin[0] == 3).all())


@pytest.mark.parametrize("modules", SUBSETS, ids="+".join)
def test_the_geometry_knows_the_bytes(modules: tuple[str, ...]) -> None:
    geometry = Geometry(4, R, 0, D, 8, F, LAYERS, 4, modules)
    zeros = [Delta.zeros(letters(modules), LAYERS, 1, D, F, R, dtype) for dtype in (torch.float32, torch.bfloat16)]
    assert State(zeros[0], zeros[1], torch.zeros(1)).bytes == geometry.bytes
    assert Geometry.from_json(geometry.to_json()) == geometry
