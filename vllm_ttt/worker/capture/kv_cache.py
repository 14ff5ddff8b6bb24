"""Keys and values as they were served, read from vLLM's own KV cache: what the chunks of a step attend to (preset `deep`).

vLLM hands a layer's cache to its attention as [blocks, G, N, 2 E], and two arrangements inside a block occur. Flash Attention
and its like keep a token's key and value beside each other, in *rows*. The CPU's kernels *pack* the block of each head in an
order of their own; that order is found at the start, by letting vLLM write numbered keys and values and looking where they are.
Either way vLLM itself writes random rows into every adapted layer, and they must come back.

Dimension suffixes, besides those of attention.py:
  B blocks   N tokens of a block   P tokens that are read   C the key and the value of a head, 2 E
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.errors import ConfigError

#: Keys and values in 8 bits, by vLLM's name of the cache's type; one scale for all of them, or one for each head.
EIGHT_BITS = {"fp8": torch.float8_e4m3fn, "fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
#: Numbers are written to the cache in digits of this base, which any type of cache holds.
BASE = 4


class Layer:
    """The cache of one layer."""

    def __init__(self, attn: Any):
        """``attn``: vLLM's Attention, whose cache is there."""
        self.attn, self.kv_BGNC = attn, attn.kv_cache
        _, self.heads, self.tokens, width = self.kv_BGNC.shape
        self.width = width // 2
        self.eight_bits = EIGHT_BITS.get(attn.kv_cache_dtype)
        rows = self.kv_BGNC.transpose(1, 2)
        #: [B N, G, C] where rows lie at equal distances: one index finds a token
        self.flat = rows.flatten(0, 1) if rows.stride(0) == self.tokens * rows.stride(1) else None
        #: [N, C] int64, where in a head's block each number of a token is; None: in rows
        self.order_NC: Tensor | None = None

    def read(self, slots_P: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P, G, E] in the slots ``slots_P``, int64 on the device of the cache."""
        key, value = self._raw(slots_P).split(self.width, -1)
        if self.eight_bits is None:
            return key, value
        key, value = (x.contiguous().view(self.eight_bits).float() for x in (key, value))
        return key * self.attn._k_scale.view(-1, 1), value * self.attn._v_scale.view(-1, 1)

    def _raw(self, slots_P: Tensor) -> Tensor:
        if self.order_NC is None and self.flat is not None:
            return self.flat.index_select(0, slots_P)
        block_P, offset_P = slots_P // self.tokens, slots_P % self.tokens
        if self.order_NC is None:
            return self.kv_BGNC.transpose(1, 2)[block_P, offset_P]
        heads_G = torch.arange(self.heads, device=slots_P.device)
        at_PC = self.order_NC.index_select(0, offset_P)
        return self.kv_BGNC.flatten(2)[block_P[:, None, None], heads_G[:, None], at_PC[:, None]]

    def holds(self, dtype: torch.dtype) -> bool:
        """Whether random keys and values that vLLM writes come back: as they are, or as near as 8 bits can be."""
        shape, random = (2, self.tokens, self.heads, self.width), torch.Generator().manual_seed(0)
        expected = self._write(torch.randn(shape, generator=random).to(self.kv_BGNC.device), dtype)
        found = self.read(torch.arange(self.tokens, device=self.kv_BGNC.device))
        if self.eight_bits is None:
            return all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))
        step = 2 * torch.finfo(self.eight_bits).eps
        scales = self.attn._k_scale, self.attn._v_scale
        return all(
            bool(((x - y.float()).abs() <= step * y.float().abs() + 0.002 * scale.max()).all())
            for x, y, scale in zip(found, expected, scales, strict=True)
        )

    def find_order(self, dtype: torch.dtype) -> None:
        """Number the keys and values of a block, digit by digit, and see where in the block of a head each number is."""
        size = 2 * self.tokens * self.width
        number = torch.arange(size, device=self.kv_BGNC.device).view(2, self.tokens, 1, self.width)
        number = number.expand(-1, -1, self.heads, -1)
        found, place = torch.zeros(size, dtype=torch.int64, device=number.device), 1
        while place < size:
            self._write((number // place % BASE).float() * 1.05, dtype)  # some kernels cut where others round
            raw = self.kv_BGNC[0, 0].flatten()
            digits = raw.float() if self.eight_bits is None else raw.view(self.eight_bits).float()
            found += digits.round().long() * place
            place *= BASE
        order = torch.empty_like(found).fill_(-1)
        inside = (found >= 0) & (found < size)
        order[found[inside]] = torch.arange(size, device=found.device)[inside]
        self.order_NC = order.view(2, self.tokens, self.width).transpose(0, 1).flatten(1)

    def _write(self, numbers_2NGE: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Have vLLM write keys and values to the null block, which nobody reads; returns them.

        With 8 bits they are so many times the scale that the cache holds the numbers themselves.
        """
        key, value = numbers_2NGE.contiguous()
        if self.eight_bits is not None:
            key, value = key * self.attn._k_scale.view(-1, 1), value * self.attn._v_scale.view(-1, 1)
        key, value = key.to(dtype), value.to(dtype)
        slots_N = torch.arange(self.tokens, device=self.kv_BGNC.device)
        self.attn.impl.do_kv_cache_update(self.attn, key, value, self.kv_BGNC, slots_N)
        return key, value


