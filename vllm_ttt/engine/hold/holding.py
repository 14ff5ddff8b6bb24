"""Requests of sessions that may not begin yet. They wait here, outside vLLM's queue, and cost nobody anything.

First each waits in the *lane* of its session: for the session to be in memory, and for what was sent to it earlier to be
learned. The head of a lane is looked at when something about its session has changed, the others never. Then it stands in one
*line* with all others, for a slot, and for room in the backlog where it is to be learned. Of the line, too, the head alone is
looked at: nobody is overtaken. What is let go is vLLM's, and its session keeps a slot until the last such request has left.
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

from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.requests import Attached
from vllm_ttt.errors import RequestError
from vllm_ttt.types import SessionKey

#: Of so many sessions the worker is told that somebody waits for what they learn: more than it learns in one step.
AWAITED = 64


class Line:
    """Requests in some order. One that leaves before its turn is passed over when that comes."""

    def __init__(self) -> None:
        self.heap: list[tuple[tuple[int, ...], Entry]] = []
        self.count = 0

    def push(self, order: tuple[int, ...], entry: Entry) -> None:
        heapq.heappush(self.heap, (order, entry))
        entry.line = self
        self.count += 1

    def first(self) -> Entry | None:
        while self.heap and self.heap[0][1].line is not self:
            heapq.heappop(self.heap)
        return self.heap[0][1] if self.heap else None

    def remove(self, entry: Entry) -> None:
        entry.line = None
        self.count -= 1
        if len(self.heap) > 2 * self.count + 16:
            self.heap = [(order, other) for order, other in self.heap if other.line is self]
            heapq.heapify(self.heap)


@dataclass(slots=True, eq=False)
class Lane:
    """The requests of one session that are in the engine."""

    key: SessionKey
    line: Line = field(default_factory=Line)
    #: requests that wait, in the lane or in the line behind it
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
    order: tuple[int, ...]
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
        self.entries: dict[str, Entry] = {}
        self.lanes: dict[SessionKey, Lane] = {}
        #: those who have passed their lane; and of those, who has a slot and lacks room in the backlog
        self.line, self.parked = Line(), Line()
        #: lanes whose session has changed
        self.due: dict[SessionKey, Lane] = {}
        #: sessions that wait for a place in memory
        self.homeless: dict[SessionKey, Session] = {}
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
            lane = self.lanes[key] = Lane(key)
        order = (attached.arrival if attached is not None else 0, next(self.numbers))
        entry = self.entries[request.request_id] = Entry(request, attached, lane, order)
        lane.line.push(order, entry)
        lane.held += 1
        self.count += 1
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
        if entry.line is not None:
            entry.line.remove(entry)
            lane.held -= 1
            self.count -= 1
        else:
            lane.out -= 1
            self.taken -= not lane.out
        if lane.held or lane.out:
            self._mark(lane)
        else:
            del self.lanes[lane.key]
            self.due.pop(lane.key, None)
            self.homeless.pop(lane.key, None)
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
            lane.asleep = False
            self.homeless.pop(lane.key, None)
            self._mark(lane)

    def let_go(self) -> list[Request]:
        """What may begin now: vLLM's from now on."""
        if not self.count:
            return []
        self._bring_in()
        return self._pass_on()

    def _pass_on(self) -> list[Request]:
        """Out of the lanes into the line, and out of the line."""
        while self.due:
            self._look(self.due.popitem()[1])
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

    def _bring_in(self) -> None:
        """Ask for a place in memory for whoever lacks one; who has waited longest first."""
        while self.homeless:
            session = next(iter(self.homeless.values()))
            ready = self.tiers.ready(session)
            if not ready and self.tiers.homeless(session):
                if not self.tiers.stuck:
                    return
                self.tiers.broken.append((session, self.tiers.no_room(session)))
            self.homeless.pop(session.key, None)
            if ready:
                self.woke(session)

    def _mark(self, lane: Lane) -> None:
        if not lane.asleep and lane.line.count:
            self.due[lane.key] = lane

    def _look(self, lane: Lane) -> None:
        """Who may go on from the lane."""
        while (entry := lane.line.first()) is not None:
            if entry.attached is not None and not self._may_pass(entry.attached, lane):
                return
            lane.line.remove(entry)
            self.line.push(self._rank(entry), entry)

    def _may_pass(self, attached: Attached, lane: Lane) -> bool:
        session = attached.session
        if not self.tiers.ready(session):
            lane.asleep = True
            if self.tiers.homeless(session):
                self.homeless[session.key] = session
            return False
        first = next(iter(session.open.values()), None) if self.wait else None
        if first is None or first.arrival >= attached.arrival:
            self.awaited.pop(lane.key, None)
            return True
        self.awaited.setdefault(lane.key, session)
        return False

    def _rank(self, entry: Entry) -> tuple[int, ...]:
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
