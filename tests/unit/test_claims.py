"""Servers that share a state dir, and what else is under way when one asks for a session, or loses it."""

from __future__ import annotations

import time
from concurrent.futures import Future
from typing import Any

import pytest
import test_sharing
from test_admin import Engine
from test_sharing import Servers, claim
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.life import sharing
from vllm_ttt.engine.life.sharing import Sharing
from vllm_ttt.engine.storage import database, leases
from vllm_ttt.engine.storage.failures import StoreError
from vllm_ttt.engine.storage.member import DEAD
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
    one.store._locked_until = 0.0
    assert one.store.find(SessionKey("-", "b")) is None


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
