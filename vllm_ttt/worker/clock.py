"""Times of work on the device, without waiting for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Value = TypeVar("Value")


class Clock:
    """Marks in the stream of work: CUDA events, or the wall clock where work is done when the call returns."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def done(self, mark: Any) -> bool:
        """Whether everything before the mark has been done."""
        return mark.query() if self.cuda else True

    def wait(self, mark: Any) -> None:
        """Block until everything before the mark has been done."""
        if self.cuda:
            mark.synchronize()

    def seconds(self, first: Any, second: Any) -> float:
        """Seconds between two marks that are done."""
        return first.elapsed_time(second) / 1e3 if self.cuda else second - first


def arrived(
    under_way: Iterable[T], mark: Callable[[T], Any], value: Callable[[T], Value], clock: Clock, wait: int
) -> list[Value]:
    """What each of ``under_way`` has brought, up to the first whose mark is not done; the first ``wait`` are waited for."""
    found = []
    for i, x in enumerate(under_way):
        if i < wait:
            clock.wait(mark(x))
        elif not clock.done(mark(x)):
            break
        found.append(value(x))
    return found


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """Copy from the host without waiting for the device."""
    return values if device.type == "cpu" else values.pin_memory().to(device, non_blocking=True)


def copy_to_host(values: Tensor) -> Tensor:
    """A copy on the host, pinned on CUDA, made without waiting; it may be read once a later mark is done."""
    if values.device.type == "cpu":
        return values.clone()
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def to_host(values: Tensor) -> Tensor:
    """Copy to the host without waiting; it may be read once a later mark is done."""
    return values.to("cpu", non_blocking=True) if values.device.type != "cpu" else values
