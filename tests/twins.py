"""Tiny random models of every name that `deep` and `last` serve besides those of eval/tiny.py, and what transformers says of
their deltas."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from vllm_ttt.config import TTTConfig
from vllm_ttt.eval.oracle import Loop, chunks, projection
from vllm_ttt.eval.tiny import SHAPE

WIDE: dict[str, Any] = {**SHAPE, "num_hidden_layers": 3, "max_position_embeddings": 1024, "tie_word_embeddings": False}
_WITHOUT_WIDTH = {k: v for k, v in WIDE.items() if k != "head_dim"}
#: Of a vision tower that makes four patches of an image.
_VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14, "num_channels": 3,
}  # fmt: skip
_QWEN_VISION: dict[str, Any] = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "in_channels": 3, "in_chans": 3, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_IMAGE: dict[str, Any] = {"image_token_id": 9, "video_token_id": 10, "vision_start_token_id": 11, "vision_end_token_id": 12}
_MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


@dataclass(frozen=True)
class Twin:
    """``kind``: transformers' model type. ``own``: of its configuration, over WIDE. ``text``: of its language model's, where
    that is a part of it; ``own`` is then the rest. ``named``: the architecture, where transformers calls it otherwise."""

    kind: str
    own: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None
    named: str | None = None
    deep: bool = True

    @property
    def layers(self) -> str:
        return "model.layers" if self.text is None else "model.language_model.layers"


_BIASES = {"attention_bias": True, "mlp_bias": True}


def long_rope(width: int) -> dict[str, Any]:
    """Phi-3's settings of the rotary embedding, for heads of that width of which three quarters are turned."""
    turned = [i / 8 for i in range(3 * width // 8)]
    factors = {"short_factor": [1 + x for x in turned], "long_factor": [2 + 8 * x for x in turned]}
    more = {"original_max_position_embeddings": 32, "partial_rotary_factor": 0.75}
    return {"rope_type": "longrope", "rope_theta": 10000.0, **factors, **more}


_PLAIN = {"rope_type": "default", "rope_theta": 10000.0}
TWINS = {
    "LLaMAForCausalLM": Twin("llama", named="LLaMAForCausalLM"),
    # A bias in each linear layer; InternLM3's configuration says of those of queries, keys and values by themselves.
    "InternLM3ForCausalLM": Twin("llama", _BIASES | {"qkv_bias": True}, named="InternLM3ForCausalLM"),
    "IQuestCoderForCausalLM": Twin("llama", named="IQuestCoderForCausalLM"),
    "TeleChat3ForCausalLM": Twin("llama", _BIASES, named="TeleChat3ForCausalLM"),
    "Ministral3ForCausalLM": Twin(
        "ministral3",
        {"rope_parameters": _PLAIN | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 1024}},
    ),
    # A part of each head is turned, by one of two tables.
    "Phi3ForCausalLM": Twin(
        "phi3", {"rope_parameters": long_rope(16), "original_max_position_embeddings": 32, "head_dim": 16}
    ),
    "Ernie4_5ForCausalLM": Twin("ernie4_5", deep=False),
    "LlavaForConditionalGeneration": Twin(
        "llava",
        {"vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": 9},
        {"model_type": "llama", **WIDE},
    ),
    "LlavaNextForConditionalGeneration": Twin(
        "llava_next",
        {
            "vision_config": {"model_type": "clip_vision_model", **_VISION}, "image_token_index": 9,
            "image_grid_pinpoints": [[28, 28]],
        },
        {"model_type": "mistral", **WIDE, "sliding_window": None},
    ),
    "InternVLForConditionalGeneration": Twin(
        "internvl",
        {
            "vision_config": {"model_type": "internvl_vision", **_VISION, "image_size": [28, 28], "patch_size": [14, 14]},
            "image_token_id": 9,
        },
        {"model_type": "qwen2", **_WITHOUT_WIDTH},
    ),
    "Mistral3ForConditionalGeneration": Twin(
        "mistral3",
        {"vision_config": {"model_type": "pixtral", **_VISION}, "image_token_index": 9},
        {"model_type": "mistral", **WIDE, "sliding_window": None},
    ),
    "Qwen2VLForConditionalGeneration": Twin(
        "qwen2_vl",
        {"vision_config": {**_QWEN_VISION, "embed_dim": 32, "hidden_size": 64}, **_IMAGE},
        {"model_type": "qwen2_vl_text", **_WITHOUT_WIDTH, "rope_parameters": {**_MROPE, "mrope_section": [2, 3, 3]}},
        deep=False,
    ),
    "Qwen2_5_VLForConditionalGeneration": Twin(
        "qwen2_5_vl",
        {"vision_config": {**_QWEN_VISION, "out_hidden_size": 64, "fullatt_block_indexes": [1]}, **_IMAGE},
        {"model_type": "qwen2_5_vl_text", **_WITHOUT_WIDTH, "rope_parameters": {**_MROPE, "mrope_section": [2, 3, 3]}},
        deep=False,
    ),
    "Qwen3VLForConditionalGeneration": Twin(
        "qwen3_vl",
        {
            "vision_config": {
                **_QWEN_VISION, "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
            },
            **_IMAGE,
        },
        {"model_type": "qwen3_vl_text", **WIDE, "rope_parameters": _MROPE},
        deep=False,
    ),
}  # fmt: skip


def write(name: str, folder: Path, own: dict[str, Any] | None = None, **shape: Any) -> Path:
    """Save a random model of a twin, in float32, without a tokenizer; returns ``folder``.

    Args:
        own: entries of the configuration beside that of the language model, over the twin's.
        shape: entries of the configuration (of the language model) over those of the twin.
    """
    from transformers import AutoConfig

    twin = TWINS[name]
    if twin.text is None:
        config = AutoConfig.for_model(twin.kind, **{**WIDE, **twin.own, **shape})
    else:
        config = AutoConfig.for_model(
            twin.kind, **twin.own | (own or {}), text_config={**twin.text, **shape}, tie_word_embeddings=False
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _auto(twin).from_config(config, dtype=torch.float32)
        for key, parameter in model.named_parameters():
            if key.endswith("norm.weight"):
                nn.init.uniform_(parameter, 0.5, 1.5)
            elif key.endswith("bias"):
                nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    if twin.own.get("vision_config", {}).get("model_type") == "clip_vision_model":
        _name_as_published(folder / "model.safetensors")
    if twin.named is not None:
        file = folder / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "architectures": [twin.named]}))
    return folder


