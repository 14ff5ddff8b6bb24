"""The micro-step of docs/algorithm.md as a plain loop: transformers and torch, one session, autograd, no vLLM.

It is slow and obvious on purpose. The engine, which does the same by hand, batched and inside vLLM, is held to it.

Letters: T positions of a request, N pairs of a chunk, D hidden size, F feed-forward size, R rank, V vocabulary, K adapted
layers, H query heads, G heads of keys and values, E width of a head. Pair i is the state at position i and the token at i + 1:
a request of T tokens has T - 1 pairs. Deltas and projections are keyed "o", "g", "u", "d" (o_proj, gate_proj, up_proj,
down_proj). ``B`` is one dict for each adapted layer, lowest first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vllm_ttt.config import LearnConfig, TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.geometry import adapted_layers

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
#: Keys and values [T, G, E] of one layer.
KV = tuple[Tensor, Tensor]
#: By adapted layer and module.
Matrices = list[dict[str, Tensor]]


@dataclass(frozen=True)
class LayerWeights:
    """One layer, in any one dtype: weights [out, in], biases [out] or None, norms."""

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    g: Tensor
    u: Tensor
    d: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    norm_attention: Tensor
    norm_mlp: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None

    @classmethod
    def of(cls, layer: Any, dtype: torch.dtype) -> LayerWeights:
        """Of a layer of a Hugging Face model. Raises ConfigError where it has biases that are left out here."""
        attention, mlp = layer.self_attn, layer.mlp
        if any(x.bias is not None for x in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)):
            raise ConfigError("models with a bias in o_proj or the feed-forward are not supported")
        linears = {"q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj}
        linears |= {"g": mlp.gate_proj, "u": mlp.up_proj, "d": mlp.down_proj}
        norms = {"norm_attention": layer.input_layernorm, "norm_mlp": layer.post_attention_layernorm}
        norms |= {name: getattr(attention, name, None) for name in ("q_norm", "k_norm")}  # Qwen3 has them
        tensors = {name: linear.weight for name, linear in linears.items()}
        tensors |= {f"{name}_bias": linears[name].bias for name in "qkv"}
        tensors |= {name: None if norm is None else norm.weight for name, norm in norms.items()}
        moved: dict[str, Any] = {name: None if x is None else x.to(dtype) for name, x in tensors.items()}
        return cls(**moved)


@dataclass(frozen=True)
class Stack:
    """The K adapted layers and what follows them. ``turns``: cosines and sines [positions, E] of the rotary embedding."""

    layers: Sequence[LayerWeights]
    head: Tensor
    norm_final: Tensor
    eps: float
    turns: tuple[Tensor, Tensor]
    #: width of a head
    E: int


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def stack_nll(
    w: Stack, A: dict[str, Tensor], B: Sequence[dict[str, Tensor]], h: Tensor, a: Tensor, targets: Tensor, past: Sequence[KV]
) -> tuple[Tensor, list[KV]]:
    """Negative log-likelihood [N] in nats of consecutive pairs, and the keys and values of the layers above the lowest.

    Arguments as for `stack_logits`.
    """
    logits, found = stack_logits(w, A, B, h, a, past)
    return F.cross_entropy(logits, targets, reduction="none"), found


def stack_logits(
    w: Stack, A: dict[str, Tensor], B: Sequence[dict[str, Tensor]], h: Tensor, a: Tensor, past: Sequence[KV]
) -> tuple[Tensor, list[KV]]:
    """Logits [N, V] of consecutive pairs, and the keys and values of the layers above the lowest.

    Args:
        h, a: residual stream that enters the lowest adapted layer, [N, D], and its attention output, [N, H E].
        past: keys and values of what comes before, for each layer above the lowest; the pairs begin after them.
    """

    def linear(layer: int, x: Tensor, key: str) -> Tensor:
        y = x @ getattr(w.layers[layer], key).T
        return y + (x @ A[key].T) @ B[layer][key].T if key in B[layer] else y

    r, found = h, []
    for i, layer in enumerate(w.layers):
        if i:
            a, kv = _attention(w, layer, rms_norm(r, layer.norm_attention, w.eps), past[i - 1])
            found.append(kv)
        r = r + linear(i, a, "o")
        x = rms_norm(r, layer.norm_mlp, w.eps)
        r = r + linear(i, F.silu(linear(i, x, "g")) * linear(i, x, "u"), "d")
    return rms_norm(r, w.norm_final, w.eps) @ w.head.T, found


def _attention(w: Stack, layer: LayerWeights, x: Tensor, past: KV) -> tuple[Tensor, KV]:
    N, P = len(x), len(past[0])
    bias = lambda b: 0 if b is None else b  # noqa: E731
    q, k, v = ((x @ getattr(layer, n).T + bias(getattr(layer, f"{n}_bias"))).view(N, -1, w.E) for n in "qkv")
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = rms_norm(q, layer.q_norm, w.eps), rms_norm(k, layer.k_norm, w.eps)
    cos, sin = (t[P : P + N, None] for t in w.turns)
    q, k = (y * cos + torch.cat((-y[..., w.E // 2 :], y[..., : w.E // 2]), -1) * sin for y in (q, k))
    keys, values = torch.cat((past[0], k)), torch.cat((past[1], v))
    keys, values = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (keys, values))
    scores = torch.einsum("nhe,uhe->hnu", q, keys) / math.sqrt(w.E)
    hidden = torch.ones(N, P + N, dtype=torch.bool).triu(P + 1)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1)
    return torch.einsum("hnu,uhe->nhe", weights, values).flatten(1), (k, v)


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


def update(
    learn: LearnConfig, B: Matrices, last: Matrices, rate: float, grads: Matrices, norms: Sequence[dict[str, float]], rows: int
) -> float:
    """One step of the optimiser, in place, for the gradient of the mean loss of so many rows.

    Args:
        last: the update before, all zero where there was none; becomes this one. norms: the weights'.
    Returns:
        the rate that the step had, and the session has from now on.
    """
    cosines = [
        (grads[i][k] * last[i][k]).sum().item() / max(grads[i][k].norm().item() * last[i][k].norm().item(), 1e-30)
        for i in range(len(B))
        for k in B[i]
    ]
    c = sum(cosines) / len(cosines)
    rate = min(max(rate * math.exp(min(max(learn.adapt_rate * c, -0.5), 0.5)), 1e-5), 0.1)
    share = rows / learn.chunk
    for i, layer in enumerate(B):
        for k, master in layer.items():
            U = newton_schulz(grads[i][k].to(master.dtype))
            length = rate * share * norms[i][k] / (U.norm().item() + 1e-12)
            master.mul_(1 - learn.decay * share).sub_(U, alpha=length)
            excess = master.norm().item() / (learn.max_norm * max(norms[i][k], 1e-12))  # a weight may be all zero
            if excess > 1:
                master.div_(excess)
            last[i][k] = U.bfloat16().to(master.dtype)
    return rate


class Loop:
    """One session as plain matrices, and what a chunk's loss does to them, wherever in the model the delta is.

    A subclass says where that is, and calls `reset` when it is set up.
    """

    config: TTTConfig
    #: of the model, as A and B are served; and of the computation
    dtype: torch.dtype
    compute_dtype: torch.dtype
    rank: int
    vocabulary: int
    #: by layer: outputs of each adapted module, and the norm of its weight
    outputs: list[dict[str, int]]
    norms: list[dict[str, float]]

    def reset(self) -> None:
        """Forget: B and the last update [out, R] are float32 (float64 where compute_dtype is) and zero again."""
        master = torch.promote_types(torch.float32, self.compute_dtype)
        fresh = lambda: [{k: torch.zeros(n, self.rank, dtype=master) for k, n in layer.items()} for layer in self.outputs]  # noqa: E731
        self.B, self.last, self.rate = fresh(), fresh(), self.config.learn.rate
        #: updates so far
        self.version = 0
        #: tokens, by what became of them
        self.tokens = {"learned": 0, "loss": 0, "nonfinite": 0, "short": 0}

    def slot(self) -> list[dict[str, Tensor]]:
        """B as a slot holds it."""
        return [{k: v.to(self.dtype).to(self.compute_dtype) for k, v in layer.items()} for layer in self.B]

    def leaves(self) -> list[dict[str, Tensor]]:
        """A copy of B that autograd follows."""
        return [{k: v.to(self.compute_dtype, copy=True).requires_grad_() for k, v in layer.items()} for layer in self.B]

    def commit(self, B: list[dict[str, Tensor]], loss: Tensor, n: int) -> float:
        """The step of a chunk of ``n`` tokens, from its mean loss under ``B``, which `leaves` gave; returns that loss."""
        learn = self.config.learn
        if not math.isfinite(loss.item()) or loss.item() > learn.max_loss * math.log(self.vocabulary):
            self.tokens["loss" if math.isfinite(loss.item()) else "nonfinite"] += n
            return loss.item()
        found = iter(torch.autograd.grad(loss, [x for layer in B for x in layer.values()]))
        grads = [{k: next(found) for k in layer} for layer in B]
        if not all(g.isfinite().all() for layer in grads for g in layer.values()):
            self.tokens["nonfinite"] += n
            return loss.item()
        self.rate = update(learn, self.B, self.last, self.rate, grads, self.norms, n)
        self.version += 1
        self.tokens["learned"] += n
        return loss.item()


class Oracle(Loop):
    """One session.

    Args:
        model: folder of a Hugging Face model (Llama, Mistral, Qwen2 or Qwen3), or one that is loaded, which
            several oracles may share: it is never changed.
        config: the sections ``adapt`` and ``learn``; the rest does not matter here.
        dtype: what the model is loaded in; None: what its config says. A is rounded to it, as a slot stores it, and
            ``score`` uses B rounded to it, as a slot serves it.
        compute_dtype: what the adapted layers are computed in, forward and backward. The steps use the unrounded B.
    Raises:
        ConfigError: the model is not one of ``MODEL_TYPES``, has biases that the step leaves out or sliding windows, or is too
            narrow.
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
        hf, adapt = self.model.config, self.config.adapt
        if hf.model_type not in MODEL_TYPES or hf.hidden_act != "silu":
            raise ConfigError(f"{hf.model_type} ({hf.hidden_act}) is not known here; allowed: {', '.join(MODEL_TYPES)}")
        #: the lowest adapted layer
        self.first = hf.num_hidden_layers - adapted_layers(hf.num_hidden_layers, adapt)
        layers = list(self.model.model.layers)[self.first :]
        everywhere = hf.sliding_window if hf.model_type == "mistral" else None  # the others say it by layer
        windows = [getattr(layer.self_attn, "sliding_window", everywhere) for layer in layers[1:]]
        if any(window and window < hf.max_position_embeddings for window in windows):
            raise ConfigError("layers with sliding-window attention above the first adapted one are not supported")
        if self.model.lm_head.bias is not None:
            raise ConfigError("models with a bias in lm_head are not supported")
        self.dtype = self.model.lm_head.weight.dtype
        turns = self.model.model.rotary_emb(torch.zeros(1), torch.arange(hf.max_position_embeddings)[None])
        self.stack = Stack(
            [LayerWeights.of(layer, compute_dtype) for layer in layers], self.model.lm_head.weight.to(compute_dtype),
            self.model.model.norm.weight.to(compute_dtype), hf.rms_norm_eps, tuple(x[0].to(compute_dtype) for x in turns),
            layers[0].self_attn.head_dim,
        )  # fmt: skip
        lowest = self.stack.layers[0]
        self.norms = [{k: getattr(layer, k).double().norm().item() for k in adapt.letters} for layer in self.stack.layers]
        drawn = {w: projection(w, adapt.rank, adapt.seed) for w in {getattr(lowest, k).shape[1] for k in adapt.letters}}
        #: [R, in], compute dtype, rounded to the model's; the same for every layer, and those of equal width are equal
        self.A = {k: drawn[getattr(lowest, k).shape[1]].to(self.dtype).to(compute_dtype) for k in adapt.letters}
        self._seen: tuple[list[int], tuple[Tensor, Tensor]] | None = None
        self.rank, self.vocabulary = adapt.rank, self.stack.head.shape[0]
        self.outputs = [{k: getattr(layer, k).shape[0] for k in self.A} for layer in self.stack.layers]
        self.reset()

    def activations(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """(h [T, D], a [T, H E]) of the lowest adapted layer, compute dtype. They do not depend on the delta."""
        if self._seen is None or self._seen[0] != ids:
            h, a = entering(self.model, ids, self.first)
            self._seen = list(ids), (h.to(self.compute_dtype), a.to(self.compute_dtype))
        return self._seen[1]

    @torch.no_grad()
    def score(self, ids: list[int]) -> Tensor:
        """NLL [T - 1] in nats of each token but the first, all of them under the delta as it is now."""
        return self.served(ids)[0]

    @torch.no_grad()
    def served(self, ids: list[int]) -> tuple[Tensor, list[KV]]:
        """NLL [T - 1] of a request under the delta as it is now, as a slot holds it, and its keys and values."""
        h, a = self.activations(ids)
        return stack_nll(self.stack, self.A, self.slot(), h[:-1], a[:-1], torch.tensor(ids[1:]), self.nothing())

    def nothing(self) -> list[KV]:
        """No past."""
        G = self.stack.layers[0].k.shape[0] // self.stack.E
        none = torch.zeros(0, G, self.stack.E, dtype=self.compute_dtype)
        return [(none, none)] * (len(self.stack.layers) - 1)

    def learn(self, ids: list[int], start: int = 0) -> list[float]:
        """Learn a request chunk by chunk, from pair ``start`` on: those before it are history. What the delta is when this is
        called served the request; its past stays as it was then.

        Returns the loss of each chunk before its step, also where it was skipped for its loss; a remainder shorter than
        ``min_chunk`` has none.
        """
        h, a = self.activations(ids)
        _, kv = self.served(ids)
        targets = torch.tensor(ids[1:])
        found, rest = chunks(self.config.learn, start, len(targets))
        self.tokens["short"] += rest
        return [self.step(h[rows], a[rows], targets[rows], before(kv, rows.start)) for rows in found]

    def step(self, h: Tensor, a: Tensor, targets: Tensor, past: Sequence[KV]) -> float:
        """One chunk; the loss before its step."""
        B = self.leaves()
        loss = stack_nll(self.stack, self.A, B, h, a, targets, past)[0].mean()
        return self.commit(B, loss, len(targets))


def before(kv: Sequence[KV], first: int) -> list[KV]:
    """Keys and values of the positions before ``first``."""
    return [(k[:first], v[:first]) for k, v in kv]


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
