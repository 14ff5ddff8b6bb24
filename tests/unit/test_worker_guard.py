"""Versions to return to, the guard's trials, and what may be learned at all."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from test_worker_compute import LEARN, D, Q, V, make

from vllm_ttt.config import GuardConfig, parse_config
from vllm_ttt.engine.limits.probe import read_text
from vllm_ttt.errors import ConfigError
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.capture.backlog import Backlog
from vllm_ttt.worker.capture.step_view import Rows
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.delta import Delta
from vllm_ttt.worker.deltas.masters import Deltas
from vllm_ttt.worker.deltas.versions import Versions, restore
from vllm_ttt.worker.deltas.versions import keep as keep_session
from vllm_ttt.worker.guard.guard import ROWS_PER_TOKEN, Guard
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.step.micro_step import accumulate

pytestmark = pytest.mark.unit

ROWS = 40


def fill(deltas: Deltas, key: int, value: float) -> None:
    """As a step whose outcome is known leaves the session: B, the last update, the rate and the norms say which it was."""
    deltas.row(key)
    for x in deltas.read(key).tensors():
        x.fill_(value)
    session = deltas.session(key)
    session.rate, session.norms = float(value), [float(value)] * 4


def keep(versions: Versions, deltas: Deltas, key: int, version: int) -> None:
    versions.add(key, version, keep_session(deltas, key))


# Versions


def test_the_last_versions_are_kept_and_restored_as_they_were() -> None:
    deltas, versions = make().deltas, Versions(2, 3, 10**9)
    for commit in range(1, 13):
        fill(deltas, 7, commit)
        if versions.due(7):
            keep(versions, deltas, 7, commit)
    assert versions.of(7) == [0, 9, 12], "every third, the last two of them, and the base model"
    kept = versions.find(7, 9)
    assert kept is not None
    session = restore(deltas, 7, 9, kept)
    assert (session.version, session.norms, session.rate) == (9, [9.0] * 4, 9.0)
    assert all(bool((x == 9).all()) for x in deltas.read(7).tensors()), "B, the last update and the rate"
    fill(deltas, 7, 5.0)
    assert kept.state is not None
    assert all(bool((x == 9).all()) for x in kept.state.tensors()), "what is kept stays"
    assert (kept.rate, kept.norms) == (9.0, [9.0] * 4)
    versions.cut(7, 9)
    assert versions.of(7) == [0, 9]
    assert versions.find(7, 12) is None


def test_version_0_is_the_base_model() -> None:
    deltas, versions = make().deltas, Versions(2, 1, 10**9)
    fill(deltas, 7, 1.0)
    kept = versions.find(7, 0)
    assert kept is not None
    session = restore(deltas, 7, 0, kept)
    fresh = deltas.read(7)
    assert not any(x.any() for x in (*fresh.delta.tensors(), *fresh.last.tensors()))
    assert (session.version, session.norms, session.rate) == (0, [0.0] * 4, LEARN.rate)
    assert fresh.rate_S.item() == pytest.approx(LEARN.rate), "the rate begins anew"


def test_a_session_without_a_row_is_restored() -> None:
    deltas, versions = make().deltas, Versions(2, 1, 10**9)
    fill(deltas, 1, 4.0)
    keep(versions, deltas, 1, 4)
    for other in (2, 3, 4):
        deltas.row(other)  # three rows: session 1 has to go
    assert 1 not in deltas.rows
    kept = versions.find(1, 4)
    assert kept is not None
    deltas.row(1)
    fill(deltas, 1, 6.0)
    deltas.row(2)
    deltas.row(3)
    deltas.row(4)
    assert 1 not in deltas.rows
    assert restore(deltas, 1, 4, kept).rate == 4.0
    assert all(bool((x == 4).all()) for x in deltas.read(1).tensors())
    deltas.row(1)
    for x in deltas.read(1).tensors():
        assert bool((x == 4).all())
        x.fill_(5.0)
    assert kept.state is not None
    assert all(bool((x == 4).all()) for x in kept.state.tensors())


def test_memory_is_bounded_and_the_good_version_stays() -> None:
    deltas = make().deltas
    size = deltas.bytes_per_session()
    assert deltas.row(1) != deltas.row(2)
    versions = Versions(5, 1, 4 * size)
    versions.add_good(1, 2, keep_session(deltas, 1))
    for version in range(1, 6):
        keep(versions, deltas, 1, version)
    keep(versions, deltas, 2, 1)
    assert versions.bytes <= 4 * size
    assert versions.of(2) == [0, 1], "who has most gives"
    assert versions.of(1) == [0, 2, 3, 4, 5]
    versions.drop(1)
    assert versions.of(1) == [0]
    assert versions.bytes == size


# The guard


class Trying:
    """A guard with a text of ROWS rows that has been read."""

    def __init__(self, config: GuardConfig):
        self.compute = make()
        self.deltas, self.tail = self.compute.deltas, self.compute.tail
        self.versions = Versions(3, 16, 10**9)
        torch.manual_seed(2)
        self.h, self.a, self.t = torch.randn(ROWS + 1, 32), torch.randn(ROWS + 1, 48), torch.randint(0, V, (ROWS + 1,))
        self.probe = Probe(ROWS, self.h, self.a)
        self.guard = Guard(config, self.tail, self.probe, self.versions, Clock(torch.device("cpu")))

    def read(self) -> None:
        plan = RequestPlan(99, ROWS + 1, learn=False, learn_output=False, probe=True)
        self.probe.start("p", plan)
        self.take(0, 24)
        assert not self.probe.ready
        self.take(16, ROWS)  # eight are computed again
        self.probe.finish("p")

    def take(self, first: int, end: int) -> None:
        self.probe.take([Rows("p", 0, first, self.t[first:end])], self.h[first:end], self.a[first:end])

    def loss(self, delta: Delta, grad: Delta | None = None) -> float:
        weight = torch.full((1, ROWS), 1 / ROWS)
        return accumulate(self.tail, delta, self.h[None, :ROWS], self.a[None, :ROWS], self.t[None, :ROWS], weight, grad).item()

    def harm(self, key: int) -> None:
        """Move the session up the slope of the text's loss."""
        grad = self.tail.zeros(1)
        self.loss(self.deltas.read(key).delta, grad)
        for x, g in zip(self.deltas.read(key).delta.tensors(), grad.tensors(), strict=True):
            x += g

    def learn(self, key: int, commits: int, scale: float) -> None:
        torch.manual_seed(key)
        row = self.deltas.row(key)
        for x in self.deltas.masters.delta.tensors():
            x[row].normal_(std=scale)
        for _ in range(commits):
            self.deltas.session(key).version += 1
            self.guard.committed(key)

    def run(self, tokens: int = 10**6) -> int:
        return self.guard.run(tokens, self.deltas, frozenset())


