"""Requests that wait for a session that is not in memory, or is being changed."""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from held import Held, other
from hypothesis import given, settings
from hypothesis import strategies as st
from lockstep import WORK, Lockstep
from test_deep_scheduler import PROMPT
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.hold.holding import Holding
from vllm_ttt.engine.ledger import Open, Session
from vllm_ttt.engine.life.operations import ROOM
from vllm_ttt.engine.life.states import State
from vllm_ttt.types import SAMPLES, SessionKey

pytestmark = pytest.mark.unit


@pytest.fixture
def on_disk(tmp_path: Path) -> Held:
    """An engine that finds the sessions a and b, of version 1, on disk."""
    options: dict[str, Any] = {"sessions": {"resident": 1, "host_gib": 1e-9, "state_dir": str(tmp_path / "state")}}
    engine = Held(**options)
    for name in "ab":
        engine.learn(name, 1)
        engine.run(lambda: not engine.scheduler.has_requests())
        saved = engine.scheduler.ttt_tiers.save(engine.session(name))
        engine.run(saved.done)
    engine.run(lambda: not engine.scheduler.has_requests())
    engine.scheduler.shutdown()
    return Held(**options)


def test_a_session_on_disk_is_waited_for(on_disk: Held) -> None:
    """And who waits for a place in memory gets it when there is one: there is one place."""
    engine = on_disk
    first, second, other_ = engine.send("a", learn=True), engine.send("a", PROMPT[:50]), engine.send("b", other(1))
    assert engine.new() == set()
    (order,) = engine.loads
    assert order.session == engine.session("a").adapter
    assert engine.new() == set()
    engine.load()
    assert engine.begun(1) == [first]
    engine.settle(first, "a")
    assert engine.new() == {second}
    engine.run(lambda: engine.loads)
    assert other_ not in engine.scheduled
    engine.load()
    assert engine.begun(1) == [other_]


def test_who_waits_for_room_that_cannot_come_is_refused(on_disk: Held) -> None:
    """There is one place, and what has it cannot be saved any more: that begins after the other request has come. What is sent
    to it waits behind that, and goes on then."""
    engine = on_disk
    first = engine.send("a", learn=True)
    engine.run(lambda: engine.loads)
    engine.load()
    assert engine.begun(1) == [first]
    engine.learned(first, "a", 1)
    saves = engine.scheduler.ttt_tiers.saves
    assert saves is not None
    saves.failing.add(engine.session("a").key)
    other_, again = engine.send("b", other(1)), engine.send("a", other(2))
    engine.run(lambda: first not in engine.scheduler.requests and not engine.session("a").open)
    assert engine.begun(1) == [again]
    assert other_ not in engine.scheduler.requests
    assert other_ not in engine.scheduled
    assert engine.holding.count == 0


def test_a_session_that_is_being_changed_is_waited_for(on_disk: Held) -> None:
    engine = on_disk
    rpc = lambda method, args=(): [{"tier": "memory", "bytes": 1, "tokens_pending": 0, "norm": {}}]  # noqa: E731
    core = SimpleNamespace(scheduler=engine.scheduler, model_executor=SimpleNamespace(collective_rpc=rpc))
    answer = admin(core, "reset", "-", "a")
    held = engine.send("a", learn=True)
    assert engine.holding.count == 1
    engine.run(answer.done)
    assert engine.begun(1) == [held]
    assert engine.session("a").version == 0


