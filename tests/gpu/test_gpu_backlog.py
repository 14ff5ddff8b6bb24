"""The backlog's gather on CUDA, where two rows for one place would leave either, or a torn one."""

from __future__ import annotations

import pytest
import torch

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import Rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CHUNK, WIDTH = 512, 1024


def test_each_chunk_keeps_its_own_rows() -> None:
    """200 batches in which a chunk that repeats itself gives its page back beside another session's chunk."""
    cuda = torch.device("cuda")
    for trial in range(200):
        h = torch.full((2 * CHUNK + 2, WIDTH), 7.0, device=cuda).bfloat16()
        h[CHUNK + 1 :] = 1.0
        backlog = Backlog(4, CHUNK, 8, h, h)
        backlog.start("spoiled", RequestPlan(1, CHUNK + 1, True, False, repetitive=[(0, CHUNK)]))
        backlog.start("victim", RequestPlan(2, CHUNK + 1, True, False))
        tokens = torch.arange(2 * CHUNK + 2, device=cuda)
        backlog.take([Rows("spoiled", 0, 0, tokens[: CHUNK + 1]), Rows("victim", CHUNK + 1, 0, tokens[CHUNK + 1 :])], h, h)
        (chunk,) = backlog.queues[2]
        assert (backlog.h_PCD[chunk.page] == 1.0).all(), f"rows of another session in batch {trial}"
        assert torch.equal(backlog.t_PC[chunk.page], tokens[CHUNK + 1 : -1])
