"""Lists of sessions: every session once, wherever it is, and nobody waits for who lists."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from test_admin import Engine, one_session
from test_changes import Held, ask
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.storage import records
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    with one_session(tmp_path / "state") as engine:
        yield engine


def pages(engine: Engine, op: str = "list", limit: int = 7, tenant: str = "-") -> list[dict[str, Any]]:
    found, after = [], None
    while True:
        page = engine.ask(op, "", {"limit": limit, "after": after}, tenant)
        assert len(page["sessions"]) <= limit
        found += page["sessions"]
        after = page["next"]
        if after is None:
            return found


@pytest.mark.parametrize("limit", [1, 7, 20, 100])
def test_pages_have_every_session_once(tmp_path: Path, limit: int) -> None:
    """On disk, in memory, and about to be recorded; used at one time, too."""
    world = World(tmp_path / "state", limit=4)
    engine = Engine(world)
    for i in range(20):
        world.use(f"s{i}", float(i))
        world.run()
    world.use("theirs", 1.0, tenant="t2")
    held = Held(world)
    for i in range(20, 24):
        world.ledger.open(SessionKey("-", f"s{i}")).frozen = "asked for"  # so it is more than a name
        world.tiers.left(world.ledger.sessions[SessionKey("-", f"s{i}")])
    assert world.store.noted("-")
    for session in world.ledger.sessions.values():
        session.last_used = 1000.0
    names = [s["session_id"] for s in pages(engine, limit=limit)]
    held.release()
    assert sorted(names) == sorted(f"s{i}" for i in range(24))
    world.run()
    everybody = pages(engine, "list_all", limit)
    assert sorted(s["session_id"] for s in everybody) == sorted([*names, "theirs"])
    assert [s["last_used"] for s in everybody] == sorted((s["last_used"] for s in everybody), reverse=True)
    assert [s["session_id"] for s in pages(engine, limit=limit, tenant="t2")] == ["theirs"]
    world.end()


@pytest.mark.parametrize("after", ["", "x", "bnVsbA", "WzEsMl0", "W10", "e30", "ä", "A" * 999, "WzEuMCwiXHVkODAwIl0"])
def test_a_page_after_nothing(engine: Engine, after: str) -> None:
    assert engine.ask("list", "", {"limit": 5, "after": after}) == 400


def test_a_session_that_is_put_away_while_a_list_is_read_is_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "state", limit=1)
    engine = Engine(world)
    world.use("a", 1.0)
    world.save("a")
    world.use("b", 1.0)
    gate, real = threading.Event(), records.listing

    def listing(*args: Any) -> Any:
        rows = real(*args)
        gate.wait()
        return rows

    monkeypatch.setattr(records, "listing", listing)
    answer = ask(engine, "list", "")
    world.step()
    world.save("b")
    world.use("c", 1.0)  # b has to go
    world.run(lambda: not world.store.busy)
    gate.set()
    world.run(answer.done)
    assert {s["session_id"]: s["version"] for s in answer.result()["result"]["sessions"]} == {"a": 1, "b": 1, "c": 1}
    world.end()


def test_nobody_waits_for_who_lists(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save is done while lists are read; of many that are asked for, a step makes one; and a key waits for so many."""
    world, gate, real = engine.world, threading.Event(), records.listing
    monkeypatch.setattr(records, "listing", lambda *args: (gate.wait(), real(*args))[1])
    asked = [admin(engine, "list", "-", "") for _ in range(20)]
    waiting = [answer for answer in asked if isinstance(answer, Future)]
    assert [answer["status"] for answer in asked if isinstance(answer, dict)] == [429] * 4
    world.use("b", 1.0)
    assert engine.ask("save", "b")["saved_version"] == 1
    gate.set()
    done = 0
    while done < 16:
        world.step()
        now = sum(answer.done() for answer in waiting)
        assert now - done <= 1
        done = now
    assert engine.ask("list")["next"] is None


def test_a_list_reads_no_losses(engine: Engine) -> None:
    """Of each row the small part alone: a damaged large one does not matter to it."""
    engine.world.run()
    engine.world.store.reader.execute("UPDATE sessions SET detail = 'x'")
    engine.world.store.reader.execute("UPDATE versions SET detail = 'x'")
    (row,) = Offline(engine.world.store.folder.root).list()
    assert (row["session_id"], row["version"], row["tokens_learned"]) == ("a", 2, 32)


def test_a_list_that_cannot_be_read_is_a_503(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(records, "listing", fail)
        assert engine.ask("list") == 503
    assert len(engine.ask("list")["sessions"]) == 1


def test_a_list_of_a_state_dir_that_is_gone_tells_nobody_where_it_was(engine: Engine) -> None:
    path = engine.world.store.folder.database
    path.rename(path.with_name("away"))
    answer = engine.world.wait(admin(engine, "list", "-", ""))
    path.with_name("away").rename(path)
    assert answer["status"] == 503
    assert str(path.parent) not in answer["message"]
