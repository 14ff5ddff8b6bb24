"""The preset `head` as a plain loop, beside `oracle.py`: one session, autograd, no vLLM.

The delta is on the last hidden state: y' = y + B A y, after the final norm and before lm_head. Any causal language model of
transformers has that place.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_ttt.config import TTTConfig, parse_config
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.oracle import Loop, chunks, load_model, projection

#: Settings of transformers that change logits in a way that is not followed here.
_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


class HeadOracle(Loop):
    """One session; arguments and attributes as those of `Oracle`, whose layers are one and whose module is "y"."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        config: TTTConfig | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        self.model: Any = model if isinstance(model, nn.Module) else load_model(model, dtype)
        self.config, self.compute_dtype = config or parse_config(None, "head"), compute_dtype
        hf = self.model.config.get_text_config()
        if any(getattr(hf, name, None) for name in _SCALES):
            raise ConfigError(f"models whose logits have a scale of their own ({', '.join(_SCALES)}) are not known here")
        self.soft_cap: float | None = getattr(hf, "final_logit_softcapping", None)
        head, adapt = self.model.get_output_embeddings(), self.config.adapt
        self.dtype = head.weight.dtype
        self.head = head.weight.to(compute_dtype)
        self.bias = None if head.bias is None else head.bias.to(compute_dtype)
        D = head.weight.shape[1]
        self.rank = min(adapt.rank, D)
        self.A = projection(D, self.rank, adapt.seed).to(self.dtype).to(compute_dtype)
        #: ||W|| is that of the identity
        self.norms, self.outputs, self.vocabulary = [{"y": math.sqrt(D)}], [{"y": D}], self.head.shape[0]
        self._seen: tuple[list[int], Tensor] | None = None
        self.reset()

    def states(self, ids: list[int]) -> Tensor:
        """The last hidden state [T, D] of a request, compute dtype; it does not depend on the delta."""
        if self._seen is None or self._seen[0] != ids:
            with torch.no_grad():
                found = self.model.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0]
            self._seen = list(ids), found.to(self.compute_dtype)
        return self._seen[1]

    def logits(self, B: Tensor, y: Tensor) -> Tensor:
        """[N, V] of some states."""
        logits = F.linear(y + (y @ self.A.T) @ B.T, self.head, self.bias)
        return logits if self.soft_cap is None else torch.tanh(logits / self.soft_cap) * self.soft_cap

    def nll(self, B: Tensor, y: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood [N] in nats of the tokens that follow some states."""
        return F.cross_entropy(self.logits(B, y), targets, reduction="none")

    @torch.no_grad()
    def score(self, ids: list[int]) -> Tensor:
        """NLL [T - 1] in nats of each token but the first, all of them under the delta as it is now."""
        return self.nll(self.slot()[0]["y"], self.states(ids)[:-1], torch.tensor(ids[1:]))

    def learn(self, ids: list[int], start: int = 0) -> list[float]:
        """Learn a request chunk by chunk, from pair ``start`` on. Returns the loss of each chunk before its step."""
        y, targets = self.states(ids), torch.tensor(ids[1:])
        found, rest = chunks(self.config.learn, start, len(targets))
        self.tokens["short"] += rest
        return [self.step(y[rows], targets[rows]) for rows in found]

    def step(self, y: Tensor, targets: Tensor) -> float:
        """One chunk; the loss before its step."""
        B = self.leaves()
        return self.commit(B, self.nll(B[0]["y"], y, targets).mean(), len(targets))
