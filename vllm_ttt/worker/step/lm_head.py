"""Finds lm_head in a loaded model, whatever its architecture: it is what the model gives vLLM's LogitsProcessor.

A model is asked for the logits of a few random states, and the call of its LogitsProcessor is looked at. Where that is not
given those very states, or its logits are not the ones that are computed from what was found, the preset `head` is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.layers.logits_processor import LogitsProcessor

from vllm_ttt.config import AdaptConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.patches import _contract
from vllm_ttt.worker.step import weights
from vllm_ttt.worker.step.head import Head
from vllm_ttt.worker.step.tail import make_projection, step_dtype
from vllm_ttt.worker.step.weights import PLAIN, QUANTISED, ROWS


@dataclass(frozen=True)
class Found:
    """One call of a LogitsProcessor: itself, lm_head, the states and the bias that it was given, and what it returned."""

    processor: Any
    lm_head: Any
    states: Tensor
    bias: Tensor | None
    logits: Tensor | None

    @property
    def vocabulary(self) -> int:
        """Without vLLM's padding."""
        return self.processor.org_vocab_size


def find_head(model: Any, hidden: int, dtype: torch.dtype, device: torch.device) -> Found:
    """The parts of a model that make logits of its last hidden states, which are ``hidden`` wide.

    Raises ConfigError where they cannot be told.
    """
    states = torch.randn(ROWS, hidden, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    name, calls = type(model).__name__, list[Found]()
    with torch.inference_mode(), _watched(calls):
        try:
            logits = model.compute_logits(states)
        except Exception as error:
            raise _refusal(name, f"its logits of states {hidden} wide cannot be computed ({error})") from error
    if len(calls) != 1:
        raise _refusal(name, f"it calls vLLM's LogitsProcessor {len(calls)} times for its logits")
    (found,) = calls
    if found.states is not states or found.processor.logits_as_input:
        raise _refusal(name, "it changes the last hidden state before lm_head")
    if not isinstance(logits, Tensor) or found.logits is None or not torch.equal(logits, found.logits):
        raise _refusal(name, "it changes its logits after lm_head")
    return found


def build_head(found: Found, adapt: AdaptConfig, rank: int, dtype: torch.dtype) -> Head:
    """The weights of the step; A is rounded to the model's ``dtype``. Raises ConfigError where they do not make its logits."""
    vocab, lm_head = found.vocabulary, getattr(found.lm_head, "base_layer", found.lm_head)
    products = step_dtype(dtype, found.states.device)
    head = Head(
        weights.dense(lm_head, dtype, vocab).to(products),
        make_projection(found.states.shape[1], rank, adapt.seed).to(found.states).to(products),
        bias_V=None if found.bias is None else found.bias.data[:vocab].to(products),
        logit_scale=found.processor.scale,
        soft_cap=found.processor.soft_cap,
    )
    assert found.logits is not None
    ours, limit = _logits(head, found.states), PLAIN if weights.is_plain(lm_head) else QUANTISED
    error = ((ours - found.logits.float()).norm() / found.logits.float().norm()).item()
    if not error < limit:
        what = f"lm_head ({type(lm_head.quant_method).__name__}) cannot be read: logits made of it are off by {error:.1%}"
        raise ConfigError(
            f"{what}, and the preset head allows {limit:.0%}; serve without ttt, or name a model whose lm_head is plain"
        )
    return head


def _logits(head: Head, states: Tensor) -> Tensor:
    x = (states.to(head.head_VD.dtype) @ head.head_VD.T).float()
    if head.bias_V is not None:
        x = x + head.bias_V
    if head.soft_cap is not None:
        x = torch.tanh(x / head.soft_cap) * head.soft_cap
    return x * head.logit_scale


def check() -> Any:
    """vLLM's function that is watched. Raises PatchContractError where it is another one."""
    return _contract.check(LogitsProcessor, "forward", "self lm_head hidden_states embedding_bias skip_gather")


@contextmanager
def _watched(calls: list[Found]) -> Iterator[None]:
    """Note every call of a LogitsProcessor."""
    original = check()

    def forward(self: Any, lm_head: Any, hidden_states: Tensor, embedding_bias: Any = None, *args: Any, **rest: Any) -> Any:
        width = getattr(lm_head, "embedding_dim", hidden_states.shape[-1])
        if width != hidden_states.shape[-1]:  # some kernels would read what is not there
            raise ValueError(f"lm_head takes {width}")
        logits = original(self, lm_head, hidden_states, embedding_bias, *args, **rest)
        calls.append(Found(self, lm_head, hidden_states, embedding_bias, logits))
        return logits

    LogitsProcessor.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        LogitsProcessor.forward = original  # type: ignore[method-assign]


def _refusal(name: str, what: str) -> ConfigError:
    return ConfigError(
        f"{name} is not supported with the preset head, which needs logits that are lm_head applied to the last hidden state: "
        f"{what}; serve without ttt"
    )
