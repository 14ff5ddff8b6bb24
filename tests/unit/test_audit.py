"""The audit log: that whatever was changed in it is found, that it goes on after any kill, and that it tells of everything."""

from __future__ import annotations

import errno
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_admin import Engine
from typer.testing import CliRunner
from world import World

from vllm_ttt import audit_log
from vllm_ttt.audit_log import Log, entry
from vllm_ttt.cli import app
from vllm_ttt.config import SessionsConfig, parse_config
from vllm_ttt.engine.admin import admin
from vllm_ttt.errors import ConfigError, RequestError
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

KEY = SessionKey("-", "alice")


def write(path: Path, count: int, full: int = audit_log.FULL) -> Log:
    log = Log(path, full)
    for i in range(count):
        log.append([entry("learn", KEY, "u", tokens=i)], sync=False)
    return log


def events(path: Path) -> list[dict[str, Any]]:
    """What the log says but for the chain, the log being whole."""
    assert audit_log.verify(path).problem is None
    lines = [json.loads(line) for file in [*audit_log.rotated(path), path] for line in file.read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seq", "time", "prev", "hash")} for line in lines]


def told(path: Path) -> list[str]:
    return [f"{e['event']} {e.get('session', '')}".strip() for e in events(path)]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path = tmp_path_factory.mktemp("log") / "audit.jsonl"
    write(path, 12).close()
    return path.read_bytes().splitlines(keepends=True)


def verdict(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> audit_log.Verdict:
    path = tmp_path_factory.mktemp("changed") / "audit.jsonl"
    path.write_bytes(data)
    return audit_log.verify(path)


@given(data=st.data())
def test_a_changed_byte_is_found(data: st.DataObject, lines: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    whole = bytearray(b"".join(lines))
    at = data.draw(st.integers(0, len(whole) - 2))  # the last is what ends the last line
    whole[at] ^= 1 << data.draw(st.integers(0, 7))
    found = verdict(tmp_path_factory, bytes(whole))
    assert found.problem is not None
    ends = [sum(map(len, lines[: i + 1])) for i in range(len(lines))]
    assert found.problem["line"] in {n := next(i for i, end in enumerate(ends, 1) if at < end), n + 1}


@given(data=st.data())
def test_a_line_that_is_missing_moved_or_doubled_is_found(
    data: st.DataObject, lines: list[bytes], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert verdict(tmp_path_factory, b"".join(lines)).problem is None
    i, j = data.draw(st.lists(st.integers(0, 11), min_size=2, max_size=2, unique=True))
    changed, act = list(lines), data.draw(st.sampled_from(["remove", "swap", "double"]))
    if act == "remove":
        del changed[min(i, j)]  # of those before the last
        if min(i, j) == 0:
            changed[0], changed[1] = changed[1], changed[0]  # the first ones may have been archived: then not in this order
    elif act == "swap":
        changed[i], changed[j] = changed[j], changed[i]
    else:
        changed.insert(j, changed[i])
    assert verdict(tmp_path_factory, b"".join(changed)).problem is not None


def test_lines_that_are_missing_at_the_end_are_found_by_an_earlier_head(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    log = write(path, 5)
    head = f"{log.seq}:{log.head}"
    log.append([entry("learn", KEY, "u")], sync=False)
    log.close()
    assert audit_log.verify(path, head).problem is None
    path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:4]))
    assert audit_log.verify(path).problem is None, "nobody can tell"
    found = audit_log.verify(path, head).problem
    assert found is not None
    assert "removed from its end" in found["problem"]
    with pytest.raises(ConfigError, match="SEQ:HASH"):
        audit_log.verify(path, "yesterday")


def test_a_torn_last_line_is_cut_and_noted_and_the_chain_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "state" / "audit.jsonl"
    World(path.parents[0], audit_log="audit.jsonl").end()
    size = path.stat().st_size
    with path.open("ab") as stream:
        stream.write(b'{"seq":3,"time":"20')
    assert audit_log.verify(path).torn == 19
    Log(path).close()
    assert path.stat().st_size == size + 19, "whoever only looks changes nothing"
    World(path.parents[0], audit_log="audit.jsonl").end()
    assert [e.get("torn_bytes") for e in events(path)] == [0, None, 19, None]
    assert audit_log.verify(path).torn == 0


def test_a_damaged_end_is_not_gone_on_from(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 3).close()
    data = path.read_bytes()
    path.write_bytes(data[:-20] + (b"1" if data[-20:-19] == b"0" else b"0") + data[-19:])
    with pytest.raises(ConfigError, match=r"last line .* is damaged.* audit verify"):
        Log(path)
    assert len(path.read_bytes()) == len(data)


def test_full_files_are_chained(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 10, full=700).close()
    files = audit_log.rotated(path)
    assert len(files) >= 3
    write(path, 5, full=700).close()
    found = audit_log.verify(path)
    assert (found.problem, found.lines, found.first, found.last) == (None, 15, 1, 15)
    files = audit_log.rotated(path)
    files[0].rename(tmp_path / "archived")
    assert audit_log.verify(path).problem is None
    assert audit_log.verify(path).first > 1
    files[2].unlink()
    assert audit_log.verify(path).problem is not None


def test_a_kill_between_two_files_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 4).close()
    path.rename(f"{path}.00001")
    log = write(path, 1)
    log.close()
    assert audit_log.verify(path).lines == log.seq == 5


@pytest.mark.parametrize("step", ["open", "link", "rename"])
def test_where_no_new_file_can_be_begun_the_old_one_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """It stays where it is, locked: no other process can begin one beside it."""
    path = tmp_path / "audit.jsonl"
    real_open = os.open

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(file: Any, flags: int, *args: Any) -> int:
        return fail() if flags & os.O_EXCL else real_open(file, flags, *args)  # type: ignore[return-value]

    with monkeypatch.context() as patch:
        if step == "open":
            patch.setattr(audit_log.os, "open", opened)
        else:
            patch.setattr(Path, {"link": "hardlink_to", "rename": "rename"}[step], fail)
        log = write(path, 10, full=700)
        with pytest.raises(ConfigError, match="another process"):
            Log(path)
        assert sorted(tmp_path.iterdir()) == [path]
    log.append([entry("delete", None, "")], sync=True)
    assert len(audit_log.rotated(path)) == 1
    with pytest.raises(ConfigError, match="another process"):
        Log(path)
    log.close()
    write(path, 2).close()
    found = audit_log.verify(path)
    assert (found.problem, found.lines) == (None, 13)


def test_a_kill_while_a_file_gets_its_new_name_breaks_nothing(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 4).close()
    os.link(path, f"{path}.00001")
    assert audit_log.verify(path).lines == 4
    write(path, 1).close()
    assert sorted(tmp_path.iterdir()) == [path]
    found = audit_log.verify(path)
    assert (found.problem, found.lines) == (None, 5)


def test_two_cannot_write_to_one_log(tmp_path: Path) -> None:
    log = write(tmp_path / "audit.jsonl", 1)
    with pytest.raises(ConfigError, match="another process"):
        Log(tmp_path / "audit.jsonl")
    log.close()
    Log(tmp_path / "audit.jsonl").close()
    with pytest.raises(ConfigError, match="cannot be opened"):
        Log(tmp_path / "nowhere" / "audit.jsonl")
    (tmp_path / "link").symlink_to(tmp_path / "audit.jsonl")
    with pytest.raises(ConfigError, match="cannot be opened"):
        Log(tmp_path / "link")


def test_where_it_is() -> None:
    assert SessionsConfig().audit_path is None
    assert SessionsConfig(audit_log="/x/a").audit_path == Path("/x/a")
    assert SessionsConfig(audit_log="a", state_dir="/s").audit_path == Path("/s/a")
    with pytest.raises(ConfigError, match="full path"):
        _ = parse_config({"sessions": {"audit_log": "a"}}).sessions.audit_path


def test_it_tells_of_everything_and_in_order(tmp_path: Path) -> None:
    world = World(tmp_path / "state", audit_log=str(tmp_path / "audit.jsonl"))
    engine = Engine(world)
    world.use("a", 1.0, 2.0)
    world.save("a")
    world.use("a", 4.0)
    for op, argument in (("freeze", None), ("unfreeze", None), ("rollback", 2), ("fork", "b"), ("export", None)):
        assert isinstance(engine.ask(op, "a", argument), dict), op
    engine.ask("reset", "b")
    engine.ask("delete", "b")
    engine.ask("delete", "a")
    world.end()
    assert told(tmp_path / "audit.jsonl") == [
        "start", "create a", "learn a", "learn a", "learn a", "freeze a", "unfreeze a", "rollback a", "create b", "fork a",
        "export a", "reset b", "delete b", "delete a", "stop",
    ]  # fmt: skip
    found = events(tmp_path / "audit.jsonl")
    assert [e["tokens"] for e in found if e["event"] == "learn"] == [16, 16, 16]
    rollback, fork = (next(e for e in found if e["event"] == name) for name in ("rollback", "fork"))
    assert (rollback["version"], rollback["to_version"]) == (3, 2)
    assert fork["to_uid"] == next(e for e in found if e["event"] == "create" and e["session"] == "b")["uid"]
    reset, deleted = (next(e for e in found if e["event"] == name) for name in ("reset", "delete"))
    assert reset["new_uid"] == deleted["uid"], "a session is followed by its uid"


@pytest.mark.parametrize("op", ["freeze", "fork", "export", "rollback", "reset", "delete"])
def test_what_is_answered_is_in_the_log(tmp_path: Path, op: str) -> None:
    path = tmp_path / "audit.jsonl"
    world = World(tmp_path / "state", audit_log=str(path))
    engine = Engine(world)
    world.use("a", 1.0, 2.0)
    world.save("a")
    engine.ask(op, "a", {"fork": "b", "rollback": 2}.get(op))
    assert told(path)[-1] == f"{op} a", "it is there when the answer is"
    world.end()


def test_the_engine_does_not_rest_while_an_operation_waits_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path / "state", audit_log=str(tmp_path / "audit.jsonl"))
    world.use("a", 1.0)
    world.run()
    log, gate = world.tiers.audit.log, threading.Event()
    assert log is not None
    append = log.append

    def slow(*args: Any) -> None:
        gate.wait(20)
        append(*args)

    monkeypatch.setattr(log, "append", slow)
    answer = admin(Engine(world), "delete", "-", "a")
    deadline = time.monotonic() + 20
    while not world.tiers.audit.busy:
        assert time.monotonic() < deadline
        world.step()
    for _ in range(20):
        world.step()
        assert world.tiers.busy, "nobody would ever answer"
        assert not answer.done()
    gate.set()
    while not answer.done():
        assert world.tiers.busy or answer.done()
        world.step()
    assert answer.result()["ok"]
    world.run()
    assert not world.tiers.busy
    world.end()


