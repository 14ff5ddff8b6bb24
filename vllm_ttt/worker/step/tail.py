"""From a loaded vLLM model to the `Tail` that the micro-step works on, for each supported architecture.

Llama, Mistral, Qwen2, Qwen3 and Phi-3 name the modules of a layer alike, and in their attention differ by biases, norms and
rotary tables alone, so one spec serves them all; another family gets another entry in ARCHITECTURES. Names are those of vLLM's
classes, which serve several architectures each (families.py).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from vllm_ttt.config import AdaptConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.families import HEAD_INSTEAD
from vllm_ttt.log import logger_of
from vllm_ttt.worker.ranks import ALONE, Ranks
from vllm_ttt.worker.step import attention, fp8, weights
from vllm_ttt.worker.step.block import Block
from vllm_ttt.worker.step.micro_step import Tail
from vllm_ttt.worker.step.products import Back, Served
from vllm_ttt.worker.step.qkv import QKV, HeadNorm

logger = logger_of(__name__)

#: Rotary embeddings of vLLM that are a table of cosines and sines by position, and nothing else.
ROTARY = ("RotaryEmbedding", "Llama3RotaryEmbedding", "LinearScalingRotaryEmbedding", "YaRNScalingRotaryEmbedding")
#: One that has two such tables, of which it uses one: Phi-3's.
TWO_TABLES = "Phi3LongRoPEScaledRotaryEmbedding"


@dataclass(frozen=True)
class TailSpec:
    """Where the parts of the tail are: attribute paths from the causal-LM module (``embedding``, ``layers``, ``final_norm``) or
    from a layer."""

    embedding: str = "model.embed_tokens"
    layers: str = "model.layers"
    attention_norm: str = "input_layernorm"
    attention: str = "self_attn"
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
    "Qwen3LLMForCausalLM": TailSpec(),
    "Phi3ForCausalLM": TailSpec(),
    "Ernie4_5ForCausalLM": TailSpec(),
}


@dataclass(frozen=True)
class LayerModules:
    """The live modules of one adapted layer; those of o_proj, gate_up_proj and down_proj that are adapted are vLLM's LoRA
    wrappers. ``names`` are their full names, by "o", "gu" and "d". ``attention`` has qkv_proj, rotary_emb, attn and, with
    Qwen3, q_norm and k_norm.
    """

    attention_norm: Any
    attention: Any
    o_proj: Any
    norm: Any
    gate_up_proj: Any
    down_proj: Any
    names: dict[str, str]


@dataclass(frozen=True)
class TailModules:
    """``layers``: the adapted ones, lowest first. ``adapted``: the adapted modules, a part of "ogud". ``embedding``: where the
    layers are all of the model's, so that the step begins there."""

    layers: tuple[LayerModules, ...]
    final_norm: Any
    lm_head: Any
    adapted: str = "ogud"
    embedding: Any = None

    @property
    def attending(self) -> tuple[LayerModules, ...]:
        """The layers whose attention the step computes."""
        return self.layers if self.embedding is not None else self.layers[1:]

    @property
    def names(self) -> list[str]:
        """Full names of all adapted modules."""
        return [name for layer in self.layers for letters, name in layer.names.items() if letters in self.adapted]

    @property
    def adapting(self) -> list[Any]:
        """vLLM's LoRA wrappers of all adapted modules."""
        parts = (("o", "o_proj"), ("gu", "gate_up_proj"), ("d", "down_proj"))
        return [getattr(layer, part) for layer in self.layers for letters, part in parts if letters in self.adapted]

    @property
    def read(self) -> list[Any]:
        """The linear layers whose weights the step has, lm_head apart."""
        adapted = [part for layer in self.layers for part in (layer.o_proj, layer.gate_up_proj, layer.down_proj)]
        return adapted + [layer.attention.qkv_proj for layer in self.attending]

    @property
    def punica(self) -> Any:
        """vLLM's LoRA kernels, which all adapted modules share."""
        lowest = self.layers[0]
        by_letter = {"o": lowest.o_proj, "g": lowest.gate_up_proj, "d": lowest.down_proj}
        return next(m for letter, m in by_letter.items() if letter in self.adapted).punica_wrapper


