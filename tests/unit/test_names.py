"""Every name that `deep` and `last` serve: the step's weights, from vLLM's own modules, have the gradient of transformers'
model; and each name is served, or refused with the way out, before a model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import twins
from test_deep_tail import as_with_lora, distributed, loaded  # noqa: F401
from test_gradient import Kept, config_of, of_session, relative
from test_start import offline
from torch import Tensor
from torch.nn.functional import cross_entropy

from vllm_ttt import families, plugin, support
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.tiny import ARCHITECTURES as TINY
from vllm_ttt.geometry import Geometry
from vllm_ttt.plugin import engine_args
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.deltas import peft
from vllm_ttt.worker.step.attention import Layout
from vllm_ttt.worker.step.micro_step import Tail, accumulate
from vllm_ttt.worker.step.qkv import Past
from vllm_ttt.worker.step.tail import build_tail, find_modules

pytestmark = pytest.mark.unit

IDS = torch.randint(20, 320, (60,), generator=torch.Generator().manual_seed(3)).tolist()


def test_every_name_has_its_test() -> None:
    of_tiny = {
        "llama": "LlamaForCausalLM",
        "mistral": "MistralForCausalLM",
        "qwen2": "Qwen2ForCausalLM",
        "qwen3": "Qwen3ForCausalLM",
    }
    assert set(families.BY_NAME) == {*twins.TWINS, *(of_tiny[name] for name in TINY)}


def step(tail: Tail, delta: Delta, h: Tensor, a: Tensor) -> tuple[float, Delta]:
    """Loss and gradient of IDS as one chunk, whose request begins with it."""
    N = len(IDS) - 1
    none = [torch.zeros(0, w.kv_heads, w.head) for w in tail.attentions]
    past = Past(Layout.of([0], N), torch.arange(N), torch.zeros(0, dtype=torch.int64), Kept(none, none))
    entering, outputs = tail.entering(h[None, :N].float(), a[None, :N].float(), torch.tensor([IDS[:-1]]))
    grad, w = tail.zeros(1), torch.full((1, N), 1 / N)
    loss = accumulate(tail, delta, entering, outputs, torch.tensor([IDS[1:]]), w, grad, past)
    return loss.item(), grad


def beside(theirs: twins.Theirs, tail: Any) -> tuple[float, float, list[tuple[Tensor, Tensor]]]:
    """Under one random delta: the step's loss and transformers', and of each B both gradients."""
    shapes, drawn = tail.zeros(1), torch.Generator().manual_seed(4)
    delta = shapes.by(*(torch.randn(x.shape, generator=drawn) * 0.05 for x in shapes.tensors()))
    B = [{k: x.double().requires_grad_() for k, x in layer.items()} for layer in of_session(delta, 0)]
    A = {k: a.double() for k, a in zip("ogud", (tail.ao_RQ, tail.ai_RD, tail.ai_RD, tail.ad_RF), strict=True)}
    expected, seen = theirs.loss(B, A, IDS)
    grads = torch.autograd.grad(expected, [x for layer in B for x in layer.values()])
    loss, grad = step(tail, delta, seen["h"].detach(), seen["a"].detach())
    return loss, expected.item(), list(zip([x for b in of_session(grad, 0) for x in b.values()], grads, strict=True))


@pytest.mark.parametrize("name", twins.TWINS)
def test_the_gradient_is_that_of_transformers(distributed: None, tmp_path: Path, name: str) -> None:  # noqa: F811
    """Biases, one slice for gate and up, a part of a head that is turned, a language model inside another."""
    twin, folder = twins.TWINS[name], twins.write(name, tmp_path)
    theirs, model = twins.Theirs(name, folder), loaded(folder)
    for layers in (1, 2, 3) if twin.deep else (1,):
        config = config_of(layers)
        tail = build_tail(model, as_with_lora(find_modules(model, layers)), config.adapt, 1024)
        assert (tail.embedding_VD is not None) == (layers == 3 and twin.text is None)
        loss, expected, grads = beside(theirs, tail)
        assert loss == pytest.approx(expected, abs=1e-4)
        for one, other in grads:
            assert relative(one, other) < 1e-3


@pytest.mark.parametrize("name", twins.TWINS)
def test_the_start_knows_it(tmp_path: Path, name: str) -> None:
    """It gets LoRA slots on the layers where they are, and its adapters are named as transformers names them."""
    twin, folder = twins.TWINS[name], twins.write(name, tmp_path)
    options: dict[str, Any] = {"model": str(folder), "skip_tokenizer_init": True}
    made = offline(**options, **engine_args("last")).create_engine_config()
    path = "model.layers" if twin.text is None else "language_model.model.layers"
    assert made.lora_config.target_modules == [
        f"{path}.2.{part}" for part in ("self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")
    ]
    *_, model, deep, last, head = plugin.check(str(folder))
    assert (deep.ok, last.ok, head.ok) == families.served(families.BY_NAME[name]), "README's table says the same"
    assert model.ok
    geometry = support.geometry_of(made.model_config, config_of(1))
    assert geometry.peft == twin.layers
    assert geometry.packed == (twin.kind == "phi3")
    if twin.deep:
        assert len(offline(**options, **engine_args("deep")).create_engine_config().lora_config.target_modules) == 6
        return
    with pytest.raises(ConfigError, match=r"the preset deep cannot learn through .*; serve with --ttt-preset last"):
        offline(**options, **engine_args("deep")).create_engine_config()


@pytest.mark.parametrize("name", ["Phi3ForCausalLM", "LlavaForConditionalGeneration"])
def test_peft_loads_its_adapter(tmp_path: Path, name: str) -> None:
    """Gate and up as one module, layers below a language model: what is exported says what the plain loop says, and can be read
    back."""
    from peft import PeftModel

    theirs, config = twins.Theirs(name, twins.write(name, tmp_path / "model")), config_of(2)
    text = theirs.model.config.get_text_config()
    geometry = Geometry.of(text, config.adapt, families.layers_of([name], text))
    drawn = torch.Generator().manual_seed(5)
    deltas = {module: torch.randn(shape, generator=drawn) * 0.05 for module, shape in geometry.shapes.items()}
    projections = peft.projections(geometry, torch.float32)
    data = peft.adapter(deltas, projections, geometry, "it", {})
    settings = peft.config(geometry, "it")
    found = peft.read_adapter(data, settings, geometry)
    assert all(torch.equal(found[module], b) for module, b in deltas.items())

    parts = iter(b.double() for b in deltas.values())
    B = [dict(zip("ogud", (next(parts), *next(parts).chunk(2), next(parts)), strict=True)) for _ in range(2)]
    widths = {"o": geometry.attention, "g": geometry.hidden, "u": geometry.hidden, "d": geometry.feed_forward}
    nothing = [{k: torch.zeros_like(b) for k, b in layer.items()} for layer in B]
    plain, expected = (theirs.loss(b, {k: projections[w].double() for k, w in widths.items()}, IDS)[0] for b in (nothing, B))
    assert abs(plain - expected) > 0.01, "the delta changes nothing: the comparison would prove nothing"
    (tmp_path / "adapter_model.safetensors").write_bytes(data)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    adapted = PeftModel.from_pretrained(theirs.model, str(tmp_path))
    with torch.no_grad():
        logits = adapted(torch.tensor([IDS])).logits[0, :-1]
    assert cross_entropy(logits, torch.tensor(IDS[1:])).item() == pytest.approx(expected.item(), abs=1e-4)


def test_a_wrapper_of_another_language_model_is_offered_the_head() -> None:
    class Text:
        model_type, hidden_act = "gemma3_text", "silu"

    with pytest.raises(ConfigError, match="LlavaForConditionalGeneration with a language model of the type gemma3_text"):
        families.layers_of(["LlavaForConditionalGeneration"], Text)
