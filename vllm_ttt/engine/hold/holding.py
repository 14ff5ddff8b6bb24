"""Requests of sessions that may not begin yet. They wait here, outside vLLM's queue, and cost nobody anything.

First each waits in the *lane* of its session: for the session to be in memory, and for what was sent to it earlier to be
learned. The head of a lane is looked at when something about its session has changed, the others never. If the session needs a
place in memory, the head stands in the line for *places*, in the order of arrival. While somebody stands there, no request that
came later passes its lane, of whichever session: it stands behind. So the sessions that have a place run out of requests, and
one whose requests all stand there may have to give its place up. Whoever has come gets a place after what came before it.

Then it stands in one *line* with all others, for a slot, and for room in the backlog where it is to be learned. Of a line the
head alone is looked at: nobody is overtaken. What is let go is vLLM's, and its session keeps a slot until the last such request
has left.
"""

from __future__ import annotations

import heapq
import itertools
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.request import Request, RequestStatus

from vllm_ttt.engine.hold.line import Line, Order
from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.requests import Attached
from vllm_ttt.errors import RequestError
from vllm_ttt.types import SessionKey

#: Of so many sessions the worker is told that somebody waits for what they learn: more than it learns in one step.
AWAITED = 64


@dataclass(slots=True, eq=False)
class Lane:
    """The requests of one session that are in the engine."""

    key: SessionKey
    #: None: they are nobody's
    session: Session | None = None
    line: Line = field(default_factory=Line)
    #: its first request, where that stands in the line for places
    first: Entry | None = None
    #: requests that wait, in the lane or in a line behind it
    held: int = 0
    #: requests that are vLLM's
    out: int = 0
    #: whether the session is not in memory, or is being changed: whoever ends that says so
    asleep: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    request: Request
    #: None: it is nobody's
    attached: Attached | None
    lane: Lane
    #: of arrival, which children of n > 1 share; and a number that is its own
    order: Order
    #: where it waits; None: it is vLLM's
    line: Line | None = None


