"""What was promised of a session: what it is, and what may be found of it after a kill."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_ttt.engine.ledger import ASKED_FOR

#: What a session's delta held at version 0, 1, 2, ...; None: there is no such session.
Chain = tuple[float, ...] | None
FRESH: Chain = (0.0,)
#: Why a session is frozen; None: it is not.
Frozen = str | None
GUARD = "by the guard"


class Truth:
    """What a session is, and what may be found of it after a kill."""

    def __init__(self) -> None:
        self.chain: Chain = None
        self.found: set[Chain] = {None}
        self.frozen: Frozen = None
        #: the same of ``frozen``
        self.found_frozen: set[Frozen] = {None}
        #: what was asked of it and is not answered, in order; a fork no longer than until its copy is made
        self.asked: list[tuple[str, Any]] = []
        #: what a fork that is under way has made of it, and what the guard has made of that
        self.copied: list[tuple[Chain, Frozen]] = []
        #: what it was before the guard returned it, while it is to be rolled back
        self.before: Chain = None
        #: how often the guard has stopped it
        self.stops = 0

    def learn(self, value: float) -> None:
        assert self.chain is not None
        self.chain = (*self.chain, self.chain[-1] + value)
        self.found.add(self.chain)

    def back_to(self, version: int) -> Chain:
        """What it was at a version, also where the guard has returned it further since it was asked to go back."""
        chain = max(self.chain or (), self.before or (), key=len)
        assert version < len(chain)
        return chain[: version + 1]

    def stop(self, version: int) -> None:
        """The guard has frozen it, and it is at ``version``."""
        if self.copied:
            self.copied.append(((self.copied[-1][0] or ())[: version + 1], GUARD))
            return
        assert self.chain is not None
        if any(op == "rollback" for op, _ in self.asked):
            self.before = max(self.chain, self.before or (), key=len)
        self.chain = self.chain[: version + 1]
        self.found.add(self.chain)
        self.frozen, self.stops = GUARD, self.stops + 1
        self.found_frozen.add(GUARD)

    def promise(self, chain: Chain) -> None:
        """It is that, on disk."""
        self.chain, self.found = chain, {chain}

    def promise_frozen(self, frozen: Frozen, unless: Iterable[Frozen] = ()) -> None:
        """It is that, on disk; or it is one of ``unless``, which is not."""
        self.frozen, self.found_frozen = frozen, {frozen, *unless}

    def after_reset(self) -> Frozen:
        return ASKED_FOR if self.frozen == ASKED_FOR else None  # the guard's goes with the delta

    def done(self, op: str, argument: Any, result: dict[str, Any], stops: int, named: bool) -> None:
        """It has been answered.

        Args:
            stops: how often the guard had stopped the session when it was asked for.
            named: whether a request of it is there.
        """
        assert self.chain is not None or op == "delete"
        is_frozen = kind(result.get("frozen_reason"))
        meanwhile: set[Frozen] = {GUARD} if self.stops != stops else set()
        if op == "save":
            assert self.chain is not None
            if result["saved_version"] is not None:
                self.found = {self.back_to(v) for v in range(result["saved_version"], len(self.chain))}
                assert self.found, "it was saved at a version that it went back from"
                self.promise_frozen(self.frozen, self.found_frozen if meanwhile else ())
        elif op == "rollback":
            assert result["version"] == argument == result["saved_version"]
            self.promise(self.back_to(argument))
            self.promise_frozen(self.frozen, self.found_frozen if meanwhile else ())
        elif op == "reset":
            self.promise(FRESH)
            assert is_frozen in ({ASKED_FOR, None} if meanwhile else {self.after_reset()})
            self.promise_frozen(is_frozen)
        elif op == "delete":
            self.promise(None)
            self.promise_frozen(None)
            if named:  # it was named again meanwhile
                self.chain, self.found = FRESH, {None, FRESH}
        elif op in ("freeze", "unfreeze"):
            why = ASKED_FOR if op == "freeze" else None
            assert is_frozen in {why} | meanwhile
            self.promise_frozen(why, meanwhile)
            self.frozen = is_frozen
            if op == "freeze":
                self.found.discard(None)
        elif op == "export":
            Path(result["path"]).unlink()
        if op in ("rollback", "reset"):
            assert result["version"] == len(self.chain or ()) - 1

    def after_a_kill(self) -> tuple[set[Chain], set[Frozen]]:
        """What may be found. The first of what is asked may have been written and not answered."""
        found, frozen = set(self.found), set(self.found_frozen)
        op, argument = self.asked[0] if self.asked else ("", 0)
        if op == "become":
            found |= {chain for chain, _ in self.copied}
            frozen |= {why for _, why in self.copied}
        elif self.chain is not None:
            if op == "rollback" and argument < len(max(self.chain, self.before or (), key=len)):
                found.add(self.back_to(argument))
            elif op in ("reset", "delete"):
                found.add(FRESH if op == "reset" else None)
                frozen |= {ASKED_FOR, None}
            elif op in ("freeze", "unfreeze"):
                frozen.add(ASKED_FOR if op == "freeze" else None)
        return found, frozen


def kind(frozen: str | None) -> Frozen:
    return frozen if frozen in (None, ASKED_FOR) else GUARD
