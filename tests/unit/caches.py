"""KV caches as vLLM hands them to its layers, written by vLLM's own kernel for CPUs, or row by row as Flash Attention's is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vllm_ttt.worker.capture.kv_cache import KVCache

#: Tokens of a block.
BLOCK = 32


class Rows:
    """Writes as vllm/v1/attention/backends/flash_attn.py does: [blocks, heads, tokens, 2 width], in any strides."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        tokens = kv_cache.shape[2]
        rows = torch.cat((key, value), -1).to(kv_cache.dtype)
        kv_cache.transpose(1, 2)[slots // tokens, slots % tokens] = rows


def attention(name: str, impl: Any, kv_cache: Tensor, cache_dtype: str = "auto", scales: tuple[float, float] = (1, 1)) -> Any:
    """What `KVCache` sees of vLLM's Attention."""
    return SimpleNamespace(
        layer_name=name,
        impl=impl,
        kv_cache=kv_cache,
        kv_cache_dtype=cache_dtype,
        attn_backend=SimpleNamespace(get_name=lambda: "SOME_ATTN"),
        _k_scale=torch.tensor(scales[0], device=kv_cache.device),
        _v_scale=torch.tensor(scales[1], device=kv_cache.device),
        _k_scale_float=scales[0],
        _v_scale_float=scales[1],
    )


def cpu_attention(
    name: str,
    blocks: int,
    heads: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    tokens: int = BLOCK,
    cache_dtype: str = "auto",
    scales: tuple[float, float] = (1, 1),
) -> Any:
    """A layer of vLLM's CPU backend."""
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa

    current_platform.import_kernels()  # of several builds the one that this CPU can run
    impl: Any = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)  # its __init__ asks for the config of an engine
    impl.attn_type, impl.kv_cache_dtype = "decoder", cache_dtype
    kv_cache = torch.zeros(blocks, heads, tokens, 2 * width, dtype=dtype if cache_dtype == "auto" else torch.uint8)
    attn = attention(name, impl, kv_cache, cache_dtype, scales)
    attn.isa = _get_attn_isa(dtype, tokens, width, cache_dtype)
    return attn


def bound(attentions: list[Any], dtype: torch.dtype = torch.float32, block: int = BLOCK) -> KVCache:
    """A cache that the layers alone use, in blocks of ``block`` tokens."""
    cache = KVCache(attentions, dtype)
    cache.bind([group([attn.layer_name for attn in attentions], block)])
    return cache


def group(names: list[str], block: int = BLOCK) -> Any:
    """As `KVCacheConfig.kv_cache_groups` has them."""
    return SimpleNamespace(layer_names=names, kv_cache_spec=SimpleNamespace(block_size=block))


def write(attn: Any, key: Tensor, value: Tensor, slots: Tensor) -> None:
    """As vLLM's forward does."""
    attn.impl.do_kv_cache_update(attn, key, value, attn.kv_cache, slots)
