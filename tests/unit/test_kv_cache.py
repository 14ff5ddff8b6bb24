"""What vLLM writes to its KV cache is what the step reads there, however the cache is arranged."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from caches import Rows, attention, bound, cpu_attention, group, write
from torch import Tensor

from vllm_ttt.errors import ConfigError
from vllm_ttt.worker.capture.kv_cache import KVCache

pytestmark = pytest.mark.unit

BLOCKS, HEADS, WIDTH = 6, 3, 64


def filled(attn: Any, dtype: torch.dtype, tokens: int) -> tuple[Tensor, Tensor]:
    """Random keys and values for every slot of the cache but the null block's."""
    slots = torch.arange(tokens, BLOCKS * tokens)
    key, value = (torch.randn(len(slots), HEADS, WIDTH).to(dtype) for _ in range(2))
    write(attn, key, value, slots)
    return key, value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "block"), [(32, 32), (128, 128), (32, 128)], ids=["32", "128", "kernel blocks"])
def test_a_cpus_cache(dtype: torch.dtype, tokens: int, block: int) -> None:
    """Packed for the kernel; ``block`` is what the scheduler hands out, which may be several of the kernel's."""
    attn = [cpu_attention(f"layer{i}", BLOCKS, HEADS, WIDTH, dtype, tokens) for i in range(2)]
    cache = bound(attn, dtype, block)
    assert all(not layer.kv_cache.any() for layer in attn), "nothing is left of what was tried"
    for i in (1, 0):
        key, value = filled(attn[i], dtype, tokens)
        slots = torch.randperm(len(key))[:100]
        found = cache.read(i, slots + tokens)
        assert torch.equal(found[0], key[slots])
        assert torch.equal(found[1], value[slots])
    assert cache.slots([3, 1], block + 2).tolist() == [*range(3 * block, 4 * block), block, block + 1]


@pytest.mark.parametrize("heads_first", [False, True])
def test_rows(heads_first: bool) -> None:
    """Flash Attention's cache: a token's heads beside each other, or each head's tokens; other layers' blocks lie between."""
    shape = (2 * BLOCKS, HEADS, 16, 2 * WIDTH) if heads_first else (2 * BLOCKS, 16, HEADS, 2 * WIDTH)
    kv_cache = torch.zeros(shape)[::2] if heads_first else torch.zeros(shape)[:BLOCKS].transpose(1, 2)
    attn = attention("layer", Rows(), kv_cache)
    cache = bound([attn], block=16)
    assert (cache.layers[0].flat is None) == heads_first
    key, value = filled(attn, torch.float32, 16)
    slots = torch.randperm(len(key))[:40]
    found = cache.read(0, slots + 16)
    assert torch.equal(found[0], key[slots])
    assert torch.equal(found[1], value[slots])


#: vLLM's CPU backend has a cache of 8 bits where the CPU has AVX-512.
EIGHT_BITS = [("fp8_e4m3", True)] + [("fp8_e4m3", False), ("fp8_e5m2", False)] * torch.cpu._is_avx512_supported()


@pytest.mark.parametrize(("kind", "rows"), EIGHT_BITS)
def test_eight_bits(kind: str, rows: bool) -> None:
    """Each number times the scale of its layer; one read is as good as another, so it is what vLLM's kernels make of it."""
    scales = (0.003, 0.5)
    if rows:
        kv_cache = torch.zeros(BLOCKS, 32, HEADS, 2 * WIDTH, dtype=torch.uint8).transpose(1, 2)
        attn = attention("layer", EightBits(), kv_cache, kind, scales)
    else:
        attn = cpu_attention("layer", BLOCKS, HEADS, WIDTH, torch.bfloat16, cache_dtype=kind, scales=scales)
    cache = bound([attn], torch.bfloat16)
    slots = torch.arange(32, BLOCKS * 32)
    expected = [torch.randn(len(slots), HEADS, WIDTH).clamp(-1, 1).bfloat16() for _ in range(2)]
    write(attn, expected[0], expected[1], slots)
    for found, true, scale in zip(cache.read(0, slots), expected, scales, strict=True):
        error, step = (found - true.float()).abs(), {"fp8_e4m3": 1 / 8, "fp8_e5m2": 1 / 4}[kind]
        assert (error <= step * true.float().abs() + scale / 256).all()
        assert error.any(), "8 bits hold no 16"


class EightBits(Rows):
    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        key, value = (x.float() / scale for x, scale in ((key, layer._k_scale), (value, layer._v_scale)))
        key, value = (x.to(torch.float8_e4m3fn).view(torch.uint8) for x in (key, value))
        super().do_kv_cache_update(layer, key, value, kv_cache, slots)


class Lossy(Rows):
    """A cache that keeps less than it was given."""

    def do_kv_cache_update(self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
        super().do_kv_cache_update(layer, key.round(), value, kv_cache, slots)


def test_what_does_not_come_back_is_refused() -> None:
    attn = attention("layers.3", Lossy(), torch.zeros(BLOCKS, HEADS, 16, 2 * WIDTH))
    with pytest.raises(ConfigError, match=r"cannot read the KV cache of layers\.3, as SOME_ATTN keeps it.*adapt\.preset last"):
        bound([attn], block=16)
    assert not attn.kv_cache.any()


def test_layers_with_block_tables_of_their_own() -> None:
    """Those of the adapted layers must be the same; others may have their own."""
    attn = [cpu_attention(f"layer{i}", BLOCKS, HEADS, WIDTH) for i in range(3)]
    with pytest.raises(ConfigError, match="blocks of several kinds"):
        KVCache(attn[1:], torch.float32).bind([group(["layer0", "layer1"]), group(["layer2"])])
    cache = KVCache(attn[1:], torch.float32)
    cache.bind([group(["layer0"]), group(["layer1", "layer2"], 64)])
    assert (cache.group, cache.block) == (1, 64)
