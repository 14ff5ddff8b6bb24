"""Lives of sessions with all that may befall them, in any order: what was promised holds, whenever it is killed.

Promised is: what was acknowledged is there after a kill; what was deleted does not come back; what is refused has not happened;
no session is ever at a version that it never had; whoever asks is answered; and when nothing fails any more, it comes to rest.
"""

from __future__ import annotations

import contextlib
import itertools
import tempfile
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from lockstep import MOMENTS, WORK, Lockstep
from test_admin import Engine
from truth import FRESH, Chain, Frozen, Truth, kind

from vllm_ttt.config import TTTConfig
from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.life.states import State
from vllm_ttt.engine.limits.trust import Trust
from vllm_ttt.errors import RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey, Trial

pytestmark = pytest.mark.unit

NAMES = st.sampled_from("abc")


class Lives(RuleBasedStateMachine):
    @initialize(limit=st.integers(1, 2), keep=st.integers(1, 3))
    def begin(self, limit: int, keep: int) -> None:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.options = {"limit": limit, "keep_versions": keep}
        self.truths = {name: Truth() for name in "abc"}
        self.numbers = itertools.count(1)
        self.answers: list[Future] = []
        #: what was wrong with an answer
        self.wrong: list[Exception] = []
        self.start(Path(self.folder.name) / "s")
        for name in "ab":
            self.talk(name, chunks=2, save=name == "a")

    def start(self, folder: Path) -> None:
        self.world = Lockstep(folder, **self.options)
        self.engine = Engine(self.world)
        self.trust = Trust(TTTConfig())
        #: requests in the engine: name -> its session, and whether it has started
        self.requests: dict[str, tuple[Session, bool]] = {}
        self.trials: list[Trial] = []
        #: of each session, as it was seen last
        self.generations: dict[int, tuple[Session, int]] = {}
        self.world.give_up = self.world.tiers.give_up = self.give_up  # type: ignore[method-assign]
        worker = self.world.worker

        def copies(method: str, *args: Any) -> Any:
            answer = worker(method, *args)
            if method == "ttt_copy":
                self.copied(*(self.world.ledger.by_adapter[adapter] for adapter in args), version=answer)
            return answer

        self.world.worker = copies  # type: ignore[method-assign]

    def give_up(self, session: Session, error: RequestError) -> None:
        session.requests.clear()
        self.requests.pop(session.key.name, None)

    def copied(self, source: Session, target: Session, version: int) -> None:
        """Called at the moment at which the worker has made a copy."""
        if version == source.version:
            truth = self.truths[source.key.name]
            truth.asked.remove(("fork", target.key.name))
            self.truths[target.key.name].copied = [(truth.chain, truth.frozen)]

    def session(self, name: str) -> Session | None:
        return self.world.ledger.sessions.get(SessionKey("-", name))

    # What clients do.

    @rule(name=NAMES)
    def send(self, name: str) -> None:
        if name in self.requests:
            return
        tiers, truth, session, refused = self.world.tiers, self.truths[name], None, 0
        try:
            session = self.world.ledger.open(SessionKey("-", name))
        except RequestError as error:
            refused = error.status
        assert refused in (0, 429)
        if session is None:
            return
        if truth.chain is None and not self.forking(name):
            truth.chain = FRESH
            truth.found.add(FRESH)
        if not tiers.ready(session) and tiers.stuck:
            tiers.left(session)
            return
        tiers.changes(session)
        session.requests.add("r")
        self.requests[name] = session, False

    @precondition(lambda self: any(started for _, started in self.requests.values()))
    @rule(data=st.data())
    def learn(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(n for n, (_, started) in self.requests.items() if started)))
        session, _ = self.requests[name]
        if not any(trial.session == session.adapter for trial in self.trials):
            self.learn_of(name, session)

    def learn_of(self, name: str, session: Session) -> None:
        value = float(next(self.numbers))
        self.world.trainer.learn(session.adapter, value)
        self.truths[name].learn(value)
        self.step()

    @rule(name=NAMES, chunks=st.integers(1, 3), save=st.booleans())
    def talk(self, name: str, chunks: int, save: bool) -> None:
        """A whole request, if nothing is in its way; its client may have the session saved."""
        self.send(name)
        for _ in range(4):
            self.step()
            for thread in ("reader", "writer", "store"):
                self.world.let(thread)
        for _ in range(chunks):
            session, started = self.requests.get(name, (None, False))
            if session is None or not started or any(trial.session == session.adapter for trial in self.trials):
                return
            self.learn_of(name, session)
        self.leave(name)
        if save:
            self.ask(name, "save")

    @rule(name=NAMES)
    def leave(self, name: str) -> None:
        if name in self.requests:
            session, _ = self.requests.pop(name)
            session.requests.clear()
            self.world.tiers.left(session)

    @rule(name=NAMES)
    def save(self, name: str) -> None:
        self.ask(name, "save")

    @rule(name=NAMES, op=st.sampled_from(("delete", "reset", "export", "freeze", "unfreeze")))
    def change(self, name: str, op: str) -> None:
        self.ask(name, op)

    @rule(name=NAMES, back=st.integers(0, 3))
    def roll_back(self, name: str, back: int) -> None:
        self.ask(name, "rollback", max(0, len(self.truths[name].chain or ()) - 1 - back))

    @rule(name=NAMES, to=NAMES)
    def fork(self, name: str, to: str) -> None:
        if to != name:
            self.ask(name, "fork", to)

    def ask(self, name: str, op: str, argument: Any = None) -> None:
        truth = self.truths[name]
        if truth.chain is None and not self.forking(name):
            return
        truth.asked.append((op, argument))
        becomes = op == "fork" and self.truths[argument].chain is None and not self.forking(argument)
        if becomes:
            self.truths[argument].asked.append(("become", name))
        stops = truth.stops

        def answered(answer: dict[str, Any]) -> None:
            try:
                self.answered(name, op, argument, answer, becomes, stops)
            except Exception as error:  # a Future swallows what its callbacks raise
                self.wrong.append(error)

        answer = admin(self.engine, op, "-", name, argument)
        if isinstance(answer, Future):
            self.answers.append(answer)
            answer.add_done_callback(lambda done: answered(done.result()))
        else:
            answered(answer)

    def forking(self, name: str) -> bool:
        return any(op == "become" for op, _ in self.truths[name].asked)

    def answered(self, name: str, op: str, argument: Any, answer: dict[str, Any], becomes: bool, stops: int) -> None:
        """Called at the moment at which it is answered.

        Args:
            becomes: a fork made the session that it asked for.
            stops: how often the guard had stopped the session when it was asked.
        """
        truth = self.truths[name]
        if (op, argument) in truth.asked:
            truth.asked.remove((op, argument))
        if becomes:
            self.forked(self.truths[argument], name, argument, answer)
        if not answer["ok"]:
            assert answer["status"] in (404, 409, 429, 503, 507), answer
        elif op != "fork":
            truth.done(op, argument, answer["result"], stops, named=name in self.requests)
        if not any(op == "rollback" for op, _ in truth.asked):
            truth.before = None

    def forked(self, target: Truth, name: str, to: str, answer: dict[str, Any]) -> None:
        target.asked.remove(("become", name))
        if answer["ok"]:
            chain, frozen = target.copied[-1]
            assert answer["result"]["version"] == len(chain or ()) - 1
            target.promise(chain)
            target.promise_frozen(frozen)
        else:
            target.chain = FRESH if self.session(to) is not None else None
            target.found = {None, target.chain}
        target.copied = []

    # What the engine does.

    @rule()
    def step(self) -> None:
        self.world.step()
        trials, self.trials = self.trials, []
        for trial in trials:
            self.tried(trial)
        for name, (session, _) in list(self.requests.items()):
            if self.world.tiers.ready(session):
                self.requests[name] = session, True

    @rule(thread=st.sampled_from(sorted(WORK)))
    def work(self, thread: str) -> None:
        self.world.let(thread)

    @rule(turns=st.integers(1, 6))
    def flow(self, turns: int) -> None:
        """All threads get on."""
        for _ in range(turns):
            for thread in WORK:
                self.world.let(thread)
            self.step()

    @rule()
    def pause(self) -> None:
        """Requests stay where they are: the engine comes to rest, and who is not answered waits for a place that they hold."""
        while self.trials:
            self.step()
        self.world.run()
        if not all(answer.done() for answer in self.answers):
            assert any(s.requests for s in self.world.ledger.sessions.values() if s.life.placed)
            assert self.world.tiers.placed == self.world.ledger.limit

    @rule(name=NAMES, late=st.booleans(), saving=st.booleans(), data=st.data())
    def guard_returns(self, name: str, late: bool, saving: bool, data: st.DataObject) -> None:
        """The worker has taken a session back; the engine hears of it now, or with the next step. A save may be under way."""
        if saving:
            self.talk(name, chunks=2, save=True)
            self.step()
        session = self.session(name)
        if session is None or not session.life.in_memory or any(trial.session == session.adapter for trial in self.trials):
            return
        trainer = self.world.trainer
        kept = [v for v in trainer.versions.of(session.adapter) if v < session.version]
        if not kept or trainer.deltas.session(session.adapter).version != session.version:
            return
        trial = Trial(session.adapter, session.version, 1.0, data.draw(st.sampled_from(kept)))
        assert trial.back_to is not None
        trainer.roll_back(session.adapter, trial.back_to)
        if late:
            self.trials.append(trial)
        else:
            self.tried(trial)

    def tried(self, trial: Trial) -> None:
        """As the scheduler does."""
        session = self.world.ledger.by_adapter.get(trial.session)
        if session is None:
            return
        self.trust.tried(session, trial)
        self.truths[session.key.name].stop(session.version)
        self.world.tiers.changes(session)
        self.world.tiers.save(session)

    @rule()
    def round(self) -> None:
        self.world.saves.next_round = 0.0

    # What befalls it.

    @rule(what=st.sampled_from(("full", "files_full", "unreadable")), on=st.booleans())
    def fail(self, what: str, on: bool) -> None:
        setattr(self.world.disk, what, on)

    @rule(moment=st.sampled_from(MOMENTS))
    def kill(self, moment: str) -> None:
        expected = {name: truth.after_a_kill() for name, truth in self.truths.items()}
        image = self.world.kill(moment)
        self.answers.clear()
        self.truths = {name: Truth() for name in self.truths}
        self.open_again(image, expected)

    @rule()
    def end(self) -> None:
        """As SIGTERM does, on a disk that is whole: everything is there afterwards."""
        self.rest()
        self.world.end()
        expected = {name: ({truth.chain}, {truth.frozen}) for name, truth in self.truths.items()}
        for chains, frozen_ in expected.values():
            chains |= {None} if FRESH in chains and None in frozen_ else set()  # of a mere name there is no record
        self.open_again(self.world.store.folder.root, expected)

    @rule()
    def rest(self) -> None:
        """Nothing fails any more, and no client asks for more."""
        self.world.disk.full = self.world.disk.files_full = self.world.disk.unreadable = False
        while self.trials:
            self.step()
        for name in list(self.requests):
            self.leave(name)
        self.round()
        self.world.run()
        assert all(answer.done() for answer in self.answers), "somebody is not answered"
        if self.wrong:
            raise self.wrong[0]
        assert not any(truth.asked for truth in self.truths.values())
        self.answers.clear()
        for name, truth in self.truths.items():
            found = self.world.ledger.peek(SessionKey("-", name))
            if found is None and truth.chain == FRESH and truth.frozen is None:
                truth.promise(None)  # it has learned nothing: it was only a name, or its row could not be written
            assert (None if found is None else found.version) == (None if truth.chain is None else len(truth.chain) - 1)
            if found is not None:
                assert kind(found.frozen) == truth.frozen
            if truth.chain is not None:
                assert self.world.value(name) == truth.chain[-1]
        self.world.run()

    def open_again(self, folder: Path, expected: dict[str, tuple[set[Chain], set[Frozen]]]) -> None:
        assert Offline(folder).fsck()["problems"] == []
        self.start(folder)
        for name, (chains, frozen_) in expected.items():
            found = self.world.ledger.peek(SessionKey("-", name))
            if found is None:
                assert None in chains, f"{name} is gone; it must be one of {chains}"
                self.truths[name].promise(None)
                self.truths[name].promise_frozen(None)
                continue
            assert kind(found.frozen) in frozen_, f"{name} is frozen {found.frozen}; it must be one of {frozen_}"
            self.truths[name].promise_frozen(kind(found.frozen))
            held = self.world.value(name)
            same = [chain for chain in chains if chain is not None and (len(chain) - 1, chain[-1]) == (found.version, held)]
            assert same, f"{name} is at version {found.version} and holds {held}; it must be one of {chains}"
            self.truths[name].promise(same[0])
        self.world.run()

    # What holds at any moment.

    @invariant()
    def whole(self) -> None:
        if not hasattr(self, "world"):
            return
        if self.wrong:
            raise self.wrong[0]
        world, sessions = self.world, list(self.world.ledger.sessions.values())
        assert world.tiers.placed == sum(s.life.placed for s in sessions) <= world.ledger.limit
        assert set(world.ledger.by_adapter) == {s.adapter for s in sessions}
        for session in sessions:
            life = session.life
            assert life.state is not State.GONE
            assert life.in_memory or not life.unsaved, "what it has learned is nowhere"
            assert bool(life.queue) == (id(session) in world.tiers.operations.active)
            assert life.generation >= self.generations.get(id(session), (session, 0))[1]
            assert max(life.learned_at, life.returned_at, life.saved_at, life.recorded_at) <= life.generation
        self.generations = {id(session): (session, session.life.generation) for session in sessions}
        for name, truth in self.truths.items():
            if truth.chain is not None and self.session(name) is None and len(truth.chain) > 1:
                truth.found = {truth.chain}  # it was put away: it is on disk as it was
                truth.found_frozen = {truth.frozen}

    def teardown(self) -> None:
        with contextlib.ExitStack() as stack:
            if hasattr(self, "world"):
                stack.callback(self.folder.cleanup)
                stack.callback(self.world.store.folder.unlock)
                stack.callback(self.world._let_go)
                if not self.world.killed:
                    self.end()


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=40, stateful_step_count=50, deadline=None)