def test_what_expires_is_told(tmp_path: Path) -> None:
    world = World(tmp_path / "state", audit_log="audit.jsonl", ttl="1s")
    world.use("a", 1.0)
    world.ledger.sessions[SessionKey("-", "a")].last_used -= 10
    world.tiers.expiry.next_look = 0.0
    world.run()
    world.end()
    assert "expire a" in told(tmp_path / "state" / "audit.jsonl")


def test_where_it_cannot_be_written_nothing_is_done_that_it_cannot_tell_of(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    world = World(tmp_path / "state", audit_log=str(path))
    engine, audit = Engine(world), world.tiers.audit
    world.use("a", 1.0)
    assert audit.log is not None
    before, full = os.dup(audit.log._handle), os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, audit.log._handle)  # from here on, ENOSPC
    world.use("a", 2.0)
    deadline = time.monotonic() + 20
    while not audit.failing:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    with pytest.raises(RequestError, match="audit log cannot be written: No space left"):
        world.use("a", 4.0)
    assert engine.ask("fork", "a", "b") == 503
    assert engine.ask("delete", "a") == 507, "it is done, and nobody says that all is well"
    assert engine.ask("get", "a") == 404
    os.dup2(before, audit.log._handle)
    while audit.failing:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    world.use("c", 1.0)
    world.end()
    assert told(path) == ["start", "create a", "learn a", "learn a", "delete a", "create c", "learn c", "stop"], (
        "no line is lost"
    )