@pytest.mark.parametrize("tokens", [10**6, 5])
def test_a_delta_that_harms_is_found_and_a_good_version_kept(tokens: int) -> None:
    trying = Trying(GuardConfig(every=4, max_regression=0.001))
    trying.learn(1, 4, 0.0)
    assert not trying.guard.busy, "the text has not been read yet"
    trying.read()
    assert trying.probe.rows == ROWS, "each row once"
    trials = []
    while trying.guard.busy:
        trying.run(tokens)
        trials += trying.guard.collect(trying.deltas.sessions)
    assert [(t.session, t.version, t.back_to) for t in trials] == [(1, 4, None)]
    assert trials[0].regression == pytest.approx(0.0, abs=1e-5)
    assert trying.versions.of(1) == [0, 4]

    trying.learn(1, 3, 0.0)
    assert not trying.guard.busy, "it is not due"
    trying.learn(1, 1, 0.0)
    trying.harm(1)
    while trying.guard.busy:
        trying.run(tokens)
        trials += trying.guard.collect(trying.deltas.sessions)
    expected = trying.loss(trying.deltas.read(1).delta) - trying.loss(trying.tail.zeros(1))
    assert expected > 0.001
    assert trials[1].regression == pytest.approx(expected, abs=1e-5)
    assert (trials[1].version, trials[1].back_to) == (8, 4)


def test_a_session_that_is_due_waits_and_the_others_do_not() -> None:
    trying = Trying(GuardConfig(every=4))
    trying.learn(1, 3, 0.1)
    trying.learn(2, 4, 0.1)
    assert trying.guard.due() == set(), "nothing waits for a text that has not been read"
    trying.read()
    assert trying.guard.due() == {2}
    trying.run()  # the base model first
    trying.guard.collect(trying.deltas.sessions)
    trying.run()
    assert [t.session for t in trying.guard.collect(trying.deltas.sessions)] == [2]
    assert not trying.guard.due()