class Holding:
    def __init__(
        self,
        tiers: Tiers,
        room: Callable[[Attached], bool],
        slots: int,
        most: int = 0,
        wait: bool = True,
        priority: bool = False,
    ):
        """
        Args:
            room: whether the backlog has room for what of a request is to be learned.
            slots: sessions that may be served at once.
            most: requests of one session that may wait; 0: any number.
            wait: whether a request waits until what was sent to its session before it is learned.
            priority: whether vLLM serves by priority.
        """
        self.tiers, self.room, self.slots, self.most, self.wait, self.priority = tiers, room, slots, most, wait, priority
        self.places = tiers.places
        self.entries: dict[str, Entry] = {}
        self.lanes: dict[SessionKey, Lane] = {}
        #: those who have passed their lane; and of those, who has a slot and lacks room in the backlog
        self.line, self.parked = Line(), Line()
        #: lanes whose session has changed
        self.due: dict[SessionKey, Lane] = {}
        #: sessions the first of whose waiting requests waits for what was sent earlier to be learned
        self.awaited: dict[SessionKey, Session] = {}
        #: sessions that have a slot
        self.taken = 0
        #: requests that wait
        self.count = 0
        self.numbers = itertools.count()

    def admit(self, key: SessionKey, samples: int = 1) -> None:
        """Raise RequestError (429) where no more requests of the session may wait, or not so many ``samples`` of one; 0: it
        belongs to one that has been let in."""
        held = lane.held if (lane := self.lanes.get(key)) is not None else 0
        if self.most and samples and held + samples > self.most:
            more = "" if samples == 1 else f"this one has {samples} samples, "
            raise RequestError(
                f"{held} requests of session {key.name!r} wait for it already, {more}and {self.most} may "
                "(sessions.held_per_session); send the next when one of them has been answered",
                429,
            )

    def arrive(self, request: Request, attached: Attached | None, key: SessionKey, paused: bool) -> list[Request]:
        """A request has arrived. Returns what may begin now, as `let_go` does; nothing while the engine is paused.

        Args:
            attached: whose it is; None: nobody's, and it waits for a slot alone. key: under which name it is counted.
        """
        lane = self.lanes.get(key)
        if lane is None:
            lane = self.lanes[key] = Lane(key, attached and attached.session)
        order = (attached.arrival if attached is not None else 0, next(self.numbers))
        entry = self.entries[request.request_id] = Entry(request, attached, lane, order)
        lane.line.push(order, entry)
        lane.held += 1
        self.count += 1
        self.places.newest = max(self.places.newest, order[0])
        self._mark(lane)
        released = [] if paused else self._pass_on()
        if entry.line is not None and attached is not None:
            attached.held = time.monotonic()
        return released

    def leave(self, request_id: str) -> None:
        """The request leaves the engine."""
        entry = self.entries.pop(request_id, None)
        if entry is None:
            return
        lane = entry.lane
        if lane.first is entry:
            self._back(lane)
        if entry.line is not None:
            entry.line.remove(entry)
            lane.held -= 1
            self.count -= 1
        else:
            lane.out -= 1
            self.taken -= not lane.out
        if lane.held or lane.out:
            self._mark(lane)
            self._note(lane)
        else:
            del self.lanes[lane.key]
            self.due.pop(lane.key, None)
        if not lane.line.count:
            self.awaited.pop(lane.key, None)

    def learn_first(self) -> list[int]:
        """Adapters of sessions that somebody waits for, for `StepPlan.awaited`."""
        return [session.adapter for session in itertools.islice(self.awaited.values(), AWAITED)]

    def changed(self, session: Session) -> None:
        """A request of the session has been learned, or is not going to be."""
        if (lane := self.lanes.get(session.key)) is not None:
            self._mark(lane)

    def woke(self, session: Session) -> None:
        """The session has come into memory, or is not being changed any more."""
        if (lane := self.lanes.get(session.key)) is not None:
            self._back(lane)

    def let_go(self) -> list[Request]:
        """What may begin now: vLLM's from now on."""
        return self._pass_on() if self.count else []

    def _pass_on(self) -> list[Request]:
        """Out of the lanes into the line, and out of the line."""
        while self.due or self._give_place():  # one at a time: the next one's must not be that of who came before
            due, self.due = list(self.due.values()), {}
            for lane in sorted(due, key=self._is_in_memory):  # those first who need a place: then nobody passes them
                self._look(lane)
        released: list[Request] = []
        while (entry := self.parked.first()) is not None and self._has_room(entry):
            if not self._has_slot(entry.lane):
                return released
            released.append(self._release(entry))
        full = entry is not None
        while (entry := self.line.first()) is not None and self._has_slot(entry.lane):
            full = full or not self._has_room(entry)
            if full and entry.attached is not None and entry.attached.knobs.learn:
                self.line.remove(entry)
                self.parked.push(self._rank(entry), entry)
            else:
                released.append(self._release(entry))
        return released

    def _give_place(self) -> bool:
        """Whether the first in the line for places could leave it: there is a place, or it needs none any more."""
        entry = self.places.first()
        if not isinstance(entry, Entry) or self.tiers.crowded:
            return False
        session = entry.lane.session
        assert session is not None
        ready = self.tiers.ready(session)
        if not ready and self.tiers.homeless(session):
            if not self.tiers.stuck:
                self.tiers.crowded = True
                return False
            self.tiers.broken.append((session, self.tiers.no_room(session)))
        self._back(entry.lane, asleep=not ready)
        return True

    def _back(self, lane: Lane, asleep: bool = False) -> None:
        """Whoever of the lane stands in the line for places is its head again."""
        if (entry := lane.first) is not None:
            self.places.remove(entry)
            lane.line.push(entry.order, entry)
            lane.first = None
            self._note(lane)
        lane.asleep = asleep
        self._mark(lane)

    def _note(self, lane: Lane) -> None:
        """Whether all requests of the session wait behind others may have changed."""
        if lane.session is not None:
            lane.session.yields = lane.first is not None and not lane.out and lane.held == 1 + lane.line.count

    @staticmethod
    def _is_in_memory(lane: Lane) -> bool:
        return lane.session is None or lane.session.life.state is State.IN_MEMORY

    def _mark(self, lane: Lane) -> None:
        if not lane.asleep and lane.line.count:
            self.due[lane.key] = lane

    def _look(self, lane: Lane) -> None:
        """Who may go on from the lane."""
        while (entry := lane.line.first()) is not None:
            if entry.attached is not None and not self._may_pass(entry, entry.attached):
                return
            lane.line.remove(entry)
            self.line.push(self._rank(entry), entry)

    def _may_pass(self, entry: Entry, attached: Attached) -> bool:
        session, lane = attached.session, entry.lane
        if self._is_in_memory(lane):
            first = next(iter(session.open.values()), None) if self.wait else None
            if first is not None and first.arrival < attached.arrival:
                self.awaited.setdefault(lane.key, session)
                return False
            self.awaited.pop(lane.key, None)
            if self.places.passes(entry.order):
                return True
        lane.asleep = True
        if self._is_in_memory(lane) or self.tiers.homeless(session):
            lane.line.remove(entry)
            self.places.push(entry.order, entry)
            lane.first = entry
            self._note(lane)
        return False

    def _rank(self, entry: Entry) -> Order:
        return (entry.request.priority if self.priority else 0, *entry.order)

    def _has_room(self, entry: Entry) -> bool:
        return entry.attached is None or self.room(entry.attached)

    def _has_slot(self, lane: Lane) -> bool:
        return bool(lane.out) or self.taken < self.slots

    def _release(self, entry: Entry) -> Request:
        assert entry.line is not None
        entry.line.remove(entry)
        lane = entry.lane
        self.taken += not lane.out
        lane.out += 1
        lane.held -= 1
        self.count -= 1
        if entry.attached is not None:
            entry.attached.take_adapter()
        return entry.request


