"""Runs a function on several ranks at once, processes that reach one another over gloo; cuts weights as vLLM shards them."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from vllm_ttt.worker.ranks import Ranks, Several
from vllm_ttt.worker.step.micro_step import Tail
from vllm_ttt.worker.step.qkv import QKV


def together(
    count: int, folder: Path, function: Callable[..., Any], *args: Any, seconds: float = 900
) -> tuple[list[Any], list[int | None]]:
    """What ``function(ranks, *args)`` returns on each rank, None where it has not returned, and the processes' exit codes.

    Args:
        folder: an empty one; the log of each rank is there, as ``RANK.log``.
    """
    context = mp.get_context("spawn")
    processes = [context.Process(target=_rank, args=(i, count, folder, function, args)) for i in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    results = [folder / f"{i}.pt" for i in range(count)]
    found = [torch.load(path, weights_only=False) if path.exists() else None for path in results]
    return found, [process.exitcode for process in processes]


def _rank(rank: int, count: int, folder: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    for handle in (1, 2):
        os.dup2(log, handle)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder / 'ranks'}", rank=rank, world_size=count)
    draft = folder / f"{rank}.draft"
    torch.save(function(Several(list(range(count))), *args), draft)
    draft.rename(folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def cut(tail: Tail, ranks: Ranks, first_end: int) -> Tail:
    """This rank's part of the weights; the first one's part of the vocabulary ends at ``first_end``."""
    if ranks.size == 1:
        return tail
    part = ranks.part

    def both(gate_up: Tensor) -> Tensor:
        return torch.cat([part(x, 0) for x in gate_up.chunk(2)])

    def block(b: Any) -> dict[str, Any]:
        return {"wo_DQ": part(b.wo_DQ, 1), "wgu_2FD": both(b.wgu_2FD), "wd_DF": part(b.wd_DF, 1)}

    def qkv(w: QKV) -> QKV:
        widths = [w.heads * w.head, w.kv_heads * w.head, w.kv_heads * w.head]
        heads = lambda x: torch.cat([_heads(y, ranks, w.head) for y in x.split(widths)])  # noqa: E731
        bias = None if w.bqkv_X is None else heads(w.bqkv_X)
        own = {"heads": w.heads // ranks.size, "kv_heads": max(1, w.kv_heads // ranks.size), "ranks": ranks}
        return replace(w, wqkv_XD=heads(w.wqkv_XD), bqkv_X=bias, **own)

    first, end = ((0, first_end), (first_end, len(tail.head_VD)))[ranks.rank]
    embedding = None if tail.embedding_VD is None else tail.embedding_VD[first:end]
    return replace(
        tail, **block(tail), lower=tuple(replace(b, **block(b)) for b in tail.lower),
        attentions=tuple(qkv(w) for w in tail.attentions), ao_RQ=part(tail.ao_RQ, 1), ad_RF=part(tail.ad_RF, 1),
        head_VD=tail.head_VD[first:end], embedding_VD=embedding, ranks=ranks, first_token=first, tokens=len(tail.head_VD),
        drawn=tail.projections,
    )  # fmt: skip


def _heads(x: Tensor, ranks: Ranks, width: int) -> Tensor:
    """This rank's heads, which lie along the first dimension; one that is alone is on both ranks."""
    return x if len(x) == width else ranks.part(x, 0)