def test_whom_somebody_waits_for_is_tried_first() -> None:
    trying = Trying(GuardConfig(every=1))
    trying.read()
    for key in (1, 2, 3):
        trying.learn(key, 1, 0.0)
    trying.run()  # the base model first
    trying.guard.collect(trying.deltas.sessions)
    run = lambda *first: trying.guard.run(10**6, trying.deltas, frozenset(), frozenset(first))  # noqa: E731
    tried = lambda: [t.session for t in trying.guard.collect(trying.deltas.sessions)]  # noqa: E731
    assert run(9) == 0, "nobody waits for those that are due: their trials can wait for another turn"
    assert run(3) > 0
    assert tried() == [3]
    assert run(3) == 0
    run()
    assert tried() == [1, 2], "the others, the longest-waiting first"


def test_it_never_takes_more_than_it_is_given() -> None:
    trying = Trying(GuardConfig(every=1))
    trying.learn(1, 1, 0.1)
    trying.read()
    assert trying.run(4) == 4
    assert trying.guard.task is not None
    assert trying.guard.task.done == 12, "a forward costs a third of a step"


def test_pieces_that_are_tried_whole_are_tried_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a piece takes seconds at full depth: who comes meanwhile waits for one, and not for the whole text."""
    trying = Trying(GuardConfig(every=1))
    monkeypatch.setattr(trying.probe, "cache", object())  # as at full depth, where the rows of a piece attend to one another
    monkeypatch.setattr(trying.probe, "loss", lambda tail, delta, rows: torch.zeros(1))
    for name, first, end in (("p", 0, 24), ("q", 24, ROWS)):
        trying.probe.start(name, RequestPlan(99, end - first + 1, learn=False, learn_output=False, probe=True))
        trying.probe.take([Rows(name, 0, 0, trying.t[first:end])], trying.h[first:end], trying.a[first:end])
        trying.probe.finish(name)
    trying.learn(1, 1, 0.1)
    assert trying.run() == 8, "24 rows cost a third of learning them"
    assert trying.guard.task is not None
    assert trying.guard.task.done == 24
    trying.run()
    assert trying.guard.task is None
    assert len(trying.guard.outcomes) == 1


def test_what_is_reset_meanwhile_is_not_judged() -> None:
    trying = Trying(GuardConfig(every=1, max_regression=0.01))
    trying.read()
    trying.learn(1, 1, 0.5)
    trying.run()
    trying.guard.collect(trying.deltas.sessions)
    trying.run()
    trying.deltas.drop(1)
    assert trying.guard.collect(trying.deltas.sessions) == []


def test_a_guard_that_fails_ends_and_nobody_waits_for_it() -> None:
    trying = Trying(GuardConfig(every=1))
    trying.read()
    trying.probe.t_P.fill_(V + 1)  # a token that does not exist
    for _ in range(3):
        trying.learn(1, 2, 0.1)
        assert trying.guard.on
        with pytest.raises(RuntimeError):
            trying.run()
    trying.learn(1, 9, 0.1)
    assert not trying.guard.due()
    assert not trying.guard.busy
    assert not trying.guard.on


def test_a_session_whose_trial_fails_is_still_due_and_a_trial_that_works_forgives() -> None:
    trying = Trying(GuardConfig(every=2))
    trying.read()
    trying.learn(1, 2, 0.1)
    trying.run()
    trying.guard.collect(trying.deltas.sessions)
    good, trying.probe.t_P = trying.probe.t_P, torch.full_like(trying.probe.t_P, V + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError):
            trying.run()
        assert trying.guard.due() == {1}
        assert trying.guard.untried(1) == 2
    trying.probe.t_P = good
    trying.run()
    assert [t.session for t in trying.guard.collect(trying.deltas.sessions)] == [1]
    trying.learn(1, 2, 0.1)
    trying.probe.t_P = torch.full_like(good, V + 1)
    with pytest.raises(RuntimeError):
        trying.run()
    assert trying.guard.on, "it was the first in a row"


@pytest.mark.parametrize("of", ["the base model", "a session"])
def test_a_trial_that_cannot_begin_has_failed(of: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where memory is short. No commit escapes the guard by it, and nobody waits for what cannot be."""
    trying = Trying(GuardConfig(every=2))
    trying.read()
    if of == "a session":
        trying.learn(1, 2, 0.1)
        trying.run()
        trying.guard.collect(trying.deltas.sessions)
    else:
        trying.learn(1, 2, 0.1)
    monkeypatch.setattr("vllm_ttt.worker.guard.guard.keep", mock.Mock(side_effect=MemoryError))
    monkeypatch.setattr(type(trying.tail), "zeros", mock.Mock(side_effect=MemoryError))
    for _ in range(2):
        with pytest.raises(MemoryError):
            trying.run()
        assert trying.guard.due() == {1}
        assert trying.guard.untried(1) == 2
        assert trying.guard.on
    with pytest.raises(MemoryError):
        trying.run()
    assert not trying.guard.on
    assert not trying.guard.due()


