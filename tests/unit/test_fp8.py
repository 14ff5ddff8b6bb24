"""Products of the step in FP8 (`learn.fp8`), beside plain torch that rounds both sides to E4M3; from vLLM's own modules."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import pytest
import quantised
import torch
from test_deep_tail import as_with_lora, distributed, loaded  # noqa: F401
from test_gradient import ROWS, Batch, autograd, batch_of, config_of, of_session, random_deltas, relative
from test_start import offline
from torch import Tensor
from vllm.platforms import current_platform

from vllm_ttt import support
from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.fp8 import in_fp8, rounded
from vllm_ttt.eval.oracle import Oracle
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.plugin import engine_args
from vllm_ttt.worker.ranks import ALONE
from vllm_ttt.worker.sites import InLayers
from vllm_ttt.worker.step import fp8, pointwise
from vllm_ttt.worker.step import tail as tail_module
from vllm_ttt.worker.step.micro_step import Tail, accumulate
from vllm_ttt.worker.step.tail import TailModules, build_tail, find_modules

pytestmark = pytest.mark.unit


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape) + seed))


def test_a_product_rounds_both_of_its_sides() -> None:
    """Rows far apart in size lose nothing by it; and a row without numbers, or one that is not finite, is its own affair."""
    w, x = draw(48, 2 * fp8.ROWS) * draw(48, 1).exp(), draw(7, 2 * fp8.ROWS) * 10.0 ** torch.arange(-9, 5, 2)[:, None]
    x[3] = 0
    for m, rows in ((w, x), (w.T, draw(7, 48, seed=1))):
        found, expected = fp8.product(m, "it")(rows), rounded(rows) @ rounded(m).T
        assert relative(found, expected) < 1e-5
        exact = rows @ m.T
        for i in (i for i in range(7) if exact[i].any()):
            assert 0.01 < relative(found[i], exact[i]) < 0.1
    x[1, 5], x[2, 9] = torch.nan, torch.inf
    found = fp8.product(w, "it")(x)
    assert found.isfinite().all(1).tolist() == [True, False, False, True, True, True, True]
    assert not found[3].any()


def test_the_scale_of_a_row_makes_its_largest_number_the_types() -> None:
    x = torch.tensor([[3.0, -7.0, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]])
    x8, scale = pointwise.scaled(x)
    assert x8[0].tolist() == [192.0, -448.0, 32.0, 0.0]
    assert (scale[0].item(), x8[1].any().item()) == (1 / 64, False)


def test_products_that_are_off_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"learn.fp8: products with layer 3 are off by .* is allowed; leave it out"):
        fp8.product(torch.full((16, 16), torch.inf), "layer 3")


def gradient(tail: Tail, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    grad = tail.zeros(len(ROWS))
    losses = accumulate(tail, random_deltas(tail, 0.05), *batch.rows(), grad, batch.past)
    return losses, [x for s in range(len(ROWS)) for layer in of_session(grad, s) for x in layer.values()]


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_the_step_is_the_plain_loop_with_its_products_rounded(distributed: None, tmp_path: Path, architecture: str) -> None:  # noqa: F811
    """But for a scale here and there: the plain loop knows q, k and v, and gate and up, as weights of their own."""
    folder = tiny_model(architecture, tmp_path, num_hidden_layers=3, max_position_embeddings=1024)
    model, config = loaded(folder), config_of(2)
    modules = as_with_lora(find_modules(model, 2))
    plain, tail = (build_tail(model, modules, config.adapt, 1024, ways=ways) for ways in ("none", "both"))
    oracle = Oracle(folder, config, dtype=torch.float64, compute_dtype=torch.float64)
    batch = batch_of(oracle)
    (losses, found), (plain_losses, unrounded) = gradient(tail, batch), gradient(plain, batch)
    oracle.stack, expected, off, moved = in_fp8(oracle.stack), list[Tensor](), [], []
    for s in range(len(ROWS)):
        loss, grads = autograd(oracle, random_deltas(tail, 0.05), batch, s)
        off.append(abs(losses[s].item() - loss))
        moved.append(abs(plain_losses[s].item() - loss))
        expected += grads
    assert fmean(off) < fmean(moved) / 3
    errors, missed = ([relative(x, y) for x, y in zip(xs, expected, strict=True)] for xs in (found, unrounded))
    assert max(errors) < 0.08
    assert fmean(errors) < fmean(missed) / 2


def test_all_sites_of_all_layers_are_in_fp8(distributed: None, tmp_path: Path) -> None:  # noqa: F811
    """But those with a width that torch cannot multiply; what they take is what the check of the memory counts."""
    folder = tiny_model("llama", tmp_path, num_hidden_layers=3, max_position_embeddings=1024, intermediate_size=100)
    model, config = loaded(folder), parse_config({"adapt": {"rank": 16}, "learn": {"fp8": "both"}})
    modules = as_with_lora(find_modules(model, 3))
    tail = build_tail(model, modules, config.adapt, 1024, ways="both")
    assert [(set(b.served), set(b.back)) for b in tail.blocks] == [({"o"}, {"o"})] * 3
    assert all(x.served and x.back for x in tail.attentions)
    assert len(tail.attentions) == 3
    assert site_of(modules, config).rounded == bytes_of(tail)


def test_on_the_way_back_alone(distributed: None, tmp_path: Path) -> None:  # noqa: F811
    """The loss has the bits that it has without, and the gradient is nearer than with both ways."""
    folder = tiny_model("qwen3", tmp_path, num_hidden_layers=3, max_position_embeddings=1024)
    model, config = loaded(folder), parse_config({"adapt": {"rank": 16, "layers": 2}, "learn": {"fp8": "back"}})
    modules = as_with_lora(find_modules(model, 2))
    plain, back, both = (build_tail(model, modules, config.adapt, 1024, ways=ways) for ways in ("none", "back", "both"))
    batch = batch_of(Oracle(folder, config, dtype=torch.float32, compute_dtype=torch.float32))
    (losses, grads), (found, near), (_, far) = (gradient(tail, batch) for tail in (plain, back, both))
    assert torch.equal(losses, found)
    errors = [fmean(relative(x, y) for x, y in zip(xs, grads, strict=True)) for xs in (near, far)]
    assert 0.01 < errors[0] < errors[1]
    assert site_of(modules, config).rounded == bytes_of(back)


@pytest.mark.parametrize("name", ["fp8_per_channel", "int4"])
def test_quantised_weights_are_kept_in_fp8_alone(
    distributed: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    """On the way forward they are what is served, as without `learn.fp8`; on the way back they are rounded."""
    monkeypatch.setattr(tail_module, "step_dtype", lambda *_: torch.float32)
    folder = tiny_model("llama", tmp_path / "model", num_hidden_layers=3, max_position_embeddings=1024)
    quantised.quantise(folder, name, tmp_path / "dense")
    model = loaded(folder, "bfloat16", quantization=name if quantised.METHODS[name][1] is None else None)
    config = parse_config({"adapt": {"rank": 16, "layers": 2}, "learn": {"fp8": "both"}})
    modules = as_with_lora(find_modules(model, 2))
    plain, tail = (build_tail(model, modules, config.adapt, 1024, ways=ways) for ways in ("none", "both"))
    assert all(w.is_meta for b in tail.blocks for w in (b.wo_DQ, b.wgu_2FD, b.wd_DF))
    assert all(x.wqkv_XD.is_meta for x in tail.attentions)
    assert [b.norm for b in tail.blocks] == [b.norm for b in plain.blocks]
    batch = batch_of(Oracle(tmp_path / "dense", config_of(2), dtype=torch.float32, compute_dtype=torch.float32))
    (losses, found), (expected, grads) = gradient(tail, batch), gradient(plain, batch)
    assert torch.equal(losses, expected)
    assert 0 < fmean(relative(one, other) for one, other in zip(found, grads, strict=True)) < 0.1
    site = site_of(modules, config)
    assert site.rounded == bytes_of(tail)
    assert site.copied(torch.float32) == tail.head_VD.nbytes
    assert site_of(modules, parse_config({"adapt": {"rank": 16, "layers": 2}})).rounded == 0


def site_of(modules: TailModules, config: TTTConfig) -> InLayers:
    site = InLayers.__new__(InLayers)
    vllm_config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 320))
    worker: Any = SimpleNamespace(vllm_config=vllm_config, ranks=ALONE)
    site.worker, site.modules, site.config = worker, modules, config
    return site


def bytes_of(tail: Tail) -> int:
    """What a tail has in FP8."""
    found = [x for block in tail.blocks for x in (*block.served.values(), *block.back.values())]
    found += [x for attention in tail.attentions for x in (attention.served, attention.back)]
    return sum(x.m8_NK.nbytes + x.scale_1N.nbytes for x in found if isinstance(x, fp8.Product))


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({}, "on a CPU"),
        ({"device_config.device_type": "cuda"}, "on a device that is older than compute capability 8.9"),
        ({"device_config.device_type": "cuda", "able": True, "model_config.dtype": torch.float16}, "with --dtype float16"),
        (
            {"device_config.device_type": "cuda", "able": True, "parallel_config.tensor_parallel_size": 2},
            "with --tensor-parallel-size",
        ),
    ],
)
def test_where_it_is_refused(changed: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = offline(dtype="bfloat16", additional_config={}).create_engine_config()
    monkeypatch.setattr(current_platform, "has_device_capability", lambda _: changed.get("able", False))
    for name, value in changed.items():
        if name != "able":
            section, field = name.split(".")
            monkeypatch.setattr(getattr(vllm_config, section), field, value)
    support._check_fp8(vllm_config, parse_config(None))
    on = parse_config({"learn": {"fp8": "back"}})
    with pytest.raises(ConfigError, match=f"learn.fp8 back is not supported {says}.*; set learn.fp8 to none"):
        support._check_fp8(vllm_config, on)


def test_where_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_config = offline(dtype="bfloat16", additional_config={}).create_engine_config()
    monkeypatch.setattr(current_platform, "has_device_capability", lambda _: True)
    monkeypatch.setattr(vllm_config.device_config, "device_type", "cuda")
    support._check_fp8(vllm_config, parse_config({"learn": {"fp8": "both"}}))


def test_a_start_on_a_cpu_refuses_it() -> None:
    with pytest.raises(ConfigError, match=r"learn\.fp8 both is not supported on a CPU; set learn.fp8 to none"):
        offline(**engine_args(config={"learn": {"fp8": "both"}})).create_engine_config()
