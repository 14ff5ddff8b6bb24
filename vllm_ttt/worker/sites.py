"""Where in the model the deltas are: in its layers (`deep`, `last`), or on its last hidden state (`head`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from vllm_ttt.config import TTTConfig
from vllm_ttt.geometry import Geometry
from vllm_ttt.worker.capture.capture import Capture
from vllm_ttt.worker.capture.states import States
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.serve.head_slots import HeadSlots
from vllm_ttt.worker.serve.slots import Slots
from vllm_ttt.worker.step import fp8, weights
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.lm_head import build_head, find_head
from vllm_ttt.worker.step.micro_step import Tail
from vllm_ttt.worker.step.tail import build_tail, find_modules

if TYPE_CHECKING:
    from vllm_ttt.worker.worker import TTTWorkerMixin


class InLayers:
    """Deltas are served from vLLM's LoRA slots, and what enters the lowest adapted layer is captured inside the forward."""

    def __init__(self, worker: TTTWorkerMixin, geometry: Geometry, config: TTTConfig):
        self.worker, self.config = worker, config
        self.modules = find_modules(
            worker.model_runner.get_model(), geometry.layers, config.adapt.letters, config.adapt.preset == "deep"
        )
        #: the attention of the layers in which the step attends
        self.attentions = [layer.attention.attn for layer in self.modules.attending]

    def copied(self, dtype: torch.dtype) -> int:
        """Bytes of the weights that a step in ``dtype`` has for itself."""
        vocabulary = -(-self.worker.vllm_config.model_config.get_vocab_size() // self.worker.ranks.size)
        head = weights.copied(self.modules.lm_head, dtype, vocabulary)
        # A quantised weight whose products are in FP8 is not kept in ``dtype``.
        gone = lambda x: self.config.learn.fp8 != "none" and not weights.is_plain(x) and fp8.fits(*weights.shape(x))  # noqa: E731
        return head + sum(weights.copied(layer, dtype) for layer in self.modules.read if not gone(layer))

    @property
    def rounded(self) -> int:
        """Bytes of the weights that a step has in FP8: a quantised layer has the form for the way back alone."""
        ways, total = self.config.learn.fp8, 0
        for layer in self.modules.read if ways != "none" else ():
            if fp8.fits(*weights.shape(layer)):
                forward, back = fp8.bytes_of(*weights.shape(layer))
                total += back + (forward if ways == "both" and weights.is_plain(layer) else 0)
        return total

    def below(self, rank: int, dtype: torch.dtype) -> int:
        """Bytes of A below the weights of a step in ``dtype``."""
        thin = [
            part for layer in self.modules.layers for key, part in (("o", layer.o_proj), ("d", layer.down_proj))
            if key in self.modules.adapted and weights.joins(part, dtype, self.config.learn.fp8)
        ]  # fmt: skip
        return sum(rank * weights.shape(part)[1] * dtype.itemsize for part in thin)

    def build(self) -> tuple[Tail, Capture]:
        """The weights of the step, and what keeps its inputs."""
        worker, scheduler, model = self.worker, self.worker.vllm_config.scheduler_config, self.worker.vllm_config.model_config
        tail = build_tail(
            worker.model_runner.get_model(), self.modules, self.config.adapt, model.max_model_len, worker.ranks,
            self.config.learn.fp8,
        )  # fmt: skip
        worker.idle = worker.ttt_idle_flag(self.modules)
        device = tail.head_VD.device
        return tail, Capture(self.modules, scheduler.max_num_batched_tokens, model.dtype, device, worker.idle)

    def slots(self, deltas: Deltas) -> Slots:
        worker = self.worker
        return Slots(worker.model_runner.lora_manager, self.modules, deltas, worker.vllm_config.model_config.dtype)

    def serve(self, slots: Any) -> None:
        """vLLM does."""


class AtHead:
    """Deltas are served from a table of our own, on the states that the model runner has."""

    def __init__(self, worker: TTTWorkerMixin, geometry: Geometry, config: TTTConfig):
        self.worker, self.geometry, self.config, self.attentions = worker, geometry, config, []
        model = worker.vllm_config.model_config
        if worker.vllm_config.lora_config is not None:
            worker.ttt_adapters()
        self.found = find_head(worker.model_runner.get_model(), geometry.hidden, model.dtype, worker.device)

    rounded = 0

    def copied(self, dtype: torch.dtype) -> int:
        """As `InLayers.copied`."""
        return weights.copied(self.found.lm_head, dtype, self.found.vocabulary)

    def below(self, rank: int, dtype: torch.dtype) -> int:
        """As `InLayers.below`."""
        return 0

    def build(self) -> tuple[Head, States]:
        config = self.worker.vllm_config
        dtype, rows = config.model_config.dtype, config.scheduler_config.max_num_batched_tokens
        head = build_head(self.found, self.config.adapt, self.geometry.rank, dtype)
        drafts = config.speculative_config
        copies = drafts is not None and drafts.use_eagle()
        return head, States(self.geometry.hidden, rows, dtype, head.head_VD.device, copies)

    def slots(self, deltas: Deltas) -> HeadSlots:
        return self.worker.ttt_head_slots(deltas, self.config.sessions.resident)

    def serve(self, slots: Any) -> None:
        """Let the model runner apply the deltas."""
        self.worker.ttt_adapt(slots)


def site_of(worker: TTTWorkerMixin, geometry: Geometry, config: TTTConfig) -> InLayers | AtHead:
    """Raises ConfigError where the preset has no place in the model."""
    return (AtHead if geometry.head else InLayers)(worker, geometry, config)
