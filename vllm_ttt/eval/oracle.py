"""The micro-step of docs/algorithm.md (`last`) as a plain loop: transformers and torch, one session, autograd, no vLLM.

It is slow and obvious on purpose. The engine, which does the same by hand, batched and inside vLLM, is held to it.

Letters: T positions of a request, N pairs of a chunk, D hidden size, F feed-forward size, R rank, V vocabulary.
Pair i is the state at position i and the token at i + 1, so a request of T tokens has T - 1 pairs.
Deltas and projections are keyed "o", "g", "u", "d": o_proj, gate_proj, up_proj, down_proj.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_ttt.config import LearnConfig, TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.no_regret import NoRegret

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class TailWeights:
    """What comes after the attention of the last layer, in any one dtype."""

    #: [D, attention width], [F, D], [F, D], [D, F]
    o: Tensor
    g: Tensor
    u: Tensor
    d: Tensor
    #: [V, D]
    head: Tensor
    #: [D]: before the feed-forward, and before the head
    norm_mlp: Tensor
    norm_final: Tensor
    eps: float

    def to(self, dtype: torch.dtype) -> TailWeights:
        moved = {k: v.to(dtype) for k, v in vars(self).items() if isinstance(v, Tensor)}
        return TailWeights(**moved, eps=self.eps)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def tail_nll(w: TailWeights, A: dict[str, Tensor], B: dict[str, Tensor], h: Tensor, a: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood [N] in nats of each pair; everything in the dtype of its (equal) inputs.

    Args:
        A, B: projections [R, in] and deltas [out, R]; the adapted weight is W + B A.
        h: residual stream that enters the last layer, [N, D].
        a: that layer's attention output, before o_proj, [N, attention width].
        targets: token ids, [N], int64.
    """

    def linear(x: Tensor, key: str) -> Tensor:
        return x @ getattr(w, key).T + (x @ A[key].T) @ B[key].T

    r = h + linear(a, "o")
    x = rms_norm(r, w.norm_mlp, w.eps)
    r = r + linear(F.silu(linear(x, "g")) * linear(x, "u"), "d")
    return F.cross_entropy(rms_norm(r, w.norm_final, w.eps) @ w.head.T, targets, reduction="none")


def tail_loss(w: TailWeights, A: dict[str, Tensor], B: dict[str, Tensor], h: Tensor, a: Tensor, targets: Tensor) -> Tensor:
    """Mean of ``tail_nll``: the loss of a chunk."""
    return tail_nll(w, A, B, h, a, targets).mean()


def newton_schulz(G: Tensor) -> Tensor:
    """Push the singular values of ``G`` towards 1: five quintic iterations (Muon, Jordan et al. 2024)."""
    X = G.T if G.shape[0] > G.shape[1] else G
    X = X / (X.norm() + 1e-12)
    for _ in range(5):
        S = X @ X.T
        X = 3.4445 * X + (-4.7750 * S + 2.0315 * S @ S) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def projection(width: int, rank: int, seed: int) -> Tensor:
    """A for layers that read ``width`` inputs: [rank, width], orthonormal rows, float32. It depends on nothing else."""
    if rank > width:
        raise ConfigError(f"adapt.rank {rank} exceeds the {width} inputs of a layer; allowed: at most {width}")
    gaussian = torch.randn(width, rank, generator=torch.Generator().manual_seed(seed))
    return torch.linalg.qr(gaussian)[0].T.contiguous()


def chunks(learn: LearnConfig, start: int, pairs: int) -> tuple[list[slice], int]:
    """The pairs from ``start`` on as chunks, and how many are left at the end, too few to be learned."""
    found = [slice(first, min(first + learn.chunk, pairs)) for first in range(start, pairs, learn.chunk)]
    if found and (rest := found[-1].stop - found[-1].start) < learn.min_chunk:
        return found[:-1], rest
    return found, 0


def update(learn: LearnConfig, B: dict[str, Tensor], grads: dict[str, Tensor], norms: dict[str, float], rows: int) -> None:
    """One step of the optimiser, in place, for the gradient of the mean loss of so many rows; ``norms`` are the weights'."""
    share = rows / learn.chunk
    for k, master in B.items():
        U = newton_schulz(grads[k].to(master.dtype))
        length = learn.rate * share * norms[k] / (U.norm().item() + 1e-12)
        master.mul_(1 - learn.decay * share).sub_(U, alpha=length)
        excess = master.norm().item() / (learn.max_norm * norms[k])
        if excess > 1:
            master.div_(excess)