def find_modules(model: nn.Module, layers: int = 1, adapted: str = "ogud", deep: bool = True) -> TailModules:
    """Those of the last ``layers`` layers; with ``deep`` the step begins at the embedding where those are all, and where the
    model is not one that has states besides those of its tokens.

    Raises ConfigError where the architecture has no spec.
    """
    inner, before = language_model(model)
    spec = ARCHITECTURES.get(type(inner).__name__)
    if spec is None:
        raise ConfigError(f"no tail for {type(inner).__name__}; there is one for {', '.join(ARCHITECTURES)}. {HEAD_INSTEAD}")
    count = len(inner.get_submodule(spec.layers))  # type: ignore[arg-type]

    def layer(i: int) -> LayerModules:
        prefix = f"{spec.layers}.{i}"
        names = {"o": spec.o_proj, "gu": spec.gate_up_proj, "d": spec.down_proj}
        paths = (spec.attention_norm, spec.attention, spec.o_proj, spec.norm, spec.gate_up_proj, spec.down_proj)
        found = (inner.get_submodule(f"{prefix}.{path}") for path in paths)
        return LayerModules(*found, names={k: f"{before}{prefix}.{name}" for k, name in names.items()})

    chosen = tuple(layer(i) for i in range(count - layers, count))
    embedding = inner.get_submodule(spec.embedding) if deep and layers == count and inner is model else None
    return TailModules(chosen, inner.get_submodule(spec.final_norm), inner.get_submodule("lm_head"), adapted, embedding)


def language_model(model: nn.Module) -> tuple[Any, str]:
    """The causal language model inside a multimodal one, and what its modules' full names begin with; or ``model`` itself."""
    inner: Any = model.get_language_model() if hasattr(model, "get_language_model") else model  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is inner)
    return inner, name and f"{name}."


def build_tail(
    model: Any, modules: TailModules, adapt: AdaptConfig, max_model_len: int, ranks: Ranks = ALONE, ways: str = "none"
) -> Tail:
    """Collect the model's weights and draw the projections A. ``ways``: `learn.fp8`.

    The weights are the model's, in the `step_dtype`. A is rounded to the model's dtype, as it stands in vLLM's LoRA slots. Of
    several ``ranks`` each has the part of the weights that vLLM gives it, and the same part of A, which is drawn whole.
    Raises ConfigError where the attention between adapted layers is one that the step does not follow, or where a weight cannot
    be read.
    """
    model, _ = language_model(model)
    vocab, norm = model.config.vocab_size, modules.final_norm.weight.data
    reader = Reader(norm.dtype, step_dtype(norm.dtype, norm.device), ways)
    first_token, own = vocabulary_of(modules.lm_head, vocab, ranks)
    head = reader.weight(modules.lm_head, "lm_head", own)
    drawn: dict[int, Tensor] = {}

    def projection(layer: Any, part: Ranks) -> Tensor:
        """A of modules like ``layer``, of which each rank of ``part`` has some inputs."""
        width = weights.shape(layer)[1] * part.size
        whole = make_projection(width, adapt.rank, adapt.seed).to(norm).to(reader.products)
        drawn[width] = whole = ranks.same(whole)
        return part.part(whole, 1).contiguous()

    lowest = modules.layers[0]
    ao, ai, ad = projection(lowest.o_proj, ranks), projection(lowest.gate_up_proj, ALONE), projection(lowest.down_proj, ranks)
    below = {key: a for key, a in (("o", ao), ("d", ad)) if key in adapt.letters}
    *lower, last = (_block(layer, reader, below) for layer in modules.layers)
    _share_norms([*lower, last], ranks)
    attentions = tuple(_qkv(layer, reader, max_model_len, ranks) for layer in modules.attending)
    if reader.errors:
        logger.info(
            "vllm-ttt: read the weights of %d quantised layers through their products; products with them differ from what is "
            "served by %.1f %% at most",
            len(reader.errors), 100 * max(reader.errors),
        )  # fmt: skip
    return Tail(
        **vars(last),
        modules=adapt.letters,
        head_VD=head,
        lnf_D=norm.float(),
        eps_f=modules.final_norm.variance_epsilon,
        ao_RQ=ao,
        ai_RD=ai,
        ad_RF=ad,
        logit_scale=model.logits_processor.scale,
        soft_cap=model.logits_processor.soft_cap,
        lower=tuple(lower),
        attentions=attentions,
        embedding_VD=None if modules.embedding is None else modules.embedding.weight.data[: max(own, 1)],  # of padding
        kernel=attention.choose(head.device, reader.products),
        ranks=ranks,
        first_token=first_token,
        tokens=vocab,
        drawn=None if ranks.size == 1 else drawn,
    )


