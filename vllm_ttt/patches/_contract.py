"""How a vLLM function is wrapped: look at its signature first, refuse if it changed, stamp what was wrapped."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from vllm_ttt.errors import PatchContractError

MARK = "__vllm_ttt__"


class Asked(NamedTuple):
    """What a contract asks of vLLM."""

    module: str
    #: of the class in it; empty: the function is the module's own
    owner: str
    name: str
    #: signatures that are accepted; none: nothing of that name may be there
    parameters: tuple[str, ...]

    @property
    def where(self) -> str:
        return ".".join(part for part in (self.module, self.owner, self.name) if part)

    def problem(self, found: str | None) -> str | None:
        """What is wrong with a function that takes ``found``, or that is not there: None."""
        if not self.parameters:
            return None if found is None else f"{self.where.rpartition('.')[0]} has a method {self.name} of its own"
        if found is None:
            return f"{self.where} does not exist in this vLLM"
        if found not in self.parameters:
            return f"{self.where} takes ({found}) in this vLLM; vllm-ttt was written for ({') or ('.join(self.parameters)})"
        return None


#: where contracts are noted at the moment, instead of being compared
_notes: list[Asked] | None = None


@contextmanager
def recorded() -> Iterator[list[Asked]]:
    """While it lasts, `check` and `absent` only note what they ask: it can then be looked up in another vLLM."""
    global _notes
    _notes = notes = []
    try:
        yield notes
    finally:
        _notes = None


def check(owner: Any, name: str, *parameters: str) -> Any:
    """Return ``owner.name`` after comparing its parameter names.

    Args:
        owner: a class or a module of vLLM.
        name: the function's name in it.
        parameters: the parameter names that we rely on, separated by blanks, with ``*`` and ``**`` where they stand; several,
            where any of them will do.
    Raises:
        PatchContractError: the function is gone or takes other parameters.
    """
    raw = vars(owner).get(name)  # an inherited function of that name is another one
    asked = _asked(owner, name, parameters)
    if _notes is not None:
        _notes.append(asked)
    elif problem := asked.problem(None if raw is None else signature(raw)):
        raise PatchContractError(f"{problem}. {_ADVICE}")
    return raw


def signature(raw: Any) -> str:
    """The parameter names of what a class or module has under a name, below what was wrapped around it."""
    function = inspect.unwrap(raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw)
    return " ".join(_show(p) for p in inspect.signature(function).parameters.values())


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
    asked = _asked(owner, name, ())
    if _notes is not None:
        _notes.append(asked)
    elif present is not None and not getattr(present, MARK, False):
        raise PatchContractError(f"{asked.problem('')}. {_ADVICE}")


def add(owner: type, name: str, function: Callable) -> None:
    """Add a method that the class does not have, once. Raises as `absent`."""
    absent(owner, name)
    setattr(function, MARK, True)
    setattr(owner, name, function)


def _asked(owner: Any, name: str, parameters: tuple[str, ...]) -> Asked:
    if inspect.ismodule(owner):
        return Asked(owner.__name__, "", name, parameters)
    return Asked(owner.__module__, owner.__qualname__, name, parameters)


def _show(p: inspect.Parameter) -> str:
    return {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name


_ADVICE = "Install a vLLM that `vllm-ttt check` accepts."
