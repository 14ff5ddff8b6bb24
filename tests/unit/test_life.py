"""The state machine of a session: the drawing is the table, and what is not in the table does not happen."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Generator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from test_admin import Engine
from world import World

from vllm_ttt.config import SessionsConfig
from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.guarded import Guarded
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.life.operations import ROOM, Operations
from vllm_ttt.engine.life.states import START, TRANSITIONS, Life, State, TransitionError
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.limits.quotas import Quotas
from vllm_ttt.errors import RequestError
from vllm_ttt.types import ChunkReport, SessionKey

pytestmark = pytest.mark.unit

DOCUMENT = (Path(__file__).parents[2] / "docs" / "architecture.md").read_text()


def section() -> str:
    return DOCUMENT.split("\n## Life of a session\n")[1].split("\n## ")[0]


def test_the_drawing_is_the_table() -> None:
    (drawing,) = re.findall(r"```mermaid\nstateDiagram-v2\n(.*?)```", section(), re.DOTALL)
    arrows = [re.fullmatch(r"    (\S+) --> (\S+?)(?:: (.+))?", line) for line in drawing.splitlines()]
    assert all(arrows), "a line is no arrow"
    drawn = {(arrow[1], arrow[2]): arrow[3] for arrow in arrows if arrow}
    assert len(drawn) == len(arrows)
    table = {(before.name, after.name): why for (before, after), why in TRANSITIONS.items()}
    assert {arrow: why for arrow, why in drawn.items() if "[*]" not in arrow} == table
    assert {after for before, after in drawn if before == "[*]"} == {state.name for state in START}
    assert {before for before, after in drawn if after == "[*]"} == {State.GONE.name}


def test_every_state_and_every_arrow_has_its_sentence() -> None:
    rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in section().splitlines() if line.startswith("| ")
    ]
    states = [row[0] for row in rows if len(row) == 2 and row[0] in State.__members__]
    assert states == list(State.__members__)
    arrows = [(row[0], row[1]) for row in rows if len(row) == 3 and row[1] in State.__members__]
    assert arrows == [("", state.name) for state in START] + [(a.name, b.name) for a, b in TRANSITIONS]
    assert all(row[-1].endswith(".") for row in rows if row[0] in State.__members__ or row[1] in State.__members__)


def test_what_is_not_in_the_table_does_not_happen() -> None:
    for before, after in itertools.product(State, State):
        life = Life()
        life.state = before
        if (before, after) in TRANSITIONS:
            life.move(after)
            assert life.state is after
        else:
            with pytest.raises(TransitionError, match=f"{before.value} cannot be {after.value}"):
                life.move(after)
            assert life.state is before
    with pytest.raises(TransitionError):
        Life(State.IN_MEMORY)


def test_every_state_can_be_reached_and_left() -> None:
    assert {state for state in State if state in START or any(after is state for _, after in TRANSITIONS)} == set(State)
    assert {state for state in State if not any(before is state for before, _ in TRANSITIONS)} == {State.GONE}


def test_a_generation_never_goes_down(tmp_path: Path) -> None:
    """Whatever happens to a session, in memory and beyond a version that goes down."""
    world = World(tmp_path / "state")
    session, seen = world.use("a", 1.0, 2.0), [0]

    def grew() -> None:
        seen.append(session.life.generation)
        assert seen[-1] > seen[-2]

    grew()
    world.wait(world.go_back(session, 1))
    grew()
    world.trainer.learn(session.adapter, 4.0)
    world.step()
    grew()
    world.wait(world.tiers.owner.reset(session, dict))
    grew()
    assert session.version == 0
    world.end()


def test_whoever_holds_requests_is_told_when_they_may_go_on(tmp_path: Path) -> None:
    """When the session has come into memory, and when nothing more is to be done for it, whatever became of that."""
    world, told = World(tmp_path / "state", limit=1), []
    world.use("a", 1.0)
    world.save("a")
    world.use("b", 1.0)
    world.save("b")
    world.tiers.on_ready = lambda session: told.append((session.key.name, world.tiers.ready(session)))
    session = world.ledger.open(SessionKey("-", "a"))
    session.requests.add("r")
    assert world.tiers.homeless(session)
    assert not world.tiers.ready(session)
    assert not world.tiers.homeless(session), "it is on its way"
    world.run(lambda: world.tiers.ready(session))
    assert told == [("a", True)] * 2
    with pytest.raises(RequestError, match="requests in the engine"):
        world.wait(world.go_back(session, 1))
    session.requests.clear()
    world.wait(world.go_back(session, 1))
    assert told[2:] == [("a", True), ("a", False)], "it is on disk"
    world.end()


def wrong(tiers: Tiers, session: Session) -> Generator[Any, Any, None]:
    yield from ()
    tiers.move(session, State.LOADING)


def test_a_wrong_transition_is_one_calls_answer(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    world = World(tmp_path / "state")
    world.tiers.guard = world.tiers.operations.guard = Guarded()
    session = world.use("a", 1.0)
    answer = world.tiers.run(session, wrong(world.tiers, session))
    with pytest.raises(RequestError, match="log says why") as caught:
        answer.result(timeout=0)
    assert caught.value.status == 500
    assert "cannot be loading next" in caplog.text
    assert world.tiers.guard.errors.count == 1
    assert session.life.state is State.IN_MEMORY
    assert world.save("a").version == 1, "the next operation has its turn"
    assert world.value("a") == 1.0
    world.end()


class Queues:
    """Operations of sessions that are only names."""

    def __init__(self) -> None:
        self.settled: list[str] = []
        self.operations = Operations(Guarded(), lambda session: self.settled.append(session.key.name))
        ledger = Ledger(1, 9, Quotas(9), 1)
        self.a, self.b = ledger.open(SessionKey("-", "a")), ledger.open(SessionKey("-", "b"))
        self.trace: list[str] = []

    def steps(self, name: str, *waits: Any, end: Callable[[], Any] = lambda: None) -> Generator[Any, Any, Any]:
        for wait in waits:
            self.trace.append(f"{name} waits")
            try:
                yield wait
            except RequestError as error:
                self.trace.append(f"{name} gets {error}")
        self.trace.append(f"{name} ends")
        return end()


def test_operations_of_a_session_run_in_order_and_those_of_others_beside_them() -> None:
    queues, gate = Queues(), Future()
    first = queues.operations.run(queues.a, queues.steps("1", gate))
    second = queues.operations.run(queues.a, queues.steps("2", end=lambda: "two"))
    assert queues.operations.run(queues.b, queues.steps("b", end=lambda: "b")).result(timeout=0) == "b"
    queues.operations.step()
    assert not first.done()
    assert not second.done()
    assert queues.trace == ["1 waits", "b ends"]
    gate.set_result(None)
    assert not first.done(), "operations go on in a step, whoever resolves what they wait for"
    queues.operations.step()
    assert second.result(timeout=0) == "two"
    assert queues.trace == ["1 waits", "b ends", "1 ends", "2 ends"]
    assert queues.settled == ["b", "a"]
    assert not queues.operations.active


def test_what_waits_for_room_is_asked_again_in_each_step() -> None:
    queues = Queues()
    answer = queues.operations.run(queues.a, queues.steps("1", ROOM, ROOM, end=lambda: 7))
    for _ in range(2):
        assert not answer.done()
        queues.operations.step()
    assert answer.result(timeout=0) == 7


def test_an_error_is_thrown_where_it_was_waited_for_and_the_next_has_its_turn() -> None:
    queues, gate = Queues(), Future()
    queues.operations.run(queues.a, queues.steps("1", gate))
    gate.set_exception(RequestError("full", 507))

    def fail() -> None:
        raise RequestError("no", 409)

    failed = queues.operations.run(queues.a, queues.steps("2", end=fail))
    last = queues.operations.run(queues.a, queues.steps("3", end=lambda: 3))
    queues.operations.step()
    assert queues.trace[1] == "1 gets full"
    with pytest.raises(RequestError, match="no"):
        failed.result(timeout=0)
    assert last.result(timeout=0) == 3


def test_what_is_asked_of_a_session_that_goes_is_answered() -> None:
    queues, gate = Queues(), Future()
    queues.operations.run(queues.a, queues.steps("1", gate, end=lambda: queues.a.life.move(State.GONE)))
    late = queues.operations.run(queues.a, queues.steps("2"))
    gate.set_result(None)
    queues.operations.step()
    with pytest.raises(RequestError, match="removed meanwhile"):
        late.result(timeout=0)
    assert "2 ends" not in queues.trace


def test_without_a_state_dir_memory_is_the_only_place(tmp_path: Path) -> None:
    """Each operation is answered at once, and the session is in memory before and after."""
    ledger, called = Ledger(1, 2, Quotas(2), 1), list[tuple[Any, ...]]()
    tiers = Tiers(ledger, SessionsConfig(), None, lambda *_: None)

    def worker(method: str, *args: int) -> Any:
        called.append((method, *args))
        return {"ttt_copy": 3, "ttt_session": {"versions": [2, 3]}, "ttt_roll_back": None}[method]

    session = ledger.open(SessionKey("-", "a"))
    assert tiers.ready(session)
    session.record(ChunkReport(session.adapter, "r", 16, 1.0, None, None, 16, 3))
    assert tiers.owner.fork(session, SessionKey("-", "b"), worker).result(timeout=0).version == 3
    with pytest.raises(RequestError, match="at most 2 sessions"):
        tiers.owner.fork(session, SessionKey("-", "c"), worker)
    with pytest.raises(RequestError, match="kept are: 2, 3"):
        tiers.owner.go_back(session, 1, worker).result(timeout=0)
    assert tiers.owner.go_back(session, 2, worker).result(timeout=0).version == 2
    assert called == [("ttt_copy", 1, 2), ("ttt_session", 1), ("ttt_session", 1), ("ttt_roll_back", 1, 2)]
    assert tiers.owner.reset(session, dict).result(timeout=0).version == 0
    assert session.life.state is State.IN_MEMORY
    assert [(order.action, order.session) for order in tiers.take_orders()] == [("drop", 1)]
    tiers.owner.remove(session).result(timeout=0)
    assert [s.key.name for s in ledger.sessions.values()] == ["b"]
    assert tiers.placed == 1
    assert not tiers.busy or tiers.orders.leaving
    session = ledger.open(SessionKey("-", "c"))
    assert tiers.ready(session)


def test_who_waits_for_room_lets_the_engine_rest(tmp_path: Path) -> None:
    """While nothing happens that could make room, as in a pause that keeps requests: the pause waits until the engine rests."""
    world = World(tmp_path / "state", limit=1)
    for name in "ab":
        world.use(name, 1.0)
        world.save(name)
    session = world.ledger.open(SessionKey("-", "b"))
    session.requests.add("r")
    world.run(lambda: world.tiers.ready(session))
    engine = Engine(world)
    asked: list[Any] = [admin(engine, *call) for call in (("export", "-", "a"), ("save", "-", "b"), ("freeze", "-", "a"))]
    world.run()
    assert [answer.done() for answer in asked] == [False, True, False], "who does not wait for room is answered"
    world.trainer.learn(session.adapter, 1.0)
    world.saves.next_round = 0.0
    world.run()
    session.requests.clear()
    world.tiers.left(session)
    assert world.tiers.busy, "there may be room now"
    world.run()
    assert all(answer.result()["ok"] for answer in asked)
    world.end()


def test_a_session_that_waits_for_room_holds_up_no_round_of_saves(tmp_path: Path) -> None:
    """It is unsaved, a fork of it waits for a place, and its round is due: that waits too, and keeps nobody awake."""
    world = World(tmp_path / "state", limit=2)
    world.use("a", 1.0)
    session = world.use("b", 1.0)
    session.requests.add("r")
    fork: Any = admin(Engine(world), "fork", "-", "a", "c")
    world.saves.next_round = 0.0
    world.run()
    assert not fork.done()
    assert world.saves.due
    session.requests.clear()
    world.tiers.left(session)
    world.run()
    assert fork.result()["ok"]
    assert not world.saves.due
    world.end()


def test_a_fork_for_which_there_is_no_room_is_answered(tmp_path: Path) -> None:
    """Its source holds the place that what it makes would need; two forks may hold each other's."""
    world = World(tmp_path / "state", limit=2)
    for name in "abxy":
        world.use(name, 1.0)
        world.save(name)
    forks = []
    for name in "ab":
        session = world.ledger.find(SessionKey("-", name))
        assert session is not None
        forks.append(world.tiers.owner.fork(session, SessionKey("-", f"{name}2"), world.worker))
        assert session.life.state is State.LOADING
    world.run(lambda: all(fork.done() for fork in forks))
    outcomes = [fork.exception() for fork in forks]
    assert [error.status for error in outcomes if isinstance(error, RequestError)] == [503]
    assert outcomes.count(None) == 1, "the other has its room then"
    world.run()
    assert world.value("a") == world.value("b") == world.value("b2") == 1.0
    assert world.ledger.peek(SessionKey("-", "a2")) is None
    world.end()