def test_who_is_not_due_costs_nothing() -> None:
    """Each step asks whether anybody is due: of thousands of sessions in memory, those that are not are not looked at."""
    trying = Trying(GuardConfig(every=2))
    trying.read()
    fail = mock.Mock(side_effect=AssertionError("they were looked at, one by one"))
    trying.guard.commits = type("Unread", (dict,), dict.fromkeys(("__iter__", "keys", "items"), fail))(
        dict.fromkeys(range(9), 1)
    )
    assert not trying.guard.busy
    assert trying.guard.due() == set()
    assert trying.run() == 0
    trying.guard.committed(5)
    assert trying.guard.due() == {5}


def test_off_it_costs_nothing() -> None:
    trying = Trying(GuardConfig(every=0))
    trying.read()
    trying.learn(1, 100, 0.5)
    assert not trying.guard.commits
    assert trying.run() == 0


# What may be learned


def test_room_is_made_although_a_session_waits_for_its_trial() -> None:
    """A session that is due is not learned before the base model's loss is known, which only `collect` takes in: whoever
    learns until there is room must collect, and end where nothing moves."""
    tail = make().tail
    config = parse_config(
        {"learn": {"chunk": 16, "min_chunk": 1, "max_loss": 2.0}, "guard": {"every": 2, "max_regression": 100}}
    )
    h, a, tokens = torch.randn(64, D), torch.randn(64, Q), torch.randint(0, V, (64,))
    backlog, deltas = Backlog(16, 16, 1, h, a), Deltas(tail, 3, config.learn.rate)
    slots: Any = SimpleNamespace(write=lambda *_: None, drop=lambda _: None, holds=lambda _: False)
    probe = Probe(40, h, a)
    trainer = Trainer(tail, config, backlog, deltas, slots, probe)
    probe.start("p", RequestPlan(99, 41, False, False, probe=True))
    probe.take([Rows("p", 0, 0, tokens[:41])], h, a)
    probe.finish("p")
    backlog.start("r", RequestPlan(7, 33, True, False))
    backlog.take([Rows("r", 0, 0, tokens[:33])], h, a)
    trainer.guard.resume(7, 4)
    assert trainer.guard.due() == {7}
    trainer.shares.awaited = frozenset({3})  # somebody waits for a session that has nothing to do
    trainer.make_room(lambda: False, 512)
    assert not backlog.queues
    assert trainer.deltas.session(7).version == 2

    backlog.start("s", RequestPlan(7, 33, True, False))
    backlog.take([Rows("s", 0, 0, tokens[:33])], h, a)
    with mock.patch.object(trainer, "learn", return_value=0):
        trainer.make_room(lambda: False, 512)  # ends
    assert backlog.queues


def prompts(tokens: int, chunk: int, sessions: tuple[int, ...] = (1, 2, 3)) -> Trainer:
    """A prompt of so many tokens of each session waits to be learned; there is no guard."""
    config = parse_config({"learn": {"chunk": chunk, "min_chunk": 1, "max_loss": 2.0}, "guard": {"every": 0}})
    h, a, drawn = torch.randn(tokens, D), torch.randn(tokens, Q), torch.randint(0, V, (tokens,))
    backlog, deltas = Backlog(16, chunk, 1, h, a), Deltas(make().tail, 5, config.learn.rate)
    slots: Any = SimpleNamespace(write=lambda *_: None, drop=lambda _: None, holds=lambda _: False)
    for key in sessions:
        backlog.start(f"r{key}", RequestPlan(key, tokens, True, False))
        backlog.take([Rows(f"r{key}", 0, 0, drawn)], h, a)
    return Trainer(make().tail, config, backlog, deltas, slots, Probe(1, h, a))