class Oracle:
    """One session.

    Args:
        model: folder of a Hugging Face model (Llama, Mistral, Qwen2 or Qwen3), or one that is loaded, which
            several oracles may share: it is never changed.
        config: rank, seed and the section ``learn``; the rest does not matter here.
        dtype: what the model is loaded in; None: what its config says. A is rounded to it, as a slot stores it, and
            ``score`` uses B rounded to it, as a slot serves it.
        compute_dtype: what the tail is computed in, forward and backward. The steps use the unrounded B, and no scale.
    Raises:
        ConfigError: the model is not one of ``MODEL_TYPES``, has biases that the tail leaves out, or is too narrow.
    """

    def __init__(
        self,
        model: str | Path | nn.Module,
        config: TTTConfig | None = None,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        self.model: Any = model if isinstance(model, nn.Module) else load_model(model, dtype)
        self.config, self.compute_dtype = config or TTTConfig(), compute_dtype
        stored = tail_weights(self.model)
        self.dtype = stored.o.dtype
        self.weights = stored.to(compute_dtype)
        self.norms = {k: getattr(stored, k).double().norm().item() for k in "ogud"}
        adapt = self.config.adapt
        by_width = {w: projection(w, adapt.rank, adapt.seed) for w in {getattr(stored, k).shape[1] for k in "ogud"}}
        #: [R, in], compute dtype, rounded to the model's; those of equal width are equal
        self.A = {k: by_width[getattr(stored, k).shape[1]].to(self.dtype).to(compute_dtype) for k in "ogud"}
        self._seen: tuple[list[int], tuple[Tensor, Tensor]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget: B [out, R] is float32 (float64 where compute_dtype is) and zero again."""
        master = torch.promote_types(torch.float32, self.compute_dtype)
        self.B = {k: torch.zeros(getattr(self.weights, k).shape[0], self.config.adapt.rank, dtype=master) for k in "ogud"}
        #: which multiple of B serves
        self.scale = NoRegret(self.config.learn)
        #: updates so far
        self.version = 0
        #: tokens, by what became of them
        self.tokens = {"learned": 0, "loss": 0, "nonfinite": 0, "short": 0}

    def activations(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """(h [T, D], a [T, attention width]) of a request, compute dtype. They do not depend on the delta."""
        if self._seen is not None and self._seen[0] == ids:
            return self._seen[1]
        h, a = entering(self.model, ids, -1)
        self._seen = (list(ids), (h.to(self.compute_dtype), a.to(self.compute_dtype)))
        return self._seen[1]

    @torch.no_grad()
    def score(self, ids: list[int], start: int = 0) -> Tensor:
        """NLL [T - 1] in nats of each token but the first, all of them under the delta as it is now, and as it is scaled for a
        request of which the pairs before ``start`` are history."""
        return self._nll(ids, slice(0, len(ids) - 1), self.scale.served(ids, start))

    def learn(self, ids: list[int], start: int = 0) -> list[float]:
        """Learn a request chunk by chunk, from pair ``start`` on: those before it are history. Before that, its last chunk is
        measured under every scale.

        Returns the loss of each chunk before its step, also where it was skipped for its loss; a remainder shorter than
        ``min_chunk`` has none.
        """
        if self.scale.on:
            self._measure(ids, start)
            self.scale.note(ids[start:])
        h, a = self.activations(ids)
        targets = torch.tensor(ids[1:])
        found, rest = chunks(self.config.learn, start, len(targets))
        self.tokens["short"] += rest
        return [self._step(h[rows], a[rows], targets[rows]) for rows in found]

    def _measure(self, ids: list[int], start: int) -> None:
        found, _ = chunks(self.config.learn, start, len(ids) - 1)
        if found:
            last = found[-1]
            rows = slice(last.start, last.stop, 2)
            losses = [self._nll(ids, rows, scale).mean().item() for scale in self.scale.measured]
            self.scale.add(losses, last.stop - last.start)

    @torch.no_grad()
    def _nll(self, ids: list[int], rows: slice, scale: float) -> Tensor:
        h, a = self.activations(ids)
        served = {k: (scale * v).to(self.dtype).to(self.compute_dtype) for k, v in self.B.items()}
        return tail_nll(self.weights, self.A, served, h[rows], a[rows], torch.tensor(ids[1:])[rows])

    def _step(self, h: Tensor, a: Tensor, targets: Tensor) -> float:
        learn, n = self.config.learn, len(targets)
        B = {k: v.to(self.compute_dtype, copy=True).requires_grad_() for k, v in self.B.items()}
        loss = tail_loss(self.weights, self.A, B, h, a, targets)
        if not math.isfinite(loss.item()) or loss.item() > learn.max_loss * math.log(self.weights.head.shape[0]):
            self.tokens["loss" if math.isfinite(loss.item()) else "nonfinite"] += n
            return loss.item()
        grads = dict(zip(B, torch.autograd.grad(loss, list(B.values())), strict=True))
        if not all(g.isfinite().all() for g in grads.values()):
            self.tokens["nonfinite"] += n
            return loss.item()
        update(learn, self.B, grads, self.norms, n)
        self.version += 1
        self.tokens["learned"] += n
        return loss.item()


@torch.no_grad()
def entering(model: Any, ids: list[int], layer: int) -> tuple[Tensor, Tensor]:
    """(h [T, D], a [T, attention width]) of a request: residual stream that enters a layer, and its attention output."""
    chosen, found = model.model.layers[layer], {}
    hooks = [
        chosen.register_forward_pre_hook(
            lambda _, args, kw: found.update(h=args[0] if args else kw["hidden_states"]), with_kwargs=True
        ),
        chosen.self_attn.o_proj.register_forward_pre_hook(lambda _, args: found.update(a=args[0])),
    ]
    try:
        model.model(torch.tensor([ids]), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found["h"][0], found["a"][0]


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> nn.Module:
    """A causal language model from a local folder, on the CPU, for inference."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    return model.eval().requires_grad_(False)


def tail_weights(model: Any) -> TailWeights:
    """The tail of a Hugging Face model, in its own dtype, sharing its memory. Raises ConfigError for another shape."""
    config = model.config
    if config.model_type not in MODEL_TYPES or config.hidden_act != "silu":
        raise ConfigError(f"{config.model_type} ({config.hidden_act}) has no tail here; allowed: {', '.join(MODEL_TYPES)}")
    layer = model.model.layers[-1]
    linears = layer.self_attn.o_proj, layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj, model.lm_head
    if any(x.bias is not None for x in linears):
        raise ConfigError("models with a bias in o_proj, the feed-forward or lm_head are not supported")
    norms = layer.post_attention_layernorm, model.model.norm
    return TailWeights(*(x.weight for x in (*linears, *norms)), eps=config.rms_norm_eps)
