"""Which models can be served with which preset: what the start, `vllm-ttt check` and README's table know of architectures.

Imports no torch and no vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from vllm_ttt.errors import ConfigError

#: What else there is where the other presets cannot be served.
HEAD_INSTEAD = "Or serve with --ttt-preset head, which learns on the last hidden state alone, of any such model"
#: What else there is where deep cannot be served.
LAST_INSTEAD = "serve with --ttt-preset last, or with head"

#: Positions of three numbers each, where there are images; the step knows positions of one.
_MROPE = "its rotary embedding counts images in three dimensions"


@dataclass(frozen=True)
class Family:
    """Causal language models whose layers the step knows (worker/step/tail.py), or multimodal wrappers of them."""

    #: for people
    called: str
    #: in the model's config.json
    names: tuple[str, ...]
    #: why the preset deep cannot serve them; "": it can
    not_deep: str = ""
    #: gate and up are one module of the checkpoint, not two
    packed: bool = False
    #: the language model is a part of them
    wrapper: bool = False


FAMILIES = (
    Family(
        "Llama",
        (
            "LlamaForCausalLM", "LLaMAForCausalLM", "InternLM3ForCausalLM", "IQuestCoderForCausalLM",
            "TeleChat3ForCausalLM",
        ),
    ),
    Family("Mistral, Ministral", ("MistralForCausalLM", "Ministral3ForCausalLM")),
    Family("Qwen2, Qwen3", ("Qwen2ForCausalLM", "Qwen3ForCausalLM")),
    Family("Phi-3, Phi-4", ("Phi3ForCausalLM",), packed=True),
    Family("ERNIE 4.5", ("Ernie4_5ForCausalLM",), "its rotary embedding turns neighbours"),
    Family(
        "LLaVA, InternVL, Mistral Small 3",
        (
            "LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration", "InternVLForConditionalGeneration",
            "Mistral3ForConditionalGeneration",
        ),
        wrapper=True,
    ),
    Family(
        "Qwen2-VL, Qwen2.5-VL, Qwen3-VL",
        ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration", "Qwen3VLForConditionalGeneration"),
        _MROPE,
        wrapper=True,
    ),
)  # fmt: skip
BY_NAME = {name: family for family in FAMILIES for name in family.names}

#: What the presets `deep` and `last` do not know.
OTHERS = "other causal models (MoE, Gemma, gpt-oss)"
ENCODER_DECODER = "an encoder-decoder model"
#: Weights and activations of eight bits that are integers, on a CPU: vLLM has no LoRA there.
INT8_ON_CPU = "INT8 weights and activations on a CPU"

#: transformers' types of language models inside wrappers, and their architectures.
TEXT_TYPES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral3": "Ministral3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3ForCausalLM",
    "phi3": "Phi3ForCausalLM",
}


@dataclass(frozen=True)
class Layers:
    """Where the layers of a model are, and what of them is special."""

    #: from vLLM's model
    path: str = "model.layers"
    #: from transformers' model, as an adapter of PEFT names them
    peft: str = "model.layers"
    packed: bool = False
    not_deep: str = ""


def layers_of(architectures: list[str] | None, text: Any) -> Layers:
    """``text``: the Hugging Face configuration of the language model. Raises ConfigError where no layer can have a delta."""
    name = (architectures or ["unknown"])[0]
    family = BY_NAME.get(name)
    if family is None:
        raise ConfigError(
            f"architecture {name} is not supported with --plugin ttt by the presets deep and last, which know "
            f"{'; '.join(family.called for family in FAMILIES)}. A new one needs a tail in vllm_ttt/worker/step/tail.py"
        )
    inner, not_deep = family, family.not_deep
    if family.wrapper:
        kind = getattr(text, "model_type", "unknown")
        found = BY_NAME.get(TEXT_TYPES.get(kind, ""))
        if found is None:
            raise ConfigError(f"{name} with a language model of the type {kind} is not supported with --plugin ttt")
        inner, not_deep = found, not_deep or found.not_deep
    if (activation := getattr(text, "hidden_act", "silu")) != "silu":
        raise ConfigError(f"hidden_act {activation!r} is not supported with --plugin ttt: the tail knows silu alone")
    if family.wrapper:
        return Layers("language_model.model.layers", "model.language_model.layers", inner.packed, not_deep)
    return Layers(packed=inner.packed, not_deep=not_deep)


def check_weights(quantised: Any, on_cpu: bool) -> None:
    """Raise ConfigError where vLLM has no LoRA on a model's quantised layers.

    Args:
        quantised: ``quantization_config`` of the model's config.json; None where there is none.
    """
    groups = quantised.get("config_groups", {}) if isinstance(quantised, dict) else {}
    inputs = [group.get("input_activations") or {} for group in groups.values()]
    if on_cpu and any(x.get("type") == "int" for x in inputs):
        raise ConfigError(f"{INT8_ON_CPU} are not supported by the presets deep and last: vLLM's LoRA cannot be used there")


def served(family: Family) -> tuple[bool, bool, bool]:
    """With `deep`, with `last`, with `head`."""
    return not family.not_deep, True, True


def table() -> Iterable[tuple[str, tuple[str, ...], tuple[bool, bool, bool], str]]:
    """(what, its names in config.json, whether `deep`, `last` and `head` serve it, why not): the source of README's table."""
    for family in FAMILIES:
        yield family.called, family.names, served(family), family.not_deep
    yield OTHERS, (), (False, False, True), "the step does not know their layers"
    yield INT8_ON_CPU, (), (False, False, True), "vLLM has no LoRA there"
    yield "encoder-decoder models", (), (False, False, False), "no causal language model"