class KVCache:
    """The caches of the layers whose attention the step computes, lowest first. `bind` comes before any reading."""

    def __init__(self, attentions: Sequence[Any], dtype: torch.dtype):
        """``attentions``: vLLM's Attention modules. ``dtype``: of the model."""
        self.attentions, self.dtype = attentions, dtype
        self.layers: list[Layer] = []
        #: which of the block tables of a request is theirs, and tokens of one of its blocks
        self.group, self.block = 0, 1

    def bind(self, groups: Sequence[Any]) -> None:
        """vLLM has allocated its cache: find out how it lies there.

        Args:
            groups: `KVCacheConfig.kv_cache_groups`.
        Raises:
            ConfigError: the layers have block tables of several kinds, or what is written to the cache does not come back.
        """
        names = {attn.layer_name for attn in self.attentions}
        found = [i for i, group in enumerate(groups) if names <= set(group.layer_names)]
        if not found:
            raise ConfigError(
                "the adapted layers cache their keys and values in blocks of several kinds, which the preset deep does not "
                "follow; lower adapt.layers, or serve with adapt.preset last"
            )
        self.group = found[0]
        self.block = groups[self.group].kv_cache_spec.block_size
        self.layers = [Layer(attn) for attn in self.attentions]
        for layer in self.layers:
            self._check(layer)

    def read(self, layer: int, slots_P: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [P, G, E] of a layer, the lowest being 0."""
        return self.layers[layer].read(slots_P)

    def slots(self, blocks: Sequence[int], tokens: int) -> Tensor:
        """[tokens] int64 on the host: the slots of a request's first tokens.

        Args:
            blocks: the request's, in order, as vLLM numbers them.
        """
        positions = torch.arange(tokens)
        return torch.tensor(blocks, dtype=torch.int64)[positions // self.block] * self.block + positions % self.block

    def _check(self, layer: Layer) -> None:
        attn, kept = layer.attn, layer.kv_BGNC[0].clone()
        try:
            if layer.holds(self.dtype):
                return
            if layer is not self.layers[0]:
                layer.order_NC = self.layers[0].order_NC
            elif layer.kv_BGNC[0, 0].is_contiguous():
                layer.find_order(self.dtype)
            if layer.order_NC is None or bool((layer.order_NC < 0).any()) or not layer.holds(self.dtype):
                raise ConfigError(
                    f"the preset deep cannot read the KV cache of {attn.layer_name}, as {attn.attn_backend.get_name()} keeps "
                    f"it (--kv-cache-dtype {attn.kv_cache_dtype}): choose another --attention-backend or --kv-cache-dtype, or "
                    "serve with adapt.preset last"
                )
        finally:
            layer.kv_BGNC[0].copy_(kept)