def enter(queue: Any, requests: list[Request]) -> None:
    """Put ``requests`` into vLLM's ``queue`` where they would be if they had not been held."""
    if not isinstance(queue, deque):  # by priority, which it sees to itself
        for request in requests:
            queue.add_request(request)
        return
    arrival = lambda request: request.arrival_time  # noqa: E731
    requests.sort(key=arrival)
    younger: deque[Request] = deque()
    while queue and arrival(queue[-1]) > arrival(requests[0]) and queue[-1].status != RequestStatus.PREEMPTED:
        younger.appendleft(queue.pop())
    queue.extend(heapq.merge(requests, younger, key=arrival))


class HoldingScheduler(AsyncScheduler):
    """vLLM's scheduler, in front of whose queue requests of sessions wait. To vLLM they are requests that wait."""

    ttt_holding: Holding

    def _whose(self, request: Request) -> tuple[SessionKey, Attached | None] | None:
        """Where a request that arrives is to wait, as `Holding.arrive` has it; None: it is not held."""
        raise NotImplementedError

    def _enqueue_waiting_request(self, request: Request) -> None:
        whose = None if request.request_id in self.ttt_holding.entries else self._whose(request)
        if whose is None:
            super()._enqueue_waiting_request(request)
            return
        key, attached = whose
        self._enter(self.ttt_holding.arrive(request, attached, key, self.pause_state != PauseState.UNPAUSED))

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self.pause_state == PauseState.UNPAUSED:  # else vLLM begins nothing either
            self._enter(self.ttt_holding.let_go())
        return super().schedule(throttle_prefills)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        super()._update_after_schedule(scheduler_output)
        if not self.scheduler_config.async_scheduling:
            # Then drafts come when they are there (`update_draft_token_ids`); what stands for them elsewhere must not be run.
            for request_id in scheduler_output.num_scheduled_tokens:
                self.requests[request_id].spec_token_ids = []

    def _enter(self, released: list[Request]) -> None:
        if released:
            enter(self.waiting, released)
            self.deferred_waiting.update(r for r in released if self._is_blocked_waiting_status(r.status))

    def get_request_counts(self) -> tuple[int, int]:
        running, waiting = super().get_request_counts()
        return running, waiting + self.ttt_holding.count

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        if (stats := super().make_stats(*args, **kwargs)) is not None:  # they wait for something else than room
            stats.num_waiting_reqs -= self.ttt_holding.count
            stats.num_skipped_waiting_reqs += self.ttt_holding.count
        return stats
