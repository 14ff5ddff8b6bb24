"""Whatever the state dir says or fails to say is an answer to who asked for that session; the engine goes on."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_deep_scheduler import Engine as Scheduled
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.storage import records
from vllm_ttt.engine.storage.store import StoreError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


class Engine(Scheduled):
    """vLLM's scheduler with a state dir, and the answers that its requests get."""

    def __init__(self, folder: Path, **sessions: Any):
        super().__init__("last", sessions={"resident": 4, "state_dir": str(folder), **sessions})
        self.answers: dict[str, Any] = {}
        update = self.scheduler.update_from_output

        def remember(*args: Any) -> Any:
            outputs = update(*args)
            for per_client in outputs.values():
                self.answers |= {output.request_id: output for output in per_client.outputs}
            return outputs

        self.scheduler.update_from_output = remember  # type: ignore[method-assign]

    def status(self, session: str | None) -> Any:
        """Send a request, and what its answer says: a status where it is refused, else the version."""
        name = self.send(session)
        for _ in range(3):
            self.step()
        answer = self.answers[name].kv_transfer_params
        return None if answer is None else answer["ttt"].get("status", answer["ttt"].get("version"))


def sqlite(folder: Path, statement: str, *values: Any) -> None:
    with sqlite3.connect(folder / "sessions.db") as db:
        db.execute(statement, values)
    db.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sessions a and b of two versions each; a holds 3, b 30."""
    world = World(tmp_path / "state")
    for name, values in (("a", (1.0, 2.0)), ("b", (10.0, 20.0))):
        for value in values:
            world.use(name, value)
            world.save(name)
    world.end()
    return tmp_path / "state"


#: statement, and at which version the session a is found then
DAMAGE: dict[str, tuple[str, int]] = {
    "state cut short": ("UPDATE sessions SET summary = substr(summary, 1, 8) WHERE name = 'a'", 2),
    "no text": ("UPDATE sessions SET summary = CAST(x'ff00fe' AS TEXT) WHERE name = 'a'", 2),
    "other types": ("""UPDATE sessions SET detail = '{"losses": 5, "history": [[1]]}' WHERE name = 'a'""", 2),
    "counts that are none": ("""UPDATE sessions SET summary = '{"tokens_skipped": {"loss": "x"}}' WHERE name = 'a'""", 2),
    "no JSON object": ("UPDATE sessions SET detail = '[]' WHERE name = 'a'", 2),
    "deep JSON": ("UPDATE sessions SET detail = replace(hex(zeroblob(100000)), '00', '[') WHERE name = 'a'", 2),
    "times": ("UPDATE sessions SET created = 'yesterday' WHERE name = 'a'", 2),
    "version cut short": ("UPDATE versions SET detail = '{' WHERE version = 2 AND uid = (%s)", 1),
    "another version": ("UPDATE versions SET version = 7 WHERE version = 2 AND uid = (%s)", 1),
    "a file elsewhere": ("UPDATE versions SET file = '../../../etc/passwd' WHERE version = 2 AND uid = (%s)", 1),
    "another's file": ("UPDATE versions SET file = replace(file, substr(uid, 3), 'x') WHERE version = 2 AND uid = (%s)", 1),
    "both": ("UPDATE versions SET summary = '' WHERE uid = (%s)", 0),
}  # fmt: skip


@pytest.mark.parametrize("what", sorted(DAMAGE))
def test_a_damaged_row_costs_what_it_says(folder: Path, what: str, caplog: pytest.LogCaptureFixture) -> None:
    """As a damaged file does: the session falls back, says so, and learns on; others are as they were."""
    statement, version = DAMAGE[what]
    sqlite(folder, statement.replace("%s", "SELECT uid FROM sessions WHERE name = 'a'"))
    if what not in ("a file elsewhere", "another's file", "another version"):  # those files are gone for the start
        assert [p["session_id"] for p in Offline(folder).fsck()["problems"]][:1] == ["a"]
    world = World(folder)
    held = {2: 3.0, 1: 1.0, 0: 0.0}[version]
    assert world.value("a") == held
    session = world.ledger.sessions[SessionKey("-", "a")]
    assert session.version == version
    assert "damaged" in caplog.text or "is gone or was cut short" in caplog.text
    assert world.value("b") == 30.0
    world.use("a", 5.0)
    assert world.save("a").version == version + 1
    world.end()
    assert Offline(folder).fsck()["problems"] == []
    again = World(folder)
    assert again.value("a") == held + 5.0
    again.end()


def test_a_damaged_row_is_reported_and_mended(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    sqlite(folder, "UPDATE sessions SET uid = 'u1', summary = '{\"versi' WHERE name = 'a'")
    world = World(folder)
    session = world.use("a", 1.0)
    assert session.error is not None
    assert "damaged" in session.error
    assert "session -/a is damaged" in caplog.text
    world.run()
    assert world.save("a").version == 1
    world.end()
    assert Offline(folder).fsck()["problems"] == []
    assert sorted(s["session_id"] for s in Offline(folder).list()) == ["a", "b"]


def test_fsck_repairs_a_row(folder: Path) -> None:
    sqlite(folder, "UPDATE versions SET detail = '{' WHERE version = 2 AND uid = (SELECT uid FROM sessions WHERE name = 'a')")
    assert Offline(folder).list()[0]["session_id"] in ("a", "b")
    assert Offline(folder).fsck(repair=True)["problems"]
    assert Offline(folder).fsck()["problems"] == []
    world = World(folder)
    assert world.value("a") == 1.0
    world.end()


def test_a_row_that_cannot_be_parsed_does_not_end_the_engine(tmp_path: Path) -> None:
    engine = Engine(tmp_path / "state")
    now = json.dumps({})
    sqlite(tmp_path / "state", "INSERT INTO sessions VALUES ('u1', '-', 'broken', 1.0, 1.0, '{\"versi', ?)", now)
    for _ in range(2):  # who tries again meets no other end
        assert engine.status("broken") == 0
    assert engine.status(None) is None
    assert engine.status("other") == 0
    engine.scheduler.shutdown()


@pytest.mark.parametrize("error", [sqlite3.OperationalError("disk I/O error"), OSError(5, "Input/output error")])
def test_a_state_dir_that_cannot_be_read_is_a_503(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Of the session that is asked for alone: one in memory, and base requests, are served. And it is over when it is over."""
    engine = Engine(tmp_path / "state")
    assert engine.status("here") == 0
    engine.scheduler.ttt_ledger.open(SessionKey("-", "here")).requests.add("stays")

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        for name in ("find", "count", "versions", "count_saved"):
            patch.setattr(records, name, fail)
        assert engine.status("away") == 503
        assert engine.status("here") == 0
        assert engine.status(None) is None
        assert not engine.scheduler.requests, "nobody is held"
        with pytest.raises(StoreError, match="cannot be read"):
            engine.session("away")
    assert engine.status("away") == 0
    engine.scheduler.ttt_ledger.open(SessionKey("-", "here")).requests.clear()
    engine.scheduler.shutdown()


