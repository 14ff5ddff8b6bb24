"""Quantised layers: their weights are read back as what was quantised, the step's loss is that of what is served, and its
gradient that of a plain loop."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import quantised
import torch
import twins
from test_deep_tail import as_with_lora, distributed, loaded  # noqa: F401
from test_gradient import config_of, relative
from test_names import beside
from test_start import changed_model, offline
from torch import Tensor, nn

from vllm_ttt import plugin
from vllm_ttt.config import parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.plugin import engine_args
from vllm_ttt.worker.ranks import ALONE
from vllm_ttt.worker.sites import InLayers
from vllm_ttt.worker.step import tail as tail_module
from vllm_ttt.worker.step import weights
from vllm_ttt.worker.step.micro_step import Tail
from vllm_ttt.worker.step.tail import build_tail, find_modules

pytestmark = pytest.mark.unit


class Served:
    """A module of vLLM's model, and the part of its outputs that a layer of transformers' has."""

    def __init__(self, product: Any, rows: slice):
        self.product, self.rows = product, rows

    def __call__(self, _: nn.Module, args: tuple[Tensor], y: Tensor) -> Tensor:
        """What is served, with the gradient of the plain product."""
        return y + (self.product(args[0].flatten(0, 1))[None, :, self.rows] - y).detach()


def serve(theirs: twins.Theirs, tail: Tail) -> None:
    """Let the last layers of transformers' model multiply as vLLM's quantised ones do."""
    layers = theirs.layers[-len(tail.blocks) :]
    for layer, block in zip(layers, tail.blocks, strict=True):
        F = block.wd_DF.shape[1]
        places = ((layer.self_attn.o_proj, "o", slice(None)), (layer.mlp.gate_proj, "gu", slice(F)))
        places += ((layer.mlp.up_proj, "gu", slice(F, None)), (layer.mlp.down_proj, "d", slice(None)))
        for module, key, rows in places:
            module.register_forward_hook(Served(block.served[key], rows))
    for layer, qkv in zip(layers[len(layers) - len(tail.attentions) :], tail.attentions, strict=True):
        Q, G = qkv.heads * qkv.head, qkv.kv_heads * qkv.head
        ends = (("q_proj", slice(Q)), ("k_proj", slice(Q, Q + G)), ("v_proj", slice(Q + G, None)))
        for name, rows in ends:
            getattr(layer.self_attn, name).register_forward_hook(Served(qkv.served, rows))


@pytest.mark.parametrize("name", quantised.METHODS)
def test_what_is_served_is_learned(distributed: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # noqa: F811
    """Four bits in groups, in two orders; eight with a scale for each channel, and inputs that are quantised too."""
    monkeypatch.setattr(tail_module, "step_dtype", lambda *_: torch.float32)
    folder = tiny_model("llama", tmp_path / "model", num_hidden_layers=3, max_position_embeddings=1024)
    quantised.quantise(folder, name, tmp_path / "dense")
    method = name if quantised.METHODS[name][1] is None else None
    model, config = loaded(folder, "bfloat16", quantization=method), config_of(2)
    modules = as_with_lora(find_modules(model, 2))
    tail = build_tail(model, modules, config.adapt, 1024)
    theirs = twins.Theirs("LLaMAForCausalLM", tmp_path / "dense")
    for layer, block in zip(theirs.layers[1:], tail.blocks, strict=True):
        expected = layer.self_attn.o_proj.weight, layer.mlp.down_proj.weight
        both = torch.cat((layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight))
        for read, dense in ((block.wo_DQ, expected[0]), (block.wgu_2FD, both), (block.wd_DF, expected[1])):
            assert relative(read.double(), dense) < 0.005

    serve(theirs, tail)
    loss, expected_loss, grads = beside(theirs, tail)
    assert loss == pytest.approx(expected_loss, abs=0.01)
    for one, other in grads:
        # Where inputs have eight bits, one that is rounded the other way is off by a sixteenth.
        assert relative(one, other) < (0.06 if name.startswith("fp8") else 0.03)

    config = SimpleNamespace(model_config=SimpleNamespace(get_vocab_size=lambda: 320))
    worker: Any = SimpleNamespace(vllm_config=config, ranks=ALONE)
    site = InLayers.__new__(InLayers)
    site.worker, site.modules, site.config = worker, modules, parse_config(None)
    kept = [w for b in tail.blocks for w in (b.wo_DQ, b.wgu_2FD, b.wd_DF)] + [a.wqkv_XD for a in tail.attentions]
    assert site.copied(torch.float32) == sum(w.nbytes for w in (*kept, tail.head_VD)), "what it has for itself is counted"


class Static:
    """A product whose inputs have one scale for all, in eight bits."""

    def __init__(self, weight: Tensor, scale: float, kind: torch.dtype, largest: float):
        self.weight, self.scale, self.kind, self.largest = weight, scale, kind, largest

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        x = (x / self.scale).clamp(-self.largest, self.largest)
        x = x.round() if self.kind == torch.int8 else x
        return (x.to(self.kind).float() * self.scale) @ self.weight.T


@pytest.mark.parametrize("scale", [1 / 1344, 0.004, 0.11])
@pytest.mark.parametrize(("kind", "largest"), [(torch.float8_e4m3fn, 448.0), (torch.int8, 127.0)])
def test_static_scales_of_inputs(kind: torch.dtype, largest: float, scale: float) -> None:
    """1 would be rounded, or cut off: the weight is read by what each kind has exactly."""
    weight = torch.randn(24, 300, generator=torch.Generator().manual_seed(0))
    product = Static(weight, scale, kind, largest)
    stored = torch.zeros(1, dtype=kind)
    layer = SimpleNamespace(
        weight=stored, input_scale=torch.tensor(scale), quant_method=product, input_size_per_partition=300,
        parameters=lambda: iter((stored,)),
    )  # fmt: skip
    assert relative(product.apply(layer, torch.eye(300)).T, weight) > 0.001, "the identity itself would not do"
    read = weights.dense(layer, torch.float32)
    assert relative(read, weight) < 1e-5
    assert weights.error(layer, read, "it") < 0.05
    weight.zero_()
    assert weights.error(layer, weights.dense(layer, torch.float32), "it") == 0.0, "a layer that a model was widened by"


class Wrong:
    """A product that is not that of a weight alone."""

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return x @ layer.weight.T + x.abs().amax()


def test_a_layer_that_cannot_be_read_is_refused() -> None:
    layer = SimpleNamespace(
        weight=torch.randn(8, 16), quant_method=Wrong(), input_size_per_partition=16, parameters=lambda: iter(())
    )
    with pytest.raises(
        ConfigError, match=r"layer 3 \(Wrong\) cannot be read: .* off by .*% is allowed; serve with --ttt-preset head"
    ):
        weights.error(layer, weights.dense(layer, torch.float32), "layer 3")


def test_the_start_and_the_check_take_quantised_weights(tmp_path: Path) -> None:
    """But for eight bits of integers on a CPU, for which vLLM has no LoRA."""
    said = quantised.METHODS["int4"][1]
    model = changed_model(tmp_path, quantization_config=said)
    for preset in ("deep", "last"):
        row = plugin.check(model, preset)[-1]
        assert (row.ok, row.why) == (
            True,
            "LlamaForCausalLM, 8 layers, hidden 384, vocabulary 8192, quantised (compressed-tensors)",
        )
        made = offline(model=model, skip_tokenizer_init=True, **engine_args(preset)).create_engine_config()
        assert made.lora_config is not None
    (tmp_path / "config.json").write_text(
        json.dumps({**json.loads((tmp_path / "config.json").read_text()), "quantization_config": quantised.INT8})
    )
    says = "INT8 weights and activations on a CPU are not supported .*Or serve with --ttt-preset head"
    for preset in ("deep", "last"):
        with pytest.raises(ConfigError, match=says):
            offline(model=model, skip_tokenizer_init=True, **engine_args(preset)).create_engine_config()
    rows = plugin.check(model)[-4:]
    assert [row.ok for row in rows] == [True, False, False, True], "head serves it"
