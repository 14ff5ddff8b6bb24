"""What the ranks of an engine (--tensor-parallel-size) say to each other, so that all of them decide the same.

Whatever depends on a clock, on an event of the device or on a thread is decided by the first rank, and the others follow
(`agree`). On the device, what decides is gathered and then summed in the order of the ranks, or is the first rank's: an
all-reduce need not give all of them the same bits. What only carries activations and gradients is reduced (`sum`).

Each rank keeps a digest of what it has done (`note`), and each decision brings the first rank's along: ranks that have parted
are found at the next one. One that has failed, or parted, ends its process with its reason, and so vLLM ends the engine: the
others would wait for it in a collective for ever.
"""

from __future__ import annotations

import logging
import os
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

#: Seconds for which a rank waits for another between two steps: as long as vLLM waits for a step.
PATIENCE = 300
#: The exit status of a rank that has failed.
FAILED = 70


class Channel:
    """What threads of one name, one of each rank, say to each other, in the order of their jobs. This one: of a rank alone."""

    def gather(self, x: Tensor) -> list[Tensor] | None:
        """Of all ranks, on the host; None: this is not the first rank."""
        return [x]

    def tell(self, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on the first rank; raises what it raises there."""
        return decide()


class Ranks:
    """This one: of a rank alone. It says nothing, and copies no tensor."""

    size, rank = 1, 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, x: Tensor) -> Tensor:
        """Over the ranks; ``x`` may be overwritten. The bits may differ between the ranks."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """[ranks, ...], the same bits everywhere."""
        return x[None]

    def total(self, x: Tensor) -> Tensor:
        """Over the ranks, the same bits everywhere."""
        return x

    def same(self, x: Tensor) -> Tensor:
        """The first rank's; ``x`` may be overwritten."""
        return x

    def part(self, x: Tensor, dim: int) -> Tensor:
        """This rank's of so many equal parts as there are ranks: a view."""
        return x

    def agree(self, what: str, decide: Callable[[], Any]) -> Any:
        """What ``decide`` returns on the first rank. The others do not call it; ``what`` must be the same on all."""
        return decide()

    def note(self, *numbers: int) -> None:
        """Something that all ranks do."""

    def failed(self, what: str) -> None:
        """Called while an exception is handled: end the process where other ranks would wait for this one."""

    @contextmanager
    def alike(self, what: str) -> Iterator[None]:
        """Around what all ranks must do, or none: where it fails, the others may have done it."""
        try:
            yield
        except Exception:
            self.failed(what)
            raise

    def channel(self) -> Channel:
        return Channel()


ALONE = Ranks()


class Wire:
    """Collectives of torch, on tensors of the device, in its current stream.

    vLLM's own ways to reduce are sized by whoever comes first, or give ranks other bits.
    """

    def __init__(self, first: int, group: Any):
        """``first``: the rank of torch.distributed that comes first in ``group``."""
        self.first, self.group = first, group

    def sum(self, x: Tensor) -> Tensor:
        """In place."""
        dist.all_reduce(x, group=self.group)
        return x

    def gather(self, x: Tensor, out: Tensor) -> None:
        """``out``: [ranks, ...]."""
        dist.all_gather(list(out.unbind()), x, group=self.group)

    def same(self, x: Tensor) -> None:
        """In place."""
        dist.broadcast(x, self.first, group=self.group)


class Several(Ranks):
    """One of several. All ranks make it at the same time, and each `channel` in the same order."""

    def __init__(self, members: list[int], group: Any = None, queue: Any = None):
        """
        Args:
            members: the ranks of torch.distributed that are ours, in order.
            group: of theirs, for tensors of the device; None for tensors on the host.
            queue: vLLM's MessageQueue, written by the first of them, for what they agree upon; None: gloo, which takes ten
                times as long.
        """
        self.members, self.size, self.rank = members, len(members), members.index(dist.get_rank())
        self.wire, self.group = Wire(members[0], group or _group(members, PATIENCE)), _group(members, PATIENCE)
        self.queue, self.digest = queue, 0

    def sum(self, x: Tensor) -> Tensor:
        return self.wire.sum(x.contiguous()) if x.numel() else x

    def gather(self, x: Tensor) -> Tensor:
        out = x.new_empty(self.size, *x.shape)
        if x.numel():
            self.wire.gather(x.contiguous(), out)
        return out

    def total(self, x: Tensor) -> Tensor:
        return self.gather(x).sum(0)

    def same(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        if x.numel():
            self.wire.same(x)
        return x

    def part(self, x: Tensor, dim: int) -> Tensor:
        width = x.shape[dim] // self.size
        return x.narrow(dim, self.rank * width, width)

    def agree(self, what: str, decide: Callable[[], Any]) -> Any:
        said = self._said((what, self.digest, decide()) if self.first else None)
        if said[:2] != (what, self.digest):
            reason = f"it would decide {what!r} after {self.digest:08x}, and the first rank {said[0]!r} after {said[1]:08x}"
            self.end(f"the ranks have parted: {reason}")
        return said[2]

    def _said(self, value: Any) -> Any:
        """The first rank's ``value``."""
        if self.queue is None:
            return _tell(self.members, self.group, value)
        if not self.first:
            return self.queue.dequeue(timeout=PATIENCE)
        self.queue.enqueue(value, timeout=PATIENCE)
        return value

    def note(self, *numbers: int) -> None:
        self.digest = zlib.crc32(repr(numbers).encode(), self.digest)

    def failed(self, what: str) -> None:
        self.end(what)

    def end(self, what: str) -> None:
        """End this process, and so the engine."""
        from vllm_ttt.log import logger_of  # it needs vLLM, and the step does not

        logger_of(__name__).critical(
            "vllm-ttt: rank %d of %d ends the engine, since the others cannot go on without it: %s",
            self.rank, self.size, what, exc_info=sys.exc_info()[1],
        )  # fmt: skip
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(FAILED)  # not by an exception: a thread that waits for another rank would be waited for

    def channel(self) -> Channel:
        return _Channel(self)


class _Channel(Channel):
    def __init__(self, ranks: Several):
        self.ranks, self.group = ranks, _group(ranks.members, None)

    def gather(self, x: Tensor) -> list[Tensor] | None:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in range(self.ranks.size)] if self.ranks.first else None
        if x.numel():
            dist.gather(x, found, self.ranks.members[0], group=self.group)
        return found

    def tell(self, decide: Callable[[], Any]) -> Any:
        value, error = None, None
        if self.ranks.first:
            try:
                value = decide()
            except Exception as raised:
                error = raised
        value, error = _tell(self.ranks.members, self.group, (value, error))
        if error is not None:
            raise error
        return value


def ranks_of(vllm_config: Any) -> Ranks:
    """Of the worker that runs here; all workers of the engine ask at once."""
    if vllm_config.parallel_config.tensor_parallel_size == 1:
        return ALONE
    from vllm.distributed import get_tp_group

    check()
    group = get_tp_group()
    # On the host not vLLM's: that may be one of its own, in shared memory.
    device = group.device_group if dist.get_backend(group.device_group) == "nccl" else None
    return Several(group.ranks, device, group.create_mq_broadcaster())


def check() -> None:
    """Raises PatchContractError where vLLM's groups of ranks are not what this was written for."""
    from vllm.distributed import parallel_state
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

    from vllm_ttt.patches import _contract

    _contract.check(parallel_state, "get_tp_group", "")
    factory = "self writer_rank external_writer_handle blocking"
    _contract.check(parallel_state.GroupCoordinator, "create_mq_broadcaster", factory)
    _contract.check(MessageQueue, "enqueue", "self obj timeout")
    _contract.check(MessageQueue, "dequeue", "self timeout indefinite")


def _group(members: list[int], seconds: int | None) -> Any:
    return dist.new_group(members, timeout=None if seconds is None else timedelta(seconds=seconds), backend="gloo")


def _tell(members: list[int], group: Any, value: Any) -> Any:
    said = [value]
    dist.broadcast_object_list(said, members[0], group=group)
    return said[0]
