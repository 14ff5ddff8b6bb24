"""The shapes of a session's delta, from the model's configuration alone: what the engine core, the worker and the command line
must agree on about a file. Imports no torch and no vLLM.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vllm_ttt.config import AdaptConfig

#: Adapted modules of a layer, as a delta stores them -> where they are in the layer. gate and up are one tensor, gate first.
PATHS = {"o_proj": "self_attn", "gate_up_proj": "mlp", "down_proj": "mlp"}


@dataclass(frozen=True)
class Geometry:
    """One delta. ``hidden``, ``attention`` and ``feed_forward`` are widths of the model: D, Q and F."""

    layer: int
    rank: int
    seed: int
    hidden: int
    attention: int
    feed_forward: int

    @classmethod
    def of(cls, hf: Any, adapt: AdaptConfig) -> Geometry:
        """Of a Hugging Face configuration (that of the text model)."""
        head = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
        attention = head * hf.num_attention_heads
        return cls(hf.num_hidden_layers - 1, adapt.rank, adapt.seed, hf.hidden_size, attention, hf.intermediate_size)

    @property
    def outputs(self) -> dict[str, int]:
        """Rows of each module's B."""
        return {"o_proj": self.hidden, "gate_up_proj": 2 * self.feed_forward, "down_proj": self.hidden}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """Tensor name in a session's file -> shape of B: [out, rank]."""
        return {f"model.layers.{self.layer}.{PATHS[m]}.{m}": (out, self.rank) for m, out in self.outputs.items()}

    @property
    def bytes(self) -> int:
        """Of a delta in float32."""
        return 4 * self.rank * sum(self.outputs.values())

    def to_json(self) -> dict[str, int]:
        return asdict(self)
