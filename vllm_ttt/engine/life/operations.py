"""Operations on sessions: of each session one at a time, in the order in which they were asked for.

An operation is a generator. It yields a Future to wait for, and goes on with its result or error; or ROOM, and is asked again
in the next step. What it returns, or raises, is the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from vllm_ttt.engine.guarded import Guarded
from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.states import State
from vllm_ttt.errors import RequestError


class Pause(Enum):
    """What an operation waits for that no Future stands for."""

    #: it has not begun
    TURN = "its turn"
    #: a place in memory
    ROOM = "room"


ROOM = Pause.ROOM
Steps = Generator[Any, Any, Any]


@dataclass(slots=True, eq=False)
class Operation:
    steps: Steps
    waits: Future | Pause = Pause.TURN
    answer: Future = field(default_factory=Future)


class Operations:
    def __init__(self, guard: Guarded, settled: Callable[[Session], None]):
        """``guard`` is told of failures that are no answers. ``settled`` is called when nothing is left to do for a session."""
        self.guard, self.settled = guard, settled
        #: sessions that have operations
        self.active: dict[int, Session] = {}

    def run(self, session: Session, steps: Steps) -> Future:
        """Run an operation after all that were asked for before, at once where there are none. Resolves to what it returns."""
        operation = Operation(steps)
        session.life.queue.append(operation)
        self.active[id(session)] = session
        if len(session.life.queue) == 1:
            self.go_on(session)
        return operation.answer

    def can_go_on(self, crowded: bool) -> bool:
        """Whether one need not wait any more. ``crowded``: there is no room, and what could make some has not happened.

        Whom an operation waits for, but for room, is busy until it need not.
        """
        for session in self.active.values():
            waits = session.life.queue[0].waits
            if waits.done() if isinstance(waits, Future) else not (waits is ROOM and crowded):
                return True
        return False

    def step(self) -> None:
        """Go on with all that need not wait any more."""
        for session in list(self.active.values()):
            self.go_on(session)

    def go_on(self, session: Session) -> None:
        """Go on with what is to be done with a session, if it need not wait any more."""
        queue = session.life.queue
        if not queue:
            return
        while queue:
            operation = queue[0]
            gone = operation.waits is Pause.TURN and session.life.state is State.GONE
            try:
                if gone:
                    raise RequestError(f"session {session.key.name!r} was removed meanwhile", 409)
                self._advance(operation)
                return
            except StopIteration as end:
                queue.popleft()
                operation.answer.set_result(end.value)
            except RequestError as error:
                queue.popleft()
                operation.answer.set_exception(error)
            except Exception:
                queue.popleft()
                message = f"session {session.key.name!r}: this failed; the server's log says why"
                operation.answer.set_exception(RequestError(message, 500))
                self.guard.failed(getattr(operation.steps, "__qualname__", "an operation"))
        del self.active[id(session)]
        self.settled(session)

    @staticmethod
    def _advance(operation: Operation) -> None:
        """Run it until it must wait. Raises StopIteration at its end, and what it raises."""
        while not isinstance(waits := operation.waits, Future) or waits.done():
            if not isinstance(waits, Future):
                operation.waits = next(operation.steps)
            elif (error := waits.exception()) is not None:
                operation.waits = operation.steps.throw(error)
            else:
                operation.waits = operation.steps.send(waits.result())
            if isinstance(operation.waits, Pause):
                return
