"""Whoever is refused at the start reads what to do instead: every refusal of a model, of an option and of a setting."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import vllm_ttt
from vllm_ttt import families, plugin, support
from vllm_ttt.config import parse_config
from vllm_ttt.errors import ConfigError

pytestmark = pytest.mark.unit

#: Where a start refuses a model, an option of vLLM's or what they leave no room for.
MODULES = (
    "support", "placement", "tensor_parallel", "geometry", "worker.memory", "worker.sites", "worker.capture.kv_cache",
    "worker.step.lm_head", "worker.step.tail", "worker.step.fp8", "worker.step.weights", "worker.step.qkv", "worker.step.block",
    "worker.step.head", "engine.limits.filter", "engine.limits.probe",
)  # fmt: skip
#: How a way out begins.
WAY_OUT = re.compile(
    r"allowed: |(; |\. Or |\. |\n|: |, or )"
    r"([Ss]erve|leave|unset|set|take|choose|name|subclass|lower|install|Raise|adapt\.layers may)\b"
)


def refusals(module: str) -> list[tuple[str, str]]:
    """(where, message) of each ConfigError that a module raises, with the constants in it, and {} for all else."""
    loaded = importlib.import_module(f"vllm_ttt.{module}")
    path = Path(vllm_ttt.__file__).parent.joinpath(*module.split(".")).with_suffix(".py")

    def text(node: ast.expr) -> str:
        match node:
            case ast.Constant(value=value):
                return str(value)
            case ast.JoinedStr(values=values):
                return "".join(text(value) for value in values)
            case ast.FormattedValue(value=ast.Name(id=name)) | ast.Name(id=name):
                found = getattr(loaded, name, None)
                return found if isinstance(found, str) else "{}"
            case ast.FormattedValue(value=ast.Attribute()):
                return "{}"
            case ast.BinOp(left=left, right=right):
                return text(left) + text(right)
        return "{}"

    calls = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return [(f"{module}:{c.lineno}", text(c.args[0])) for c in calls if getattr(c.func, "id", None) == "ConfigError"]


def test_every_refusal_of_the_start_names_the_way_out() -> None:
    found = [refusal for module in MODULES for refusal in refusals(module)]
    assert len(found) > 30, "they are not found"
    assert [(where, message) for where, message in found if not WAY_OUT.search(message)] == []


def refused(architecture: str, preset: str = "last", on_cpu: bool = True, quantised: Any = None, **text: Any) -> str:
    with pytest.raises(ConfigError) as error:
        support._check_layered([architecture], SimpleNamespace(**text), quantised, on_cpu, preset)
    return str(error.value)


INT8 = {"config_groups": {"group_0": {"input_activations": {"type": "int", "num_bits": 8}}}}


@pytest.mark.parametrize(
    "message",
    [
        lambda: refused("Qwen3MoeForCausalLM"),
        lambda: refused("LlavaForConditionalGeneration", model_type="gemma"),
        lambda: refused("LlamaForCausalLM", hidden_act="gelu"),
        lambda: refused("LlamaForCausalLM", quantised=INT8),
    ],
    ids=["architecture", "language model", "activation", "quantisation"],
)
def test_what_no_layer_can_learn_is_offered_the_head(message: Any) -> None:
    assert message().endswith(families.HEAD_INSTEAD)


@pytest.mark.parametrize("family", [f for f in families.FAMILIES if f.not_deep], ids=lambda family: family.called)
def test_what_deep_cannot_learn_is_offered_another_preset(family: families.Family) -> None:
    says = refused(family.names[0], "deep", model_type="qwen2")
    assert family.not_deep in says
    assert says.endswith(families.LAST_INSTEAD)


def drafting(method: str, device: str = "cpu", preset: str = "head", adaptive: bool = False, **config: Any) -> None:
    drafts = SimpleNamespace(method=method, enable_adaptive_verification=adaptive)
    support._check_drafts(
        SimpleNamespace(speculative_config=drafts, device_config=SimpleNamespace(device_type=device)),
        parse_config(config, preset),
    )


@pytest.mark.parametrize("method", support.DRAFTS_FROM_TOKENS)
@pytest.mark.parametrize("preset", ["deep", "last", "head"])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_drafts_that_are_made_from_tokens(method: str, preset: str, device: str) -> None:
    drafting(method, device, preset)


@pytest.mark.parametrize("method", support.DRAFTS_FROM_STATES)
def test_drafts_that_are_made_from_states_never_see_a_delta(method: str) -> None:
    """Those of `deep` and `last` are in them; `head` moves a copy."""
    drafting(method)
    for preset in ("deep", "last"):
        with pytest.raises(ConfigError, match=r"delta.*; serve with --ttt-preset head, or take the method ngram"):
            drafting(method, preset=preset)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"method": "medusa"}, "take the method ngram"),
        ({"method": "draft_model"}, "take the method ngram"),
        ({"method": "eagle", "adaptive": True}, "leave enable_adaptive_verification out"),
        ({"method": "ngram", "device": "cuda", "learn": {"tokens": "all"}}, "set learn.tokens to prompt"),
    ],
)
def test_drafts_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=f"{says}$|{says}, "):
        drafting(**options)


def test_answers_are_learned_beside_drafts_where_the_worker_knows_what_was_accepted() -> None:
    drafting("ngram", "cpu", learn={"tokens": "all"})


def test_check_says_the_way_out(tmp_path: Path) -> None:
    """`vllm-ttt check` of a model that the default cannot serve."""
    (tmp_path / "config.json").write_text('{"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}')
    rows = {row.what: row for row in plugin.check(str(tmp_path))}
    assert [rows[f"--ttt-preset {preset}"].ok for preset in ("deep", "last", "head")] == [False, False, True]
    assert rows["--ttt-preset deep"].why.endswith(families.HEAD_INSTEAD)
