"""The shapes of a session's delta, from the model's configuration alone: what the engine core, the worker and the command line
must agree on about a file. Imports no torch and no vLLM.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_ttt.config import AdaptConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.families import Layers

#: Adapted modules of a layer, as a delta stores them -> where they are in the layer. gate and up are one tensor, gate first.
PATHS = {"o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


def adapted_layers(num_layers: int, adapt: AdaptConfig) -> int:
    """How many of a model's layers are adapted, the last ones. Raises ConfigError where it has not so many."""
    layers = num_layers if adapt.layers == "all" else adapt.layers
    if layers > num_layers:
        raise ConfigError(f"adapt.layers is {layers}, and the model has {num_layers} layers; allowed: 1 to {num_layers}")
    return layers


@dataclass(frozen=True)
class Geometry:
    """One delta. ``layer`` is the first adapted layer; ``hidden``, ``attention`` and ``feed_forward`` are D, Q and F."""

    layer: int
    rank: int
    seed: int
    hidden: int
    attention: int
    feed_forward: int
    #: adapted layers, from ``layer`` on
    layers: int = 1
    #: width of a token's keys in one layer, and of its values
    keys: int = 0
    #: the adapted modules
    modules: tuple[str, ...] = tuple(PATHS)
    #: where the layers are in transformers' model, as an adapter of PEFT names them
    peft: str = "model.layers"
    #: gate and up are one module there
    packed: bool = False

    @classmethod
    def of(cls, hf: Any, adapt: AdaptConfig, where: Layers | None = None) -> Geometry:
        """Of a Hugging Face configuration (that of the text model). With the preset head, its hidden size alone counts.

        Args:
            where: the layers are; it matters for adapters and for what is captured, and not for sizes.
        """
        if adapt.preset == "head":
            rank = min(adapt.rank, hf.hidden_size)
            return cls(hf.num_hidden_layers, rank, adapt.seed, hf.hidden_size, 0, 0, modules=adapt.modules)
        head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        attention, keys = (head * n for n in (hf.num_attention_heads, hf.num_key_value_heads))
        layers = adapted_layers(hf.num_hidden_layers, adapt)
        first = hf.num_hidden_layers - layers
        where = where or Layers()
        return cls(
            first, adapt.rank, adapt.seed, hf.hidden_size, attention, hf.intermediate_size, layers, keys, adapt.modules,
            where.peft, where.packed,
        )  # fmt: skip

    @property
    def wrapped(self) -> bool:
        """Whether the language model is a part of the model, which may give it states that no token has."""
        return self.peft != Layers.peft

    @property
    def outputs(self) -> dict[str, int]:
        """Rows of each module's B, in one layer."""
        if self.head:
            return {"lm_head": self.hidden}
        rows = {"o_proj": self.hidden, "gate_up_proj": 2 * self.feed_forward, "down_proj": self.hidden}
        return {module: rows[module] for module in PATHS if module in self.modules}

    @property
    def head(self) -> bool:
        """Whether the delta is on the last hidden state, the input of lm_head, and on no layer."""
        return "lm_head" in self.modules

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Tensor name in a session's file -> shape of B: [out, rank]; layer by layer, in the order of ``outputs``."""
        if self.head:
            return {"lm_head": (self.hidden, self.rank)}
        return {
            f"model.layers.{i}.{PATHS[m]}.{m}": (out, self.rank)
            for i in range(self.layer, self.layer + self.layers)
            for m, out in self.outputs.items()
        }

    @property
    def bytes(self) -> int:
        """Of a session: B in float32, its last update in bfloat16, and its rate."""
        return 6 * self.rank * self.layers * sum(self.outputs.values()) + 4

    def shard(self, ranks: int, head: int) -> Geometry:
        """What one of so many ranks has of it; ``head``: the width of a head, at least one of which each rank has."""
        keys = max(self.keys // ranks, min(head, self.keys))
        return replace(self, attention=self.attention // ranks, feed_forward=self.feed_forward // ranks, keys=keys)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "modules": list(self.modules)}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Geometry:
        return cls(**{**data, "modules": tuple(data["modules"])})