def test_a_fork_is_waited_for(on_disk: Held) -> None:
    engine = on_disk
    engine.scheduler.ttt_ledger.limit = 2

    def rpc(method: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [1 if method == "ttt_copy" else {"tier": "memory", "bytes": 1, "tokens_pending": 0, "norm": {}}]

    core = SimpleNamespace(scheduler=engine.scheduler, model_executor=SimpleNamespace(collective_rpc=rpc))
    answer = admin(core, "fork", "-", "a", "c")
    held = engine.send("c", learn=True)
    assert engine.new() == set()
    engine.load()
    assert engine.begun(1) == [held]
    assert answer.done()
    assert engine.session("c").version == 1


def test_who_waits_for_a_place_is_not_overtaken(on_disk: Held) -> None:
    """Not by what is sent later to the session that has it: that is saved, gives its place up, and comes back in its turn."""
    engine = on_disk
    first = engine.send("a", learn=True, outputs=5)
    engine.run(lambda: engine.loads)
    engine.load()
    assert engine.begun(1) == [first]
    engine.learned(first, "a", 1)
    adapter = engine.session("a").adapter
    second, third, fourth = engine.send("b", other(1)), engine.send("a", other(2)), engine.send("a", other(3), learn=True)
    waiting = engine.scheduler.requests[third]
    engine.run(lambda: engine.loads)
    assert third not in engine.scheduled
    engine.load()
    assert engine.begun(1) == [second]
    engine.run(lambda: engine.loads)
    engine.load()
    assert engine.begun(2) == [third, fourth]
    assert waiting.lora_request is not None
    assert waiting.lora_request.lora_int_id == engine.session("a").adapter != adapter
    assert engine.session("a").version == 2


def test_samples_of_what_has_begun_wait_for_no_place(on_disk: Held) -> None:
    """They came with the first of them. Until all have begun, their session is served as it is."""
    engine = on_disk

    def sample(number: int) -> str:
        params = SamplingParams(max_tokens=20, ignore_eos=True, extra_args={"session_id": "a", "ttt_learn": 0, SAMPLES: 2})
        request = Request(f"{number}_x-1", PROMPT, params, None, block_hasher=engine.hasher, session_id=None)
        request.ttt_named = "x"  # type: ignore[attr-defined]
        engine.scheduler.add_request(request)
        return request.request_id

    first = sample(0)
    engine.run(lambda: engine.loads)
    engine.load()
    assert engine.begun(1) == [first]
    engine.send("b", other(1))
    assert engine.new() == set()
    second = sample(1)
    assert engine.new() == {second}


class Server:
    """Requests of sessions in front of few places in memory. They run until the test ends them, and slots are enough."""

    def __init__(self, folder: Path, limit: int):
        self.world, self.numbers = Lockstep(folder, limit=limit), itertools.count(1)
        self.holding = Holding(self.world.tiers, lambda attached: True, slots=10**6)
        self.world.tiers.on_ready = self.holding.woke
        #: of requests in the engine: their session and number, those that wait and those that run
        self.waiting: dict[str, tuple[Session, int]] = {}
        self.running: dict[str, tuple[Session, int]] = {}
        #: operations, and the newest request when they were asked for
        self.operations: list[tuple[Session, Future, int]] = []
        self.newest = 0

    def send(self, name: str, learn: bool = False, tenant: str = "-") -> str:
        """As the scheduler takes a request in."""
        session, number = self.world.ledger.open(SessionKey(tenant, name), learn), next(self.numbers)
        self.world.tiers.changes(session)
        request = SimpleNamespace(request_id=f"r{number}", priority=0, arrival_time=number)
        attached = SimpleNamespace(session=session, arrival=number, held=None, take_adapter=lambda: None)
        attached.knobs = SimpleNamespace(learn=learn)
        session.requests.add(request.request_id)
        if learn:
            session.open[request.request_id] = Open(number)
        self.waiting[request.request_id], self.newest = (session, number), number
        self._begin(self.holding.arrive(request, attached, session.key, False))  # type: ignore[arg-type]
        return request.request_id

    def end(self, request: str) -> None:
        """It has been answered, and learned; or its client has left."""
        ran = request in self.running
        session, _ = (self.running if ran else self.waiting).pop(request)
        self.holding.leave(request)
        session.requests.discard(request)
        if ran and request in session.open:
            self.world.trainer.learn(session.adapter, 1.0)
            self.world.step()
        session.open.pop(request, None)
        self.holding.changed(session)
        self.world.tiers.left(session)

    def ask(self, name: str) -> Future | None:
        """An operation for which the session must be in memory, if there is one of that name."""
        if (session := self.world.ledger.find(SessionKey("-", name))) is None:
            return None
        answer = self.world.tiers.run(session, self.world.tiers.bring_in(session))
        self.operations.append((session, answer, self.newest))
        return answer

    def step(self) -> None:
        """Of the engine; what is written and read meanwhile has been."""
        self._begin(self.holding.let_go())
        self.world.step()
        for thread in WORK:
            while self.world.let(thread):
                pass

    def _begin(self, requests: list[Any]) -> None:
        for request in requests:
            session, number = self.running[request.request_id] = self.waiting.pop(request.request_id)
            assert session.life.state is State.IN_MEMORY
            for other_, earlier in self.waiting.values():
                needs = other_.life.state in (State.NEW, State.ON_DISK) and not other_.life.queue
                assert number < earlier or not needs, "somebody who needs a place is overtaken"
            for other_, answer, newest in self.operations:
                waits = not answer.done() and other_.life.queue[0].answer is answer and other_.life.queue[0].waits is ROOM
                assert number <= newest or not waits, "an operation is overtaken"

    def close(self) -> None:
        self.world._let_go()
        self.world.crash()


@pytest.mark.parametrize("known", [True, False], ids=["saved", "names"])
def test_one_key_does_not_keep_others_out_of_memory(tmp_path: Path, known: bool) -> None:
    """It keeps two requests open on each of as many names as there are places, and has each that ends followed by another."""
    server = Server(tmp_path / "state", limit=3)
    for name in ("b", "a0", "a1", "a2") if known else "b":
        server.world.use(name, 1.0)
        server.world.save(name)
    for name in ("a0", "a1", "a2") * 2:
        server.send(name)
    for _ in range(5):
        server.step()
    assert len(server.running) == 6
    ended, answer = 0, server.ask("b") if known else None
    mine = server.send("b", learn=True)
    while mine not in server.running:
        session, _ = server.running[oldest := next(iter(server.running))]
        server.end(oldest)
        server.send(session.key.name)
        ended += 1
        assert ended <= 6, "what was ahead of it"
        for _ in range(5):
            server.step()
    assert answer is None or answer.done()
    assert not server.world.refused
    server.close()


def test_an_operation_waits_for_a_place_in_its_turn(tmp_path: Path) -> None:
    server = Server(tmp_path / "state", limit=1)
    for name in "ab":
        server.world.use(name, 1.0)
        server.world.save(name)
    first, second = server.send("b"), server.send("c")
    server.end(first)
    answer = server.ask("a")
    assert answer is not None
    last = server.send("c")
    for _ in range(5):
        server.step()
    assert [*server.running] == [second]
    server.end(second)
    for _ in range(5):
        server.step()
    assert answer.done()
    assert [*server.running] == [last]
    server.close()


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_whoever_has_come_gets_a_place_after_what_came_before(data: st.DataObject) -> None:
    """Whatever arrives, however long it runs: `Server` looks whether anybody is overtaken. If nobody runs, somebody begins."""
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        server = Server(Path(folder) / "state", data.draw(st.integers(1, 3), "places"))
        stack.callback(server.close)
        names, acts = st.sampled_from("abcde"), st.sampled_from(["send", "send", "learn", "end", "end", "ask", "step", "step"])
        for act in data.draw(st.lists(acts, max_size=60), "acts"):
            if act in ("send", "learn"):
                server.send(data.draw(names), act == "learn")
            elif act == "ask":
                server.ask(data.draw(names))
            elif act == "step":
                server.step()
            elif here := [*server.running, *server.waiting]:
                server.end(data.draw(st.sampled_from(here)))
        while server.running or server.waiting:
            while server.running:
                server.end(next(iter(server.running)))
            for _ in range(30):
                if not server.running:
                    server.step()
            assert server.running or not server.waiting, "all is idle, and somebody waits"
        for _ in range(30):
            server.step()
        assert all(answer.done() for _, answer, _ in server.operations)
        assert not server.world.refused
        assert not any(session.yields for session in server.world.ledger.sessions.values())
        assert (server.holding.count, server.holding.places.count, server.holding.taken) == (0, 0, 0)