def test_admin_calls_say_that_it_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_admin import Engine as Admin

    world = World(folder)
    engine = Admin(world)

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("disk I/O error")

    with monkeypatch.context() as patch:
        patch.setattr(records, "find", fail)
        for op, argument in (("get", None), ("delete", None), ("rollback", 1), ("fork", "c"), ("save", None)):
            answer = admin(engine, op, "-", "a", argument)
            assert answer["status"] == 503, op
            assert "disk I/O error" in answer["message"]
    assert engine.ask("get", "a")["version"] == 2
    world.end()


#: who raises, and where the engine's loop meets it
HOOKS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "a request leaves": lambda tiers: (tiers, "left"),
    "a request waits": lambda tiers: (tiers, "_admit"),
    "orders": lambda tiers: (tiers.saves, "step"),
    "expiry": lambda tiers: (tiers.expiry, "step"),
    "what was written": lambda tiers: (tiers.store, "poll"),
    "rows": lambda tiers: (tiers.store, "note"),
}


@pytest.mark.parametrize("hook", sorted(HOOKS))
def test_no_error_of_a_hook_ends_the_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    engine = Engine(tmp_path / "state", host_gib=0.001)
    tiers = engine.scheduler.ttt_tiers
    for name in "wxyz":  # one more needs the room of one of them
        assert engine.status(name) == 0
        session = engine.scheduler.ttt_ledger.find(SessionKey("-", name))
        assert session is not None
        session.frozen = "asked for"  # so it is more than a name

    def fail(*_: object) -> None:
        raise RuntimeError("whatever")

    with monkeypatch.context() as patch:
        patch.setattr(*HOOKS[hook](tiers), fail)
        refused = engine.status("b")
        assert refused == (503 if hook in ("a request waits", "rows") else 0)
        assert engine.status(None) is None
        assert not engine.scheduler.requests
    assert engine.scheduler.ttt_guard.errors.count > 0
    assert engine.status("c") == 0
    engine.scheduler.shutdown()
