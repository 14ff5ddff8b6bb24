"""From a loaded vLLM model to the `Tail` that the micro-step works on, for each supported architecture.

Llama, Mistral, Qwen2 and Qwen3 name the modules of their last layer alike and differ before o_proj only, so one spec
serves them all; another family gets another entry in ARCHITECTURES.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vllm_ttt.errors import ConfigError
from vllm_ttt.worker.micro_step import Tail


@dataclass(frozen=True)
class TailSpec:
    """Where the parts of the tail are: attribute paths from the causal-LM module, ``{layer}`` being the last one."""

    layer: str = "model.layers"
    o_proj: str = "self_attn.o_proj"
    norm: str = "post_attention_layernorm"
    gate_up_proj: str = "mlp.gate_up_proj"
    down_proj: str = "mlp.down_proj"
    final_norm: str = "model.norm"


ARCHITECTURES = {
    "LlamaForCausalLM": TailSpec(),
    "MistralForCausalLM": TailSpec(),
    "Qwen2ForCausalLM": TailSpec(),
    "Qwen3ForCausalLM": TailSpec(),
}


@dataclass(frozen=True)
class TailModules:
    """The live modules; o_proj, gate_up_proj and down_proj are vLLM's LoRA wrappers. ``names`` are their full names."""

    o_proj: Any
    norm: Any
    gate_up_proj: Any
    down_proj: Any
    final_norm: Any
    lm_head: Any
    names: dict[str, str]


def find_modules(model: nn.Module) -> TailModules:
    """Raises ConfigError where the architecture has no spec."""
    spec = ARCHITECTURES.get(type(model).__name__)
    if spec is None:
        raise ConfigError(f"no tail for {type(model).__name__}; there is one for {', '.join(ARCHITECTURES)}")
    layers = model.get_submodule(spec.layer)
    prefix = f"{spec.layer}.{len(layers) - 1}"  # type: ignore[arg-type]
    get = lambda path: model.get_submodule(f"{prefix}.{path}")  # noqa: E731
    return TailModules(
        get(spec.o_proj),
        get(spec.norm),
        get(spec.gate_up_proj),
        get(spec.down_proj),
        model.get_submodule(spec.final_norm),
        model.get_submodule("lm_head"),
        {
            "o": f"{prefix}.{spec.o_proj}",
            "gu": f"{prefix}.{spec.gate_up_proj}",
            "d": f"{prefix}.{spec.down_proj}",
        },
    )


def build_tail(model: Any, modules: TailModules, rank: int, seed: int) -> Tail:
    """Collect the frozen weights and draw the projections A.

    The weights keep the model's dtype. A is rounded to it too, as it stands in vLLM's LoRA slots.
    """
    vocab = model.config.vocab_size
    head = modules.lm_head.weight.data[:vocab]
    wo, wgu, wd = (dense_weight(m.base_layer, head.dtype) for m in (modules.o_proj, modules.gate_up_proj, modules.down_proj))
    F = wd.shape[1]
    norm = lambda w: torch.linalg.vector_norm(w.float()).item()  # noqa: E731
    projection = lambda width: make_projection(width, rank, seed).to(head)  # noqa: E731
    bias = lambda m: None if m.base_layer.bias is None else m.base_layer.bias.data.float()  # noqa: E731
    return Tail(
        wo_DQ=wo,
        wgu_2FD=wgu,
        wd_DF=wd,
        head_VD=head,
        ln_D=modules.norm.weight.data.float(),
        lnf_D=modules.final_norm.weight.data.float(),
        eps=modules.norm.variance_epsilon,
        eps_f=modules.final_norm.variance_epsilon,
        ao_RQ=projection(wo.shape[1]),
        ai_RD=projection(wgu.shape[1]),
        ad_RF=projection(F),
        norm={"o": norm(wo), "g": norm(wgu[:F]), "u": norm(wgu[F:]), "d": norm(wd)},
        bo_D=bias(modules.o_proj),
        bgu_2F=bias(modules.gate_up_proj),
        bd_D=bias(modules.down_proj),
        logit_scale=model.logits_processor.scale,
        soft_cap=model.logits_processor.soft_cap,
    )


def make_projection(width: int, rank: int, seed: int) -> Tensor:
    """A: [rank, width] float32 with orthonormal rows, the same on every machine for one seed."""
    if rank > width:
        raise ConfigError(f"adapt.rank {rank} is larger than the width {width} of an adapted layer; choose a smaller rank")
    gaussian = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(gaussian)[0].T.contiguous()


def dense_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """A linear layer's weight as [out, in].

    vLLM's CPU backend packs unquantised weights and leaves ``layer.weight`` empty, so they are read through the layer itself.
    """
    weight = layer.weight.data
    if weight.numel():
        return weight
    eye = torch.eye(layer.input_size_per_partition, dtype=dtype)
    return layer.quant_method.apply(layer, eye, None).T.contiguous()