def vocabulary_of(lm_head: Any, vocabulary: int, ranks: Ranks) -> tuple[int, int]:
    """The first token that this rank's part of lm_head, or of the embedding, is about, and how many, without vLLM's padding."""
    if ranks.size == 1:
        return 0, vocabulary
    shard = getattr(lm_head, "base_layer", lm_head).shard_indices
    first, end = (min(i, vocabulary) for i in (shard.org_vocab_start_index, shard.org_vocab_end_index))
    return first, end - first


def _share_norms(blocks: list[Block], ranks: Ranks) -> None:
    """Make the norms of weights of which each rank has a part those of the whole weights."""
    if ranks.size == 1:
        return
    squares = torch.tensor([[x**2 for x in block.norm.values()] for block in blocks], device=blocks[0].wo_DQ.device)
    for block, sizes in zip(blocks, ranks.total(squares).sqrt().tolist(), strict=True):
        block.norm = dict(zip(block.norm, sizes, strict=True))


def step_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Of the step's matrix products, given the model's: the same, but float32 on a CPU that has no kernel for it.

    There torch multiplies 16-bit numbers one by one: 1.4 against 80 GFLOP/s in float32 on a core of AMD's Zen 3.
    """
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    kernels = torch.ops.mkldnn
    fast = kernels._is_mkldnn_bf16_supported if dtype == torch.bfloat16 else kernels._is_mkldnn_fp16_supported
    return dtype if fast() else torch.float32


@dataclass
class Reader:
    """Reads the step's weights from live layers: those of a quantised layer are tried against what it serves."""

    #: the model's dtype, and that of the step's products
    dtype: torch.dtype
    products: torch.dtype
    #: on which ways products are in FP8
    ways: str = "none"
    #: of quantised layers
    errors: list[float] = field(default_factory=list)

    def weight(self, layer: Any, name: str, rows: int | None = None) -> Tensor:
        """[out, in], for the products of the step. ``name``: for people. ``rows``: as for `weights.dense`."""
        found = weights.dense(layer, self.dtype, rows)
        if not weights.is_plain(layer):
            self.errors.append(weights.error(layer, found, name))
        return found.to(self.products)

    def bias(self, layer: Any) -> Tensor | None:
        return weights.bias_of(layer, self.dtype)

    def frozen(self, layer: Any, weight: Tensor, name: str) -> Frozen:
        """``weight``, which was read from ``layer``, and what takes the place of products with it."""
        served = weights.product(layer, self.dtype)
        if self.ways == "none" or not fp8.fits(*weight.shape):
            return Frozen(weight, served, None)
        back = fp8.product(weight.T, name)
        if served is None and self.ways == "both":
            return Frozen(weight, fp8.product(weight, name), back)
        return Frozen(weight if served is None else weight.to("meta"), served, back)


@dataclass(frozen=True)
class Frozen:
    """A weight [out, in] of the step and its products, as `Block` has them."""

    weight: Tensor
    served: Served | None
    back: Back | None


