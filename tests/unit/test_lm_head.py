"""lm_head is found in a model that vLLM has loaded, or the model is refused; and what the start says of the preset `head`."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import families
import pytest
import quantised
import torch
from test_deep_tail import distributed, loaded  # noqa: F401
from test_start import MODEL, changed_model, offline
from torch import Tensor

from vllm_ttt import plugin
from vllm_ttt.config import parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.tiny import tiny_model
from vllm_ttt.plugin import engine_args
from vllm_ttt.worker.step.lm_head import build_head, find_head

pytestmark = pytest.mark.unit

CPU = torch.device("cpu")
ADAPT = parse_config({"adapt": {"rank": 16}}, "head").adapt


@pytest.fixture(scope="module")
def model(distributed: None, tmp_path_factory: pytest.TempPathFactory) -> Any:  # noqa: F811
    return loaded(tiny_model("qwen2", tmp_path_factory.mktemp("tiny"), max_position_embeddings=1024), "bfloat16")


def find(model: Any, hidden: int = 64) -> Any:
    return find_head(model, hidden, torch.bfloat16, CPU)


def test_lm_head_is_the_models_own(model: Any) -> None:
    head = build_head(find(model), ADAPT, 16, torch.bfloat16)
    assert tuple(head.head_VD.shape) == (320, 64), "the vocabulary without vLLM's padding"
    if head.head_VD.dtype == torch.bfloat16:  # else this CPU has no products of 16 bits
        assert head.head_VD.data_ptr() == model.lm_head.weight.data_ptr(), "no copy"
    eye = head.ay_RD.float() @ head.ay_RD.float().T
    assert torch.allclose(eye, torch.eye(16), atol=0.02)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_it_is_found_in_any_architecture(distributed: None, tmp_path: Path, family: str) -> None:  # noqa: F811
    """A mixture of experts; an embedding for lm_head; a bias; vLLM's Transformers backend: as transformers has it."""
    from vllm_ttt.eval.oracle import load_model

    folder = families.write(family, tmp_path)
    for preset in ("deep", "last"):
        with pytest.raises(ConfigError, match=r"is not supported with --plugin ttt.*Or serve with --ttt-preset head"):
            offline(model=str(folder), **engine_args(preset)).create_engine_config()
    assert offline(model=str(folder), **engine_args("head")).create_engine_config().lora_config is None
    theirs: Any = load_model(folder)  # first: vLLM's Transformers backend changes its classes
    head = build_head(find_head(loaded(folder), 128, torch.float32, CPU), ADAPT, 16, torch.float32)
    output = theirs.get_output_embeddings()
    assert torch.equal(head.head_VD, output.weight)
    assert (head.bias_V is None) == (output.bias is None)
    assert head.bias_V is None or torch.equal(head.bias_V, output.bias)
    assert (head.logit_scale, head.soft_cap) == (1.0, getattr(theirs.config, "final_logit_softcapping", None))


class Wrapped:
    """A model that does something of its own about its logits."""

    def __init__(self, model: Any, compute: Any):
        self.compute_logits = lambda states: compute(model, states)


@pytest.mark.parametrize(
    ("compute", "says"),
    [
        (lambda m, y: m.compute_logits(y / y.norm()), "it changes the last hidden state before lm_head"),
        (lambda m, y: m.compute_logits(y) * 2, "it changes its logits after lm_head"),
        (lambda m, y: m.compute_logits(y) + m.compute_logits(y), "it calls vLLM's LogitsProcessor 2 times"),
        (lambda m, y: y @ m.lm_head.weight[:, : y.shape[1]].T, "it calls vLLM's LogitsProcessor 0 times"),
        (lambda m, y: None, "it calls vLLM's LogitsProcessor 0 times"),
    ],
)
def test_other_logits_are_refused(model: Any, compute: Any, says: str) -> None:
    with pytest.raises(
        ConfigError, match=f"Wrapped is not supported with the preset head.*{re.escape(says)}.*; serve without ttt"
    ):
        find(Wrapped(model, compute))
    assert find(model).lm_head is model.lm_head, "and vLLM's class is as it was"