def test_who_is_waited_for_learns_first_and_the_others_every_other_time() -> None:
    trainer = prompts(tokens=64, chunk=16)
    trainer.shares.awaited = frozenset({3})
    for _ in range(6):
        assert trainer.learn(16) == 16, "one chunk"
    assert [chunk.session for chunk in trainer.take_report().chunks] == [3, 1, 3, 2, 3, 1]


def test_what_is_on_its_way_counts_for_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """A session is tried after two commits, and both may be under way: there is no third, however late their outcomes come."""
    trainer = prompts(tokens=80, chunk=16, sessions=(1,))
    guard = trainer.guard
    guard.config = guard.config.model_copy(update={"every": 2})
    monkeypatch.setattr(type(guard.probe), "ready", property(lambda _: True))
    monkeypatch.setattr(guard, "run", lambda *_: 0)
    monkeypatch.setattr(trainer.clock, "done", lambda _: False)
    assert [trainer.learn(16) for _ in range(3)] == [16, 16, 0]
    trainer.collect(wait=True)
    assert guard.commits == {1: 2}
    assert trainer.learn(16) == 0, "it waits for its trial"
    guard.drop(1)
    assert trainer.learn(16) == 16


@pytest.mark.parametrize("pieces", [1, 2, 3, 4])
@pytest.mark.parametrize("left", [0, 16])
def test_everybody_is_tried_however_many_calls_a_trial_takes(pieces: int, left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And whether a step has room beside a piece: else all trials could begin in the turns of those whom somebody waits for."""
    rows, tokens = 48, 16 * 64
    config = parse_config(
        {"learn": {"chunk": 16, "min_chunk": 1, "max_loss": 2.0}, "guard": {"every": 2, "max_regression": 100}}
    )
    h, a, drawn = torch.randn(tokens, D), torch.randn(tokens, Q), torch.randint(0, V, (tokens,))
    backlog, deltas = Backlog(400, 16, 1, h, a), Deltas(make().tail, 7, config.learn.rate)
    slots: Any = SimpleNamespace(write=lambda *_: None, drop=lambda _: None, holds=lambda _: False)
    trainer = Trainer(make().tail, config, backlog, deltas, slots, Probe(rows, h, a))
    probe, piece = trainer.guard.probe, rows // pieces
    monkeypatch.setattr(probe, "cache", object())  # as at full depth, where a piece is tried whole, and one in a call
    monkeypatch.setattr(probe, "loss", lambda tail, delta, rows: torch.zeros(1))
    for name in range(pieces):
        probe.start(f"p{name}", RequestPlan(99, piece + 1, learn=False, learn_output=False, probe=True))
        probe.take([Rows(f"p{name}", 0, 0, drawn[:piece])], h, a)
        probe.finish(f"p{name}")
    assert probe.ready
    for key in range(1, 7):
        backlog.start(f"r{key}", RequestPlan(key, tokens, True, False))
        backlog.take([Rows(f"r{key}", 0, 0, drawn)], h, a)
    trainer.shares.awaited = frozenset(range(1, 6))
    for _ in range(40 * pieces):
        trainer.learn(piece // ROWS_PER_TOKEN + left)
        trainer.collect()
    *awaited, other = (deltas.session(key).version for key in range(1, 7))
    assert min(awaited) > 0
    assert other >= max(awaited), "nobody waits for it, and it had half of the time"


def test_no_more_is_learned_at_once_than_was_asked_for() -> None:
    """A prompt of 512 tokens has 511 to learn: the token that is left over must not buy another chunk."""
    trainer = prompts(tokens=256, chunk=256)
    trainer.learn(256)
    assert [chunk.tokens for chunk in trainer.take_report().chunks] == [255]
    trainer.learn(64)
    assert [chunk.tokens for chunk in trainer.take_report().chunks] == [255], "one at least"


def test_a_probe_that_cannot_be_read_says_so(tmp_path: Path) -> None:
    assert len(read_text(GuardConfig())) > 10000
    for path in (tmp_path / "none.txt", tmp_path):
        with pytest.raises(ConfigError, match=r"guard\.probe .* guard\.every"):
            read_text(GuardConfig(probe=str(path)))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="as text"):
        read_text(GuardConfig(probe=str(tmp_path / "binary")))
