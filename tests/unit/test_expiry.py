"""Sessions that nobody uses go, and nobody else, whatever the clock says."""

from __future__ import annotations

import sqlite3
import time

import pytest
from test_tiers import Make, files, make
from world import World

from vllm_ttt.engine.storage import records
from vllm_ttt.engine.storage.store import Change
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

__all__ = ["make"]
pytestmark = pytest.mark.unit


def sweep(world: World) -> list[str]:
    """Sessions of the state dir after the next look for those that nobody uses."""
    world.tiers.expiry.next_look = 0.0
    world.step()
    world.run()
    return sorted(s["session_id"] for s in Offline(world.store.folder.root).list())


def test_sessions_that_nobody_uses_expire(make: Make) -> None:
    world = make(limit=2, ttl="1h")
    for i in range(4):
        world.use(f"s{i}", 1.0)
        world.run()
    for key in (SessionKey("-", "s0"), SessionKey("-", "s3")):
        session = world.ledger.find(key)
        assert session is not None
        session.last_used -= 7200
        session.life.touch()
        world.tiers.changes(session)
        world.wait(world.tiers.save(session))
        world.tiers.left(session)
    world.run()
    assert sweep(world) == ["s1", "s2"]
    assert len(files(world)) == 2
    assert world.ledger.quotas.of("-") == 2


def test_many_sessions_expire_a_few_at_a_time(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each costs the engine a look at its row, and the state dir a write: no step waits for hundreds."""
    monkeypatch.setattr("vllm_ttt.engine.life.expiry._AT_ONCE", 3)
    world = make(limit=1, ttl="1h")
    for i in range(8):
        world.use(f"s{i}", 1.0)
        world.run()
    world.end()
    again = make(limit=1, ttl="1h")
    again.run()
    again.store.write(lambda db: Change(db.execute("UPDATE sessions SET last_used = 0")))
    again.run()
    left = [8]
    while left[-1]:
        again.tiers.expiry.next_look = 0.0
        again.step()
        again.run()
        assert again.tiers.expiry.next_look < time.monotonic() + 2 or left[-1] < 3
        left.append(len(Offline(again.store.folder.root).list()))
    assert left == [8, 5, 2, 0]


@pytest.mark.parametrize("jump", [10 * 365 * 86400.0, -10 * 365 * 86400.0])
def test_a_clock_that_is_set_ends_no_session(make: Make, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    """In memory and on disk; and who is unused for ``ttl`` by the new clock goes, as before."""
    world, real = make(limit=2, ttl="1h"), time.time
    for i in range(4):
        world.use(f"s{i}", 1.0)
        world.run()

    for offset in (jump, 0.0):
        monkeypatch.setattr("time.time", lambda offset=offset: real() + offset)
        assert sweep(world) == ["s0", "s1", "s2", "s3"]
        world.use("s1", 1.0)
        assert world.save("s1").saved == pytest.approx(real() + offset, abs=60)
    # An hour passes, by either clock.
    passed = time.monotonic
    monkeypatch.setattr("time.time", lambda: real() + 7200)
    monkeypatch.setattr("time.monotonic", lambda: passed() + 7200)
    assert sweep(world) == []


def test_a_clock_that_the_state_dir_cannot_follow_ends_no_session(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told again with the next look, and until then nobody expires."""
    world, real = make(limit=1, ttl="1h"), time.time
    for name in "abc":
        world.use(name, 1.0)
        world.run()

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr("time.time", lambda: real() + 86400)
    with monkeypatch.context() as full:
        full.setattr(records, "follow_clock", fail)
        assert sweep(world) == sweep(world) == ["a", "b", "c"]
    assert sweep(world) == ["a", "b", "c"]
    passed = time.monotonic
    monkeypatch.setattr("time.time", lambda: real() + 86400 + 7200)
    monkeypatch.setattr("time.monotonic", lambda: passed() + 7200)
    assert sweep(world) == [], "it has followed by then: an hour unused is an hour"


def test_a_session_that_was_used_since_it_was_found_stays(make: Make) -> None:
    """Its row was old when the state dir was asked; before the answer came it was used, and put away."""
    world = make(limit=1, ttl="1h")
    world.use("a", 1.0)
    world.save("a")
    world.use("b", 1.0)
    world.run()
    assert SessionKey("-", "a") not in world.ledger.sessions, "it was put away"
    world.tiers.expiry._expire([SessionKey("-", "a")])
    world.run()
    assert world.store.find(SessionKey("-", "a")) is not None
