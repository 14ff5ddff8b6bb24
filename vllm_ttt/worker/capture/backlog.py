"""Captured tokens on their way to the micro-step.

A chunk is a page of four static tensors. Rows of a batch are copied into the open page of their request; a page that is
full, or whose prompt or answer has ended, joins its session's queue, in the order of arrival.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.chunk import Chunk, Reading
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.clock import to_device


@dataclass(slots=True)
class Copy:
    """Row indices for one gather: rows ``source`` of the capture buffers go to rows ``target`` of the pages."""

    source: list[Tensor] = field(default_factory=list)
    target: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)
    next_tokens: list[Tensor] = field(default_factory=list)


class Backlog:
    """Pages, running requests and queues. Shapes: h [P, C, D], a [P, C, Q], x and t [P, C] int64; P pages of C rows.

    ``x`` are the tokens of the rows, and ``t`` those that follow. Where the step begins at the embedding, D and Q are 0.
    """

    def __init__(self, pages: int, chunk: int, min_chunk: int, h_ND: Tensor, a_NQ: Tensor, vocabulary: int = 2**31):
        """Allocate ``pages`` pages of ``chunk`` rows, like the rows of the capture buffers.

        Args:
            vocabulary: tokens that the model can predict. What stands for an image may be none of them; it is never learned.
        """
        self.last_token = vocabulary - 1
        self.h_PCD = h_ND.new_zeros(pages, chunk, h_ND.shape[1])
        self.a_PCQ = a_NQ.new_zeros(pages, chunk, a_NQ.shape[1])
        self.x_PC = torch.zeros(pages, chunk, dtype=torch.int64, device=h_ND.device)
        self.t_PC = torch.zeros_like(self.x_PC)
        self.chunk, self.min_chunk = chunk, min_chunk
        self.free = list(range(pages - 1, -1, -1))
        #: pages given back since the last gather: the copies of that gather may still be queued to them
        self.returned: list[int] = []
        self.readings: dict[str, Reading] = {}
        self.queues: OrderedDict[int, deque[Chunk]] = OrderedDict()
        #: chunks too short to be learned, to be reported
        self.short: list[Chunk] = []
        #: chunks that repeat themselves, likewise
        self.repetitive: list[Chunk] = []
        #: chunks of which too little is left to be learned, likewise
        self.filtered: list[Chunk] = []
        #: pairs of requests that ended before they could be captured again, likewise
        self.lost: list[Chunk] = []
        #: what had not been read of prompts whose request has ended, likewise
        self.unread: list[Chunk] = []
        #: learning requests until all of them has been learned; they may outlive their reading
        self.closing: dict[str, Reading] = {}

    def start(self, request: str, plan: RequestPlan) -> None:
        self.readings[request] = Reading(plan, plan.start)

    def finish(self, request: str, pairs: int | None = None) -> None:
        """The request has left the engine: close its last chunk. Of a prompt that was not read to its end the open chunk is not
        learned, as what comes after it.

        Args:
            pairs: how many pairs the request has; what was captured beyond (an iteration that ran ahead, accepted drafts after
                the last token) is not learned.
        """
        reading = self.readings.pop(request, None)
        if reading is None:
            return
        if pairs is not None:
            self._cut(reading, request, pairs)
        if reading.plan.learn and not reading.closed:
            first = reading.next if reading.open is None else reading.open.first
            seen = reading.seen if pairs is None else min(reading.seen, pairs)
            if reading.next < seen:
                self.lost.append(Chunk(reading.plan.session, request, page=-1, first=first, rows=seen - first))
                first = seen
            if (rest := reading.plan.prompt - 1 - first) > 0:
                self.unread.append(Chunk(reading.plan.session, request, page=-1, first=first, rows=rest))
        if reading.open is not None:
            if reading.prompt_read:
                self._close(reading)
            else:
                self._release(reading.open)
                reading.open = None
        if not reading.closed:
            self._end(request, reading)

    def preempt(self, request: str) -> None:
        """vLLM has taken the request's blocks: what of it waits to be learned has no past any more.

        Where the request runs, it will be computed again, and captured again from the first pair that was not learned.
        """
        reading = self.readings.get(request) or self.closing.get(request)
        if reading is None or not reading.plan.learn:
            return
        lost = [chunk for chunk in self.queues.get(reading.plan.session, ()) if chunk.request == request]
        for chunk in lost:
            self.queues[reading.plan.session].remove(chunk)
            reading.unlearned -= 1
        if not self.queues.get(reading.plan.session, True):
            del self.queues[reading.plan.session]
        if reading.open is not None:
            lost.append(reading.open)
            reading.open = None
        for chunk in lost:
            self._release(chunk)
        if request not in self.readings:
            self.lost += lost
            return
        reading.blocks = []
        reading.begun &= not reading.prompt_read  # what has been read in part is read again under the same delta
        if lost:
            reading.seen, reading.next = max(reading.seen, reading.next), lost[0].first
            reading.prompt_read = reading.next >= reading.plan.prompt
            reading.closed = False

    def resume(self, request: str, pairs: int) -> None:
        """A request that was preempted runs again and has so many pairs: what vLLM had sampled beyond them, and thrown away, is
        sampled anew."""
        if (reading := self.readings.get(request)) is None or reading.next <= pairs:
            return
        self._cut(reading, request, pairs)
        if reading.open is not None and not reading.open.rows:
            self._release(reading.open)
            reading.open = None
        reading.next = pairs

    def note_blocks(self, request: str, blocks: Sequence[int], anew: bool) -> None:
        """vLLM has given the request further blocks, or with ``anew`` these alone."""
        if (reading := self.readings.get(request)) is None:
            return
        if anew:
            reading.blocks = []  # chunks that wait keep the list that they know
        reading.blocks += blocks

    def take(self, view: list[Rows], h_ND: Tensor, a_NQ: Tensor) -> None:
        """Copy the rows that are to be learned into their pages, and close the chunks that are complete.

        A page is a target of one chunk alone in each call: one that is given back here is handed out from the next call on.
        """
        self.free += self.returned
        self.returned.clear()
        copy = Copy()
        for rows in view:
            reading = self.readings.get(rows.request)
            if reading is not None and reading.goes_on:
                self._assign(rows, reading, copy)
        if not copy.source:
            return
        device = h_ND.device
        source, target = to_device(torch.cat(copy.source), device), to_device(torch.cat(copy.target), device)
        self.h_PCD.flatten(0, 1).index_copy_(0, target, h_ND.index_select(0, source))
        self.a_PCQ.flatten(0, 1).index_copy_(0, target, a_NQ.index_select(0, source))
        self.t_PC.flatten().index_copy_(0, target, torch.cat(copy.next_tokens).clamp_(max=self.last_token))
        if copy.tokens:
            self.x_PC.flatten().index_copy_(0, target, torch.cat(copy.tokens))

    @property
    def room(self) -> int:
        """Pages that the next gather can hand out."""
        return len(self.free) + len(self.returned)

    def pages_needed(self, view: list[Rows]) -> int:
        """Pages that `take` will hand out for these rows."""
        return sum(self._pages(rows) for rows in view)

    def lacking(self, view: list[Rows]) -> list[str]:
        """Requests of the batch that there is no room for, given those before them."""
        lacking, room = [], self.room
        for rows in view:
            needed = self._pages(rows)
            if needed > room:
                lacking.append(rows.request)
            else:
                room -= needed
        return lacking

    def waits(self, requests: Sequence[str]) -> bool:
        """Whether something of the requests, which have left the engine, has not been learned."""
        return any((r := self.closing.get(request)) is not None and r.unlearned for request in requests)

    def heads(self) -> list[Chunk]:
        """The next chunk of each session that has one, longest-waiting session first."""
        return [queue[0] for queue in self.queues.values()]

    def wanted(self) -> dict[str, Reading]:
        """Running requests of which rows are still to be captured, or whose prompt is still being read."""
        return {name: reading for name, reading in self.readings.items() if reading.goes_on}

    def advance(self, chunk: Chunk) -> None:
        """The chunk's step is under way, or it is given up: free its page; its session goes to the end of the line."""
        queue = self.queues[chunk.session]
        assert queue[0] is chunk
        queue.popleft()
        if queue:
            self.queues.move_to_end(chunk.session)
        else:
            del self.queues[chunk.session]
        self._release(chunk)

    def settle(self, chunk: Chunk) -> None:
        """The outcome of the chunk's step is known."""
        if (reading := self.closing.get(chunk.request)) is not None:
            reading.unlearned -= 1

    def drop_session(self, session: int) -> list[Chunk]:
        """Forget everything that waits for the session, and learn no more of its running requests.

        Returns:
            what is lost: queued and open chunks, and of each prompt the rest that would have been captured.
        """
        lost = list(self.queues.pop(session, ()))
        for chunk in lost:
            self.settle(chunk)
            self._release(chunk)
        for request, reading in self.readings.items():
            if reading.plan.session != session or reading.closed:
                continue
            if reading.open is not None:
                lost.append(reading.open)
                self._release(reading.open)
                reading.open = None
            rest = reading.plan.prompt - 1 - reading.next
            if reading.plan.learn and rest > 0:
                lost.append(Chunk(session, request, page=-1, first=reading.next, rows=rest))
            self._end(request, reading)
        return lost

    def reading_sessions(self) -> set[int]:
        """Sessions that have a prompt which has been read in part: their slot must not change now, but for interleaving."""
        started = (r for r in self.readings.values() if r.begun and not r.prompt_read)
        return {r.plan.session for r in started if not r.plan.interleave}

    def begin(self, view: list[Rows]) -> None:
        """These rows have been read, and will be taken: until then their sessions are among `reading_sessions`, too."""
        for rows in view:
            self.readings[rows.request].begun = True

    def released(self) -> list[str]:
        """Requests that have left the engine, and nothing of which waits to be learned: nobody reads their blocks any more."""
        gone = [name for name, r in self.closing.items() if name not in self.readings and not r.unlearned and not r.released]
        for name in gone:
            self.closing[name].released = True
        return gone

    def settled(self) -> list[tuple[str, int]]:
        """(request, session) of requests of which all has been learned. They stay until `forget`."""
        return [(name, r.plan.session) for name, r in self.closing.items() if r.closed and not r.unlearned]

    def forget(self, request: str) -> None:
        del self.closing[request]

    def rows_of(self, chunks: Sequence[Chunk]) -> Tensor:
        """[S, C] int64: numbers of the chunks' rows in the flattened pages.

        One that has fewer than the longest is filled up with its own first row: what is not finite in one session never meets
        another.
        """
        flat = torch.zeros(len(chunks), max(chunk.rows for chunk in chunks), dtype=torch.int64)
        for s, chunk in enumerate(chunks):
            flat[s] = chunk.page * self.chunk
            flat[s, : chunk.rows] += torch.arange(chunk.rows)
        return flat

    @property
    def pending(self) -> int:
        """Captured tokens that wait for their step."""
        queued = sum(c.rows for q in self.queues.values() for c in q)
        return queued + sum(r.open.rows for r in self.readings.values() if r.open)

    @property
    def queued(self) -> int:
        """Pages of chunks that wait for their step."""
        return sum(map(len, self.queues.values()))

    def pending_of(self, session: int) -> int:
        """Captured tokens of one session that wait for their step."""
        queued = sum(c.rows for c in self.queues.get(session, ()))
        return queued + sum(r.open.rows for r in self.readings.values() if r.open and r.plan.session == session)

    def _assign(self, rows: Rows, reading: Reading, copy: Copy) -> None:
        """Spread a request's rows over its pages."""
        plan, count = reading.plan, len(rows.next_tokens)
        last_of_prompt = plan.prompt - 1
        position = max(rows.position, reading.next)
        end = rows.position + count
        while position < end:
            in_prompt = position < last_of_prompt
            part_end = min(end, last_of_prompt) if in_prompt else end
            if plan.learn and not reading.closed and (in_prompt or plan.learn_output):
                if reading.open is not None and reading.open.rows == self.chunk:
                    self._close(reading)
                if reading.open is None:
                    reading.open = Chunk(plan.session, rows.request, self.free.pop(), first=position, blocks=reading.blocks)
                    reading.open.before = rows.context(position, plan.filtered) if plan.cache else None
                chunk = reading.open
                part_end = min(part_end, position + self.chunk - chunk.rows)
                self._copy_rows(rows, position, part_end, chunk, copy)
                if in_prompt and (chunk.rows == self.chunk or part_end == last_of_prompt):
                    self._close(reading)
            position = part_end
        reading.next = max(reading.next, end)
        reading.begun = True
        if not reading.prompt_read and reading.next >= plan.prompt:  # its last row has the first token of the answer
            reading.prompt_read = True
            if not reading.closed and not (plan.learn and plan.learn_output):
                self._end(rows.request, reading)

    def _pages(self, rows: Rows) -> int:
        """New pages for a request's rows: its prompt and its answer fill pages of their own."""
        reading = self.readings.get(rows.request)
        if reading is None or reading.closed or not reading.plan.learn:
            return 0
        first, end = max(rows.position, reading.next), rows.position + len(rows.next_tokens)
        last_of_prompt, pages = reading.plan.prompt - 1, 0
        filled = reading.open.rows if reading.open is not None else 0
        for start, stop in ((first, min(end, last_of_prompt)), (max(first, last_of_prompt), end)):
            if stop <= start or (start >= last_of_prompt and not reading.plan.learn_output):
                continue
            if start == last_of_prompt:
                filled = 0
            pages += -(-(filled + stop - start) // self.chunk) - (filled > 0)
            filled = 0
        return pages

    def _copy_rows(self, rows: Rows, position: int, end: int, chunk: Chunk, copy: Copy) -> None:
        offset, n = position - rows.position, end - position
        start = chunk.page * self.chunk + chunk.rows
        copy.source.append(torch.arange(rows.first + offset, rows.first + offset + n))
        copy.target.append(torch.arange(start, start + n))
        copy.next_tokens.append(rows.next_tokens[offset : offset + n])
        if rows.tokens is not None:
            copy.tokens.append(rows.tokens[offset : offset + n])
        chunk.rows += n

    def _close(self, reading: Reading) -> None:
        chunk, reading.open = reading.open, None
        assert chunk is not None
        short, repeats = chunk.rows < self.min_chunk, _repeats(chunk, reading.plan)
        inside = ((max(a, chunk.first) - chunk.first, min(b, chunk.end) - chunk.first) for a, b in reading.plan.filtered)
        chunk.left_out = [(a, b) for a, b in inside if a < b]
        if short or repeats or chunk.rows - chunk.out < self.min_chunk:
            if chunk.end > max(chunk.first, reading.known):  # else it was said before the request was preempted
                (self.short if short else self.repetitive if repeats else self.filtered).append(chunk)
                reading.known = chunk.end
            self._release(chunk)
            return
        self.queues.setdefault(chunk.session, deque()).append(chunk)
        reading.unlearned += 1
        self.closing.setdefault(chunk.request, reading)

    def _cut(self, reading: Reading, request: str, pairs: int) -> None:
        """What waits of the request ends with its last pair. Where one step brought several rows, one beyond the end has closed
        the chunk before it."""
        if reading.open is not None:
            reading.open.rows -= max(0, min(reading.next - pairs, reading.open.rows))
        queue = self.queues.get(reading.plan.session, deque())
        for chunk in [chunk for chunk in queue if chunk.request == request and chunk.end > pairs]:
            chunk.rows = max(0, pairs - chunk.first)
            if chunk.rows >= self.min_chunk:
                continue
            queue.remove(chunk)
            reading.unlearned -= 1
            if chunk.rows:
                self.short.append(chunk)
            self._release(chunk)
        if not queue:
            self.queues.pop(reading.plan.session, None)

    def _end(self, request: str, reading: Reading) -> None:
        """Nothing more of the request will be captured."""
        reading.closed = True
        if reading.plan.learn:
            self.closing.setdefault(request, reading)

    def _release(self, chunk: Chunk) -> None:
        self.returned.append(chunk.page)


def _repeats(chunk: Chunk, plan: RequestPlan) -> bool:
    """Whether most of the chunk is in a range that repeats itself."""
    inside = sum(max(0, min(chunk.end, end) - max(chunk.first, first)) for first, end in plan.repetitive)
    return 2 * inside > chunk.rows
