"""The `deep` preset of docs/algorithm.md as a plain loop: oracle.py with several adapted layers and attention between them.

Letters as there, and K adapted layers, H query heads, G heads of keys and values, E width of a head. ``B`` is one dict for each
adapted layer, lowest first.
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

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval.no_regret import NoRegret
from vllm_ttt.eval.oracle import chunks, entering, load_model, projection, rms_norm, tail_weights, update
from vllm_ttt.geometry import adapted_layers

#: Keys and values [T, G, E] of one layer.
KV = tuple[Tensor, Tensor]


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


def stack_nll(
    w: Stack, A: dict[str, Tensor], B: Sequence[dict[str, Tensor]], h: Tensor, a: Tensor, targets: Tensor, past: Sequence[KV]
) -> tuple[Tensor, list[KV]]:
    """Negative log-likelihood [N] in nats of consecutive pairs, and the keys and values of the layers above the lowest.

    Args:
        h, a: residual stream that enters the lowest adapted layer, [N, D], and its attention output, [N, H E].
        past: keys and values of what comes before, for each layer above the lowest; the pairs begin after them.
    """

    def linear(layer: int, x: Tensor, key: str) -> Tensor:
        return x @ getattr(w.layers[layer], key).T + (x @ A[key].T) @ B[layer][key].T

    r, found = h, []
    for i, layer in enumerate(w.layers):
        if i:
            a, kv = _attention(w, layer, rms_norm(r, layer.norm_attention, w.eps), past[i - 1])
            found.append(kv)
        r = r + linear(i, a, "o")
        x = rms_norm(r, layer.norm_mlp, w.eps)
        r = r + linear(i, F.silu(linear(i, x, "g")) * linear(i, x, "u"), "d")
    logits = rms_norm(r, w.norm_final, w.eps) @ w.head.T
    return F.cross_entropy(logits, targets, reduction="none"), found


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


class DeepOracle:
    """One session of several adapted layers; arguments and errors as for `Oracle`, layers with sliding windows refused too."""

    def __init__(
        self,
        model: str | Path | nn.Module,
        config: TTTConfig,
        dtype: torch.dtype | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ):
        self.model: Any = model if isinstance(model, nn.Module) else load_model(model, dtype)
        self.config, self.compute_dtype = config, compute_dtype
        last = tail_weights(self.model)
        self.dtype = last.o.dtype
        hf = self.model.config
        #: the lowest adapted layer
        self.first = hf.num_hidden_layers - adapted_layers(hf.num_hidden_layers, config.adapt)
        layers = list(self.model.model.layers)[self.first :]
        if any(getattr(layer.self_attn, "sliding_window", None) for layer in layers):
            raise ConfigError("layers with sliding-window attention are not supported")
        turns = self.model.model.rotary_emb(torch.zeros(1), torch.arange(hf.max_position_embeddings)[None])
        self.stack = Stack(
            [LayerWeights.of(layer, compute_dtype) for layer in layers], last.head.to(compute_dtype),
            last.norm_final.to(compute_dtype), last.eps, tuple(x[0].to(compute_dtype) for x in turns),
            layers[0].self_attn.head_dim,
        )  # fmt: skip
        self.norms = [{k: getattr(layer, k).double().norm().item() for k in "ogud"} for layer in self.stack.layers]
        adapt, lowest = config.adapt, self.stack.layers[0]
        #: [R, in], compute dtype, rounded to the model's; the same for every layer
        self.A = {
            k: projection(getattr(lowest, k).shape[1], adapt.rank, adapt.seed).to(self.dtype).to(compute_dtype) for k in "ogud"
        }
        self._seen: tuple[list[int], tuple[Tensor, Tensor]] | None = None
        self.reset()

    def reset(self) -> None:
        """Forget: B [out, R] is float32 (float64 where compute_dtype is) and zero again."""
        master = torch.promote_types(torch.float32, self.compute_dtype)
        zeros = lambda w: torch.zeros(w.shape[0], self.config.adapt.rank, dtype=master)  # noqa: E731
        self.B = [{k: zeros(getattr(layer, k)) for k in "ogud"} for layer in self.stack.layers]
        #: which multiple of B serves
        self.scale = NoRegret(self.config.learn)
        self.version = 0
        self.tokens = {"learned": 0, "loss": 0, "nonfinite": 0, "short": 0}

    def activations(self, ids: list[int]) -> tuple[Tensor, Tensor]:
        """(h [T, D], a [T, H E]) of the lowest adapted layer, compute dtype. They do not depend on the delta."""
        if self._seen is None or self._seen[0] != ids:
            h, a = entering(self.model, ids, self.first)
            self._seen = list(ids), (h.to(self.compute_dtype), a.to(self.compute_dtype))
        return self._seen[1]

    def served(self, ids: list[int], start: int = 0) -> tuple[Tensor, list[KV]]:
        """NLL [T - 1] of a request under the delta as it is now, as a slot holds it, and its keys and values; the pairs before
        ``start`` are history."""
        return self._nll(ids, slice(0, len(ids) - 1), self.scale.served(ids, start), self.nothing())

    def nothing(self) -> list[KV]:
        """No past."""
        G = self.stack.layers[0].k.shape[0] // self.stack.E
        none = torch.zeros(0, G, self.stack.E, dtype=self.compute_dtype)
        return [(none, none)] * (len(self.stack.layers) - 1)

    @torch.no_grad()
    def score(self, ids: list[int]) -> Tensor:
        """NLL [T - 1] in nats of each token but the first, all of them under the delta as it is now."""
        return self.served(ids)[0]

    def learn(self, ids: list[int], start: int = 0) -> list[float]:
        """As `Oracle.learn`: what the delta is when this is called served the request; its past stays as it was then."""
        h, a = self.activations(ids)
        with torch.no_grad():
            _, kv = self.served(ids, start)
        targets = torch.tensor(ids[1:])
        found, rest = chunks(self.config.learn, start, len(targets))
        self.tokens["short"] += rest
        if self.scale.on:
            if found:
                self._measure(ids, found[-1], kv)
            self.scale.note(ids[start:])
        return [self.step(h[rows], a[rows], targets[rows], before(kv, rows.start)) for rows in found]

    def _measure(self, ids: list[int], rows: slice, kv: Sequence[KV]) -> None:
        """The last chunk under every scale; what comes before it stays as it was served, whatever the scale."""
        past = before(kv, rows.start)
        losses = [self._nll(ids, rows, scale, past)[0][::2].mean().item() for scale in self.scale.measured]
        self.scale.add(losses, rows.stop - rows.start)

    @torch.no_grad()
    def _nll(self, ids: list[int], rows: slice, scale: float, past: Sequence[KV]) -> tuple[Tensor, list[KV]]:
        h, a = self.activations(ids)
        B = [{k: (scale * v).to(self.dtype).to(self.compute_dtype) for k, v in layer.items()} for layer in self.B]
        return stack_nll(self.stack, self.A, B, h[rows], a[rows], torch.tensor(ids[1:])[rows], past)

    def step(self, h: Tensor, a: Tensor, targets: Tensor, past: Sequence[KV]) -> float:
        """One chunk; the loss before its step."""
        learn, n = self.config.learn, len(targets)
        B = [{k: v.to(self.compute_dtype, copy=True).requires_grad_() for k, v in layer.items()} for layer in self.B]
        loss = stack_nll(self.stack, self.A, B, h, a, targets, past)[0].mean()
        if not math.isfinite(loss.item()) or loss.item() > learn.max_loss * math.log(self.stack.head.shape[0]):
            self.tokens["loss" if math.isfinite(loss.item()) else "nonfinite"] += n
            return loss.item()
        grads = iter(torch.autograd.grad(loss, [x for layer in B for x in layer.values()]))
        for layer, norms in zip(self.B, self.norms, strict=True):
            update(learn, layer, {k: next(grads) for k in layer}, norms, n)
        self.version += 1
        self.tokens["learned"] += n
        return loss.item()


def before(kv: Sequence[KV], first: int) -> list[KV]:
    """Keys and values of the positions before ``first``."""
    return [(k[:first], v[:first]) for k, v in kv]
