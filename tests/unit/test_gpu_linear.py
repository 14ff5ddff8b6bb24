"""A layer that computes deltas beside its product, as torch.compile traces it; tests/gpu has what it computes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from vllm import forward_context
from vllm.lora.layers.row_parallel_linear import RowParallelLinearWithLoRA
from vllm.model_executor.layers.layernorm import RMSNorm

from vllm_ttt.worker.capture.capture import Capture, CapturingNorm
from vllm_ttt.worker.serve import gpu_linear, gpu_slots
from vllm_ttt.worker.serve.gpu_linear import Beside
from vllm_ttt.worker.step.tail import TailModules

pytestmark = pytest.mark.unit

IN, OUT, RANK = 12, 20, 16


class Weight(nn.Parameter):
    """As vLLM's parameters are: what torch does with one goes through Python."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return super().__torch_function__(func, types, args, kwargs or {})


class Layer(Beside, nn.Module):  # pyright: ignore[reportIncompatibleMethodOverride]
    def __init__(self) -> None:
        super().__init__()
        self.base_layer = nn.Module()
        self.base_layer.weight = Weight(torch.randn(OUT, IN), requires_grad=False)
        self.lora_a_stacked = (torch.zeros(1, 1, RANK, IN),)
        self.lora_b_stacked = gpu_slots.in_8_bits((torch.zeros(4, 1, OUT, RANK),))

    def forward(self, x: Tensor) -> Tensor:
        return self.apply(x)


def test_the_weight_is_an_input_of_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What serves is always the layer's own: after another was loaded into it, and after it was replaced."""
    graphs, none, idle = [], torch.full((5,), -1, dtype=torch.int32), torch.ones(1, dtype=torch.bool)
    wrapper = SimpleNamespace(ttt_args=lambda x: (none[: len(x)], none[: len(x)], none, none, none, idle))
    context = SimpleNamespace(no_compile_layers={gpu_linear.MAPPING: wrapper})
    monkeypatch.setattr(forward_context, "get_forward_context", lambda: context)

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.graph)
        return graph.forward

    torch.manual_seed(0)
    layer, x = Layer(), torch.randn(3, IN)
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=False)
    served = lambda: torch.equal(compiled(x), linear(x, layer.base_layer.weight))  # noqa: E731
    with torch.no_grad():
        assert served()
        layer.base_layer.weight.data.copy_(torch.randn(OUT, IN))
        assert served()
        layer.base_layer.weight.data = torch.randn(OUT, IN)
        assert served()
        layer.base_layer.weight = Weight(torch.randn(OUT, IN), requires_grad=False)
        assert served()
    (called,) = [n for n in graphs[0].nodes if n.target is torch.ops.vllm.ttt_session_linear]
    assert called.args[1].target == "t", "not the parameter, whose class goes through Python"
    assert called.args[1].args[0].op == "placeholder"
    x_, w, bias, a, b, scales = called.args
    assert (bias, len(b), len(scales)) == (None, 1, 1)
    tensors = [node.meta["example_value"] for node in (x_, w, a, *b, *scales)]
    assert called.all_input_nodes == [x_, w, a, *b, *scales], "nothing of the batch: its output would count as not aligned"
    assert all(x.storage_offset() * x.element_size() % 16 == 0 for x in tensors)


def test_the_layer_whose_input_is_captured_computes_deltas_beside_its_product_too(monkeypatch: pytest.MonkeyPatch) -> None:
    applied = []
    monkeypatch.setattr(Beside, "apply", lambda self, x, bias=None: applied.append("beside") or x)
    monkeypatch.setattr(torch.ops.vllm, "ttt_capture", lambda x, buffer, idle: applied.append("captured"), raising=False)
    o_proj, norm = RowParallelLinearWithLoRA.__new__(RowParallelLinearWithLoRA), RMSNorm.__new__(RMSNorm)
    for module, sizes in ((o_proj, {"input_size": IN}), (norm, {"hidden_size": OUT})):
        nn.Module.__init__(module)
        vars(module).update(sizes)
    o_proj.__class__ = type("BesideLayer", (Beside, RowParallelLinearWithLoRA), {})
    modules = TailModules((SimpleNamespace(norm=norm, o_proj=o_proj),), None, None, "o")  # type: ignore[arg-type]
    Capture(modules, 4, torch.float32, torch.device("cpu"), torch.zeros(1, dtype=torch.bool))
    o_proj.apply(torch.randn(3, IN))
    assert applied == ["captured", "beside"]
    assert isinstance(norm, CapturingNorm)
