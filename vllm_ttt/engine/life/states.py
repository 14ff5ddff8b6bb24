"""The states of a session, which of them may follow which, and the generation that never goes down.

docs/architecture.md has the same as a drawing, with a sentence for each arrow; a test compares the two.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from vllm_ttt.errors import TTTError

if TYPE_CHECKING:
    from vllm_ttt.engine.life.operations import Operation


class State(Enum):
    #: the base model so far: there is no delta, and no room was given to it
    NEW = "new"
    #: its delta is a file of the state dir, and nowhere else
    ON_DISK = "on disk"
    #: it has a place in memory, and the worker is reading its file
    LOADING = "loading"
    #: the worker has its delta: requests may run
    IN_MEMORY = "in memory"
    #: what the state dir has of it is being changed; its requests wait
    CHANGING = "changing"
    #: the same, while the worker still has what it was
    CHANGING_IN_MEMORY = "changing in memory"
    #: nobody knows it here any more: there is what the state dir says, or nothing
    GONE = "gone"


#: How it begins: somebody names it who is the first to, or one that the state dir has.
START = (State.NEW, State.ON_DISK)

#: Every change of state there is, and why.
TRANSITIONS: dict[tuple[State, State], str] = {
    (State.NEW, State.IN_MEMORY): "gets a place",
    (State.NEW, State.CHANGING): "reset, delete, rollback; target of a fork",
    (State.NEW, State.GONE): "nobody needs it",
    (State.ON_DISK, State.LOADING): "gets a place",
    (State.ON_DISK, State.CHANGING): "reset, delete, rollback",
    (State.ON_DISK, State.GONE): "nobody needs it",
    (State.LOADING, State.IN_MEMORY): "read",
    (State.LOADING, State.ON_DISK): "cannot be read",
    (State.IN_MEMORY, State.NEW): "put away, has learned nothing",
    (State.IN_MEMORY, State.ON_DISK): "put away, saved",
    (State.IN_MEMORY, State.CHANGING_IN_MEMORY): "reset, delete, rollback",
    (State.CHANGING, State.NEW): "reset, deleted and named again, or not written",
    (State.CHANGING, State.ON_DISK): "rolled back, or not written",
    (State.CHANGING, State.GONE): "deleted",
    (State.CHANGING, State.CHANGING_IN_MEMORY): "target of a fork gets a place",
    (State.CHANGING_IN_MEMORY, State.IN_MEMORY): "forked, rolled back in memory, or not written",
    (State.CHANGING_IN_MEMORY, State.NEW): "reset, or deleted and named again",
    (State.CHANGING_IN_MEMORY, State.ON_DISK): "rolled back on disk",
    (State.CHANGING_IN_MEMORY, State.GONE): "deleted",
}

#: It takes one of the places in memory.
PLACED = frozenset({State.LOADING, State.IN_MEMORY, State.CHANGING_IN_MEMORY})


class TransitionError(TTTError, RuntimeError):
    """A session was to go from one state to another that may not follow it: a bug, and the answer to one call."""


@dataclass(slots=True)
class Life:
    """Where a session is in its life.

    ``generation`` grows with everything that happens to it, and never goes down, whereas its version does when it goes back.
    All questions of what is older than what are comparisons of generations.
    """

    state: State = State.NEW
    generation: int = 0
    #: when its delta last changed
    learned_at: int = 0
    #: when it last became something that it had been before, or another session: what was taken earlier is no version of it
    returned_at: int = 0
    #: when its newest version on disk was taken
    saved_at: int = 0
    #: when what the state dir says of it, the delta apart, was taken; -1: it says nothing
    recorded_at: int = -1
    #: what is being done with it, and what is to be done after that
    queue: deque[Operation] = field(default_factory=deque)

    def __post_init__(self) -> None:
        if self.state not in START:
            raise TransitionError(f"a session does not begin {self.state.value}")

    def move(self, to: State) -> None:
        """Raises TransitionError, and leaves it where it is, where that may not follow."""
        if (self.state, to) not in TRANSITIONS:
            raise TransitionError(f"a session that is {self.state.value} cannot be {to.value} next")
        self.state = to

    def touch(self) -> None:
        """It was used: what is known of it is not what the state dir says."""
        self.generation += 1

    def learned(self) -> None:
        """Its delta is another one."""
        self.generation += 1
        self.learned_at = self.generation

    def returned(self) -> None:
        """Its delta is one that it had before, or none."""
        self.learned()
        self.returned_at = self.generation

    def begin_again(self) -> None:
        """It was deleted, and named again: nothing was learned, and the state dir says nothing of it."""
        self.learned_at, self.recorded_at = 0, -1

    @property
    def placed(self) -> bool:
        return self.state in PLACED

    @property
    def in_memory(self) -> bool:
        """Whether the worker has its delta."""
        return self.state in (State.IN_MEMORY, State.CHANGING_IN_MEMORY)

    @property
    def unsaved(self) -> bool:
        """Whether its delta is not, or not like this, on disk."""
        return self.saved_at < self.learned_at

    @property
    def unrecorded(self) -> bool:
        """Whether the state dir does not say what is known of it."""
        return self.recorded_at < self.generation