def test_commands_on_a_state_dir_are_told(tmp_path: Path) -> None:
    state, out = tmp_path / "state", tmp_path / "out"
    world = World(state, audit_log="audit.jsonl")
    world.use("a", 1.0)
    world.save("a")

    def run(*args: Any) -> int:
        return CliRunner().invoke(app, ["sessions", *map(str, args)]).exit_code

    assert run("export", state, "a", out) != 0, "the server has the log: it can export, and tell of it"
    assert not out.exists()
    world.end()
    assert run("export", state, "a", out) == run("import", state, "b", out) == run("rm", state, "a") == 0
    assert told(state / "audit.jsonl")[-3:] == ["export a", "import b", "delete a"]
    assert run("move", state, "--to", "somebody") == 0
    assert told(state / "audit.jsonl")[-1] == "move b"
    assert run("move", state, "--from", "somebody", "--to", "") == 0
    World(state).end()  # without a log
    assert run("rm", state, "b") == 0
    assert told(state / "audit.jsonl")[-1] == "move b"


def test_the_command_says_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    write(path, 3).close()
    result = CliRunner().invoke(app, ["audit", "verify", str(path)])
    assert result.exit_code == 0
    assert "ok: lines 1 to 3 in 1 files: 3 learn" in result.stdout
    said = json.loads(CliRunner().invoke(app, ["audit", "verify", str(path), "--json"]).stdout)
    assert (said["ok"], said["lines"], said["events"]) == (True, 3, {"learn": 3})
    assert said["head"] in result.stdout
    assert CliRunner().invoke(app, ["audit", "verify", str(path), "--head", said["head"]]).exit_code == 0
    path.write_bytes(path.read_bytes().replace(b'"tokens":1', b'"tokens":7'))
    result = CliRunner().invoke(app, ["audit", "verify", str(path)])
    assert result.exit_code == 1
    assert f"{path}, line 2: its content is not what its hash says" in result.stdout
    assert isinstance(CliRunner().invoke(app, ["audit", "verify", str(tmp_path / "no")]).exception, ConfigError)
