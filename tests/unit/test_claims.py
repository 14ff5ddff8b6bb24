"""Servers that share a state dir, and what else is under way when one asks for a session, or loses it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest
import test_sharing
from test_admin import Engine
from test_sharing import Servers, ask, claim
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.life import sharing
from vllm_ttt.engine.life.sharing import Sharing
from vllm_ttt.engine.storage import database, leases
from vllm_ttt.engine.storage.failures import StoreError
from vllm_ttt.engine.storage.member import DEAD
from vllm_ttt.engine.storage.store import Change
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

servers = test_sharing.servers
A, COPY = SessionKey("-", "a"), SessionKey("-", "copy")


def shares(world: World) -> Sharing:
    assert world.tiers.sharing is not None
    return world.tiers.sharing


def test_one_who_stops_in_a_commit_keeps_no_engine_waiting(servers: Servers) -> None:
    """Whose thread asks once, briefly, and not again for a while; what it had counted stands."""
    one = servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    stopped, asked = database.connect(one.store.folder.database), list[str]()
    stopped.execute("BEGIN EXCLUSIVE")
    assert one.store.reader.execute("PRAGMA busy_timeout").fetchone()[0] == database.BRIEFLY
    one.store.reader.set_trace_callback(asked.append)
    for _ in range(5):
        with pytest.raises(StoreError) as refused:
            one.store.find(SessionKey("-", "b"))
        assert refused.value.status == 503
        shares(one).next_count = 0.0
        shares(one).step()
        assert one.ledger.quotas.total == 1
        assert shares(one).next_count > time.monotonic()
    assert len(asked) <= 1
    stopped.close()
    one.store.reader.set_trace_callback(None)
    one.store.contention.unreadable_until = 0.0
    assert one.store.find(SessionKey("-", "b")) is None


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """For another server that has the database, and for the next look."""
    monkeypatch.setattr(database, "PATIENCE", 100)
    monkeypatch.setattr(database, "LOCKED", 0.05)
    monkeypatch.setattr(sharing, "_LOOK", 0.05)


def test_who_asks_for_a_session_while_the_database_is_kept_is_told_so(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in its turn, behind saves and other claims, each of which waits for long; and then without a try."""
    monkeypatch.setattr(database, "LOCKED", 0.1)
    one = servers.start()
    stopped = database.connect(one.store.folder.database)
    stopped.execute("BEGIN EXCLUSIVE")
    save = one.store.write(lambda db: Change("saved"))
    claims = [admin(Engine(one), "claim", "-", f"s{i}") for i in range(4)]
    one.run(lambda: all(asked.done() for asked in claims))
    assert {(asked.result()["status"], asked.result()["retry_after"]) for asked in claims} == {(503, 2)}
    assert not save.done(), "they have waited for it"
    waiting = len(one.store.unwritten)
    again = admin(Engine(one), "claim", "-", "s4")
    assert again.done()
    assert len(one.store.unwritten) == waiting
    stopped.close()
    assert one.wait(save) == "saved"
    one.run()
    assert claim(one, "s0")


def test_a_claim_that_cannot_be_written_tells_nobody_where_the_state_dir_is(servers: Servers, impatient: None) -> None:
    one = servers.start()
    stopped = database.connect(one.store.folder.database)
    stopped.execute("BEGIN EXCLUSIVE")
    answer = one.wait(admin(Engine(one), "claim", "-", "a"))
    stopped.close()
    assert (answer["status"], answer["retry_after"]) == (503, 2)
    assert str(servers.folder) not in answer["message"]


@pytest.mark.parametrize("wanted_again", [False, True])
def test_a_release_that_could_not_be_written_is_written_later(servers: Servers, impatient: None, wanted_again: bool) -> None:
    """Else nobody else could have the session as long as this server lives. It may have it again itself."""
    one, two = servers.start(), servers.start()
    other = database.connect(one.store.folder.database)
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    assert not claim(two, "a")
    shares(one).watch.look()
    other.execute("BEGIN IMMEDIATE")  # somebody writes for longer than is waited
    one.tiers.check()
    one.run(lambda: not one.store.busy)
    assert not shares(one).leases.holds(A)
    other.close()
    if wanted_again:
        one.run(lambda: ask(one, "claim", "a")["ok"])
        shares(one).next_look = 0.0
        one.run()
        one.use("a", 2.0)
        one.save("a")
        assert one.value("a") == 3.0
    else:
        one.run(lambda: claim(two, "a"))
        assert two.value("a") == 1.0


def test_a_claim_that_was_under_way_brings_nothing_back(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two requests of one session at once: the second one's claim is answered after the session was released."""
    monkeypatch.setattr(sharing, "LINGER", 0.0)
    one, two = servers.start(), servers.start()
    other = database.connect(one.store.folder.database)
    first = shares(one).claim(A)
    (written,) = one.store.unwritten
    written.result(timeout=10)
    other.execute("BEGIN IMMEDIATE")  # somebody writes for a while
    second = shares(one).claim(A)
    one.run(first.done)
    assert first.result()
    shares(one).next_look = 0.0
    shares(one).step()
    assert not shares(one).leases.holds(A)
    other.execute("ROLLBACK")
    assert not one.wait(second), "it is to ask again"
    one.run()
    assert not shares(one).leases.leaving
    assert claim(two, "a")
    assert not shares(one).leases.holds(A)
    other.close()


def test_what_is_lost_while_it_becomes_a_copy_can_be_had_again(servers: Servers) -> None:
    """A server that is found dead in the middle of a fork, and goes on: the fork fails, and nobody has the new session."""
    one, two = servers.start(), servers.start()
    for name in ("a", "copy"):
        assert claim(one, name)
    one.use("a", 1.0)
    fork = admin(Engine(one), "fork", "-", "a", "copy")
    assert isinstance(fork, Future)
    orders = list[Any]()
    while not orders:  # of the copy's file, which takes until the server goes on
        one.tiers.check()
        orders = one.tiers.take_orders()
    servers.passes(DEAD + 3, but=one)
    shares(one).watch.look()
    one.files.step(orders)
    assert one.wait(fork)["status"] == 409
    one.run()
    assert COPY not in one.ledger.sessions
    servers.passes(1)
    assert claim(one, "copy")
    assert not claim(two, "copy")


def test_who_asks_again_writes_nothing(servers: Servers) -> None:
    """A transaction that changes nothing costs no disk, and keeps nobody's save waiting."""
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    session, watch = shares(two).leases.session(A), shares(two).watch
    before = watch.db.total_changes
    assert [leases.claim(watch.db, watch.member.id, session) for _ in range(5)] == [None] * 5
    assert watch.db.total_changes == before + 1
    assert leases.wanted(watch.db, shares(one).watch.member.id) == [session]