def _block(layer: LayerModules, reader: Reader, below: dict[str, Tensor]) -> Block:
    """``below``: A of the modules whose weight it is to lie below, where `weights.joins` says so."""
    parts = {"o": layer.o_proj, "gu": layer.gate_up_proj, "d": layer.down_proj}
    wo, wgu, wd = dense = [reader.weight(part, layer.names[key]) for key, part in parts.items()]
    F = wd.shape[1]
    norm = lambda w: torch.linalg.vector_norm(w.float()).item()  # noqa: E731
    bo, bgu, bd = map(reader.bias, parts.values())
    frozen = {key: reader.frozen(part, w, layer.names[key]) for (key, part), w in zip(parts.items(), dense, strict=True)}
    joins = lambda key: weights.joins(parts[key], reader.products, reader.ways)  # noqa: E731
    joined = {key: weights.joined(parts[key], a) for key, a in below.items() if joins(key)}
    weight = lambda key: joined[key][: len(dense[0])] if key in joined else frozen[key].weight  # noqa: E731
    return Block(
        wo_DQ=weight("o"),
        wgu_2FD=weight("gu"),
        wd_DF=weight("d"),
        ln_D=layer.norm.weight.data.float(),
        eps=layer.norm.variance_epsilon,
        norm={"o": norm(wo), "g": norm(wgu[:F]), "u": norm(wgu[F:]), "d": norm(wd)},
        bo_D=bo,
        bgu_2F=bgu,
        bd_D=bd,
        served={key: x.served for key, x in frozen.items() if x.served is not None},
        back={key: x.back for key, x in frozen.items() if x.back is not None},
        joined=joined,
    )


def _qkv(layer: LayerModules, reader: Reader, max_model_len: int, ranks: Ranks) -> QKV:
    parts, rotary, name = layer.attention, layer.attention.rotary_emb, layer.names["o"].rpartition(".")[0]
    check_attention(parts, name, max_model_len)

    def head_norm(name: str) -> HeadNorm | None:
        norm = getattr(parts, name, None)
        return None if norm is None else HeadNorm(norm.weight.data.float(), norm.variance_epsilon)

    weight = reader.weight(parts.qkv_proj, f"{name}.qkv_proj")
    frozen = reader.frozen(parts.qkv_proj, weight, f"{name}.qkv_proj")
    return QKV(
        wqkv_XD=frozen.weight,
        ln_D=layer.attention_norm.weight.data.float(),
        eps=layer.attention_norm.variance_epsilon,
        heads=parts.attn.num_heads,
        kv_heads=parts.attn.num_kv_heads,
        scale=parts.attn.impl.scale,
        cos_sin_PI=_table(rotary),
        bqkv_X=reader.bias(parts.qkv_proj),
        q_norm=head_norm("q_norm"),
        k_norm=head_norm("k_norm"),
        served=frozen.served,
        back=frozen.back,
        ranks=ranks,
    )


def check_attention(parts: Any, name: str, max_model_len: int) -> None:
    """Raise ConfigError where a layer whose attention the step computes attends in a way that the step does not follow."""
    attn, rotary = parts.attn, parts.rotary_emb
    impl = attn.impl
    refusals = {
        "multi-head latent attention": getattr(attn, "use_mla", False),
        "attention of a kind of its own": type(attn).__name__ != "Attention",
        "a sliding window": attn.sliding_window is not None and attn.sliding_window < max_model_len,
        "ALiBi": getattr(impl, "alibi_slopes", None) is not None,
        "a soft cap on its scores": bool(getattr(impl, "logits_soft_cap", None)),
        "attention sinks": getattr(impl, "sinks", None) is not None,
        "a temperature by position": getattr(parts, "do_llama_4_scaling", False),
        f"attention of the type {attn.attn_type}": attn.attn_type != "decoder",
        f"the rotary embedding {type(rotary).__name__}": not _is_table(rotary),
    }
    for what, found in refusals.items():
        if found:
            raise ConfigError(f"{name} has {what}, which the preset deep cannot learn through; serve with adapt.preset last")


def _is_table(rotary: Any) -> bool:
    """Whether a rotary embedding turns halves of a head by a table of cosines and sines."""
    return type(rotary).__name__ == TWO_TABLES or (type(rotary).__name__ in ROTARY and rotary.is_neox_style)


def _table(rotary: Any) -> Tensor:
    """[positions, rotated part of a head], cosines beside sines."""
    if type(rotary).__name__ != TWO_TABLES:
        return rotary.cos_sin_cache
    short = rotary.original_max_position_embeddings
    return rotary.long_short_cos_sin_cache[short if rotary.use_long_rope else 0 :]


def make_projection(width: int, rank: int, seed: int) -> Tensor:
    """A: [rank, width] float32 with orthonormal rows, the same on every machine for one seed."""
    if rank > width:
        raise ConfigError(f"adapt.rank {rank} is larger than the width {width} of an adapted layer; choose a smaller rank")
    gaussian = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(gaussian)[0].T.contiguous()