def _name_as_published(file: Path) -> None:
    """transformers saves CLIP's tower under other names than those of the checkpoints that there are, and that vLLM knows."""
    named = {key.replace("vision_tower.", "vision_tower.vision_model."): tensor for key, tensor in load_file(file).items()}
    save_file(named, file, {"format": "pt"})


def _auto(twin: Twin) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForCausalLM if twin.text is None else AutoModelForImageTextToText


class Theirs:
    """Transformers' model of a twin, in float64, with a delta on some of its linear layers."""

    def __init__(self, name: str, folder: Path):
        self.twin = TWINS[name]
        self.model: Any = _auto(self.twin).from_pretrained(folder, dtype=torch.float64).eval().requires_grad_(False)
        self.layers: list[Any] = list(self.model.get_submodule(self.twin.layers))

    def loss(
        self,
        B: Sequence[dict[str, Tensor]],
        A: dict[str, Tensor],
        ids: list[int],
        pairs: Tensor | slice = slice(None),
        **more: Any,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss of some pairs of ``ids`` under the deltas B A of the last layers, and what enters the lowest of them: its
        stream "h" and its attention output "a".

        Args:
            B: by layer and letter. A: by letter. more: for the model, such as an image.
        """
        chosen, seen = self.layers[-len(B) :], dict[str, Tensor]()
        with self._adapted(chosen, B, A, seen):
            logits = self.model(torch.tensor([ids]), use_cache=False, **more).logits[0, :-1]
        return cross_entropy(logits[pairs], torch.tensor(ids[1:])[pairs]), seen

    @contextmanager
    def _adapted(self, layers: list[Any], B: Sequence[dict[str, Tensor]], A: dict[str, Tensor], seen: Any) -> Iterator[None]:
        def add(a: Tensor, b: Tensor) -> Any:
            return lambda _, args, y: y + (args[0] @ a.T) @ b.T

        lowest = layers[0]
        hooks = [
            lowest.register_forward_pre_hook(
                lambda _, args, kw: seen.update(h=(args[0] if args else kw["hidden_states"])[0]), with_kwargs=True
            ),
            lowest.self_attn.o_proj.register_forward_pre_hook(lambda _, args: seen.update(a=args[0][0])),
        ]
        for layer, delta in zip(layers, B, strict=True):
            places = {"o": layer.self_attn.o_proj, "d": layer.mlp.down_proj}
            if hasattr(layer.mlp, "gate_up_proj") and "g" in delta:
                both = torch.cat((delta["g"], delta["u"]))
                hooks.append(layer.mlp.gate_up_proj.register_forward_hook(add(A["g"], both)))
            elif "g" in delta:
                places |= {"g": layer.mlp.gate_proj, "u": layer.mlp.up_proj}
            hooks += [module.register_forward_hook(add(A[k], delta[k])) for k, module in places.items() if k in delta]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


class TwinLoop(Loop):
    """A session of a twin as a plain loop. With more layers than one a request has one chunk: what comes before it would have
    keys of another version."""

    def __init__(self, theirs: Theirs, config: TTTConfig):
        self.theirs, self.config, adapt = theirs, config, config.adapt
        self.dtype, self.compute_dtype, self.rank = torch.float32, torch.float64, adapt.rank
        layers = theirs.layers if adapt.layers == "all" else theirs.layers[-adapt.layers :]
        first = layers[0]
        D, Q, F = first.mlp.down_proj.out_features, first.self_attn.o_proj.in_features, first.mlp.down_proj.in_features
        self.outputs = [{k: n for k, n in zip("ogud", (D, F, F, D), strict=True) if k in adapt.letters} for _ in layers]
        self.norms = [{k: w.norm().item() for k, w in _weights(layer).items() if k in adapt.letters} for layer in layers]
        widths = dict(zip("ogud", (Q, D, D, F), strict=True))
        self.A = {k: projection(width, adapt.rank, adapt.seed).double() for k, width in widths.items()}
        self.vocabulary = theirs.model.get_output_embeddings().out_features
        self.reset()

    def learn(self, ids: list[int], left_out: Sequence[int] = (), **more: Any) -> None:
        """``left_out``: positions of tokens that are not learned. ``more``: for the model."""
        kept = torch.tensor([i + 1 not in left_out for i in range(len(ids) - 1)])
        for rows in chunks(self.config.learn, 0, len(ids) - 1)[0]:
            assert len(self.outputs) == 1 or rows.start == 0
            pairs = torch.arange(rows.start, rows.stop)[kept[rows]]
            B = self.leaves()
            self.commit(B, self.theirs.loss(B, self.A, ids, pairs, **more)[0], len(pairs))


def _weights(layer: Any) -> dict[str, Tensor]:
    mlp = layer.mlp
    gate, up = mlp.gate_up_proj.weight.chunk(2) if hasattr(mlp, "gate_up_proj") else (mlp.gate_proj.weight, mlp.up_proj.weight)
    return {"o": layer.self_attn.o_proj.weight, "g": gate, "u": up, "d": mlp.down_proj.weight}
