"""A method of a live object that is another one for a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, name: str, function: Callable) -> Iterator[None]:
    """Let the instance ``owner`` have ``function`` under that name for a time, in front of its class's."""
    missing = object()
    before = vars(owner).get(name, missing)
    setattr(owner, name, function)
    try:
        yield
    finally:
        if before is missing:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
