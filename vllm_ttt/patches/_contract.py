"""How a vLLM function is wrapped: look at its signature first, refuse if it changed, stamp what was wrapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from vllm_ttt.errors import PatchContractError

MARK = "__vllm_ttt__"


def check(owner: Any, name: str, parameters: str) -> Any:
    """Return ``owner.name`` after comparing its parameter names.

    Args:
        owner: a class or a module of vLLM.
        name: the function's name in it.
        parameters: the parameter names that we rely on, separated by blanks, with ``*`` and ``**`` where they stand.
    Raises:
        PatchContractError: the function is gone or takes other parameters.
    """
    where = f"{getattr(owner, '__module__', None) or ''}.{getattr(owner, '__qualname__', owner.__name__)}.{name}".lstrip(".")
    raw = vars(owner).get(name)  # an inherited function of that name is another one
    if raw is None:
        raise PatchContractError(f"{where} does not exist in this vLLM; vllm-ttt supports vLLM 0.32. {_ADVICE}")
    function = inspect.unwrap(raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw)
    found = " ".join(_show(p) for p in inspect.signature(function).parameters.values())
    if found != parameters:
        raise PatchContractError(f"{where} takes ({found}) in this vLLM; vllm-ttt was written for ({parameters}). {_ADVICE}")
    return raw


def wrap(owner: Any, name: str, parameters: str, make: Callable[[Callable], Callable]) -> None:
    """Replace ``owner.name`` by ``make(original)``, once: a second call does nothing.

    A classmethod stays one (``make`` then gets the underlying function, whose first parameter is the class), and so
    does a staticmethod.
    """
    raw = inspect.getattr_static(owner, name, None)
    kind = type(raw) if isinstance(raw, classmethod | staticmethod) else None
    original: Any = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
    if getattr(original, MARK, False):
        return
    check(owner, name, parameters)
    wrapped = functools.wraps(original)(make(original))
    setattr(wrapped, MARK, True)
    setattr(owner, name, kind(wrapped) if kind else wrapped)


def absent(owner: type, name: str) -> None:
    """Raise PatchContractError where the class has a method of that name which is not ours."""
    present = inspect.getattr_static(owner, name, None)
    if present is not None and not getattr(present, MARK, False):
        raise PatchContractError(f"{owner.__module__}.{owner.__qualname__} has a method {name} of its own. {_ADVICE}")


def add(owner: type, name: str, function: Callable) -> None:
    """Add a method that the class does not have, once. Raises as `absent`."""
    absent(owner, name)
    setattr(function, MARK, True)
    setattr(owner, name, function)


def _show(p: inspect.Parameter) -> str:
    return {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name


_ADVICE = "Install a vLLM that `vllm-ttt check` accepts."