def test_states_of_another_width_are_refused(model: Any) -> None:
    with pytest.raises(ConfigError, match=r"its logits of states 48 wide cannot be computed \(lm_head takes 64\)"):
        find(model, 48)


class Quantised:
    """lm_head in eight bits, which its product alone can read."""

    def __init__(self, weight: Tensor, wrong: float = 1.0):
        self.scale = weight.abs().amax(1, keepdim=True) / 127
        self.packed, self.wrong, self.calls = (weight / self.scale).round().to(torch.int8), wrong, 0

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        self.calls += 1
        wrong = self.wrong if self.calls > 1 else 1.0  # the first call is the model's own
        return (x.float() @ (self.packed * self.scale).T * wrong).to(x.dtype)


def in_eight_bits(model: Any, monkeypatch: pytest.MonkeyPatch, wrong: float = 1.0) -> Any:
    weight = model.lm_head.weight.data.float()
    monkeypatch.setattr(model.lm_head, "quant_method", Quantised(weight, wrong))
    return find(model)


def test_a_quantised_lm_head_is_read_through_its_product(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = build_head(in_eight_bits(model, monkeypatch), ADAPT, 16, torch.bfloat16)
    weight = model.lm_head.weight.data[:320].float()
    assert ((head.head_VD.float() - weight).norm() / weight.norm()).item() < 0.02


def test_what_cannot_be_read_is_refused(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = in_eight_bits(model, monkeypatch, wrong=1.5)
    with pytest.raises(ConfigError, match=r"lm_head \(Quantised\) cannot be read: logits made of it are off by 50"):
        build_head(found, ADAPT, 16, torch.bfloat16)


def test_no_lora_at_start() -> None:
    """LoRA would change the kernels of a mixture of experts, and with them the bits of base requests."""
    made = offline(**engine_args("head")).create_engine_config()
    assert made.lora_config is None
    assert made.parallel_config.worker_cls.endswith("TTTCPUWorker")


def test_what_no_layer_can_is_offered_the_head(tmp_path: Path) -> None:
    """An architecture, an activation, weights: each refusal says the way out, and that is one."""
    for file in MODEL.iterdir():
        if file.suffix == ".json":
            shutil.copy(file, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    gemma = {"architectures": ["GemmaForCausalLM"], "model_type": "gemma"}
    for change in (gemma, {"hidden_act": "gelu"}, {"quantization_config": quantised.INT8}):
        found = config | change
        (tmp_path / "config.json").write_text(json.dumps(found))
        rows = {row.what: row for row in plugin.check(str(tmp_path))[-4:]}
        says = f"{found['architectures'][0]}, 8 layers, hidden 384, vocabulary 8192"
        says += ", quantised (compressed-tensors)" if "quantization_config" in change else ""
        assert rows[f"model {tmp_path}"][1:] == (True, says, True)
        assert rows["--ttt-preset head"][1:] == (True, says, False)
        for preset in ("deep", "last"):
            row = rows[f"--ttt-preset {preset}"]
            assert not row.ok
            assert "Or serve with --ttt-preset head" in row.why
            assert plugin.check(str(tmp_path), preset)[-1][1:] == (False, row.why, True)


def test_what_is_no_model_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in (str(tmp_path / "missing"), str(tmp_path / "empty"), "no such name"):
        says = f"there is no model at {name}: name a folder with config.json, or a name on a hub"
        assert [row[1:] for row in plugin.check(name) if not row.ok] == [(False, says, True)]
    (config := tmp_path / "empty" / "config.json").write_text('{"model_type": "of-next-year"}')
    (row,) = [row for row in plugin.check(str(config.parent)) if not row.ok]
    assert "`of-next-year`" in row.why


def test_the_head_of_another_activation_starts(tmp_path: Path) -> None:
    model = changed_model(tmp_path, hidden_act="gelu")
    options: dict[str, Any] = {"skip_tokenizer_init": True, **engine_args("head")}
    assert offline(model=model, **options).create_engine_config().lora_config is None


def test_an_encoder_decoder_model_is_refused(tmp_path: Path) -> None:
    model = changed_model(tmp_path, is_encoder_decoder=True)
    says = "an encoder-decoder model is not supported with the preset head; serve without ttt"
    assert plugin.check(model, "head")[-1][1:] == (False, says, True)
