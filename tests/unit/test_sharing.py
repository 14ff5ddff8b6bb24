"""Two servers on one state dir: a session goes from one to the other, and is never had by both. The engine's and the worker's
side of both are the real ones; their clock is the test's."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from test_admin import Engine
from world import World

from vllm_ttt.engine.admin import admin
from vllm_ttt.engine.life import sharing
from vllm_ttt.engine.storage import database, member, recovery
from vllm_ttt.engine.storage.failures import Moved
from vllm_ttt.engine.storage.member import BEAT, DEAD, STOP
from vllm_ttt.engine.storage.watch import Watch
from vllm_ttt.errors import ConfigError, RequestError
from vllm_ttt.sessions.offline import Offline
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit


class Servers:
    """Some that share a dir, and the clock by which they beat."""

    def __init__(self, folder: Path):
        self.folder, self.time, self.all = folder, 0.0, list[World]()

    def start(self, **options: Any) -> World:
        world = World(self.folder, shared=True, **options)
        self.all.append(world)
        return world

    def kill(self, world: World) -> None:
        """SIGKILL."""
        world.crash()
        self.all.remove(world)

    def end(self, world: World) -> None:
        world.end()
        self.all.remove(world)

    def passes(self, seconds: float, but: World | None = None) -> None:
        """Time in which all beat and look, ``but`` one that is stopped."""
        for _ in range(int(seconds / BEAT)):
            self.time += BEAT
            for world in self.all:
                if world is not but:
                    watch = world.store.watch
                    assert watch is not None
                    watch.beat()
                    watch.look()
                    world.run()


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Servers]:
    found = Servers(tmp_path / "s")
    monkeypatch.setattr(member, "now", lambda: found.time)
    monkeypatch.setattr(Watch, "start", lambda self: None)
    monkeypatch.setattr(sharing, "GRACE", 0.0)
    yield found
    for world in found.all:
        world.crash()


def claim(world: World, name: str, tenant: str = "-") -> bool:
    return ask(world, "claim", name, tenant=tenant)["result"]["held"]


def ask(world: World, op: str, name: str, argument: Any = None, tenant: str = "-") -> dict[str, Any]:
    answer = admin(Engine(world), op, tenant, name, argument)
    return world.wait(answer) if isinstance(answer, Future) else answer


def stop_its_clock(servers: Servers, world: World) -> None:
    """It does not notice that time passes."""
    stands = servers.time
    assert world.store.watch is not None
    world.store.watch.member.clock = lambda: stands


def take_over(servers: Servers, one: World, two: World) -> None:
    """``one`` is stopped until ``two`` has found it dead, has its session a, and has learned and saved it."""
    servers.passes(DEAD + 3, but=one)
    assert claim(two, "a")
    two.use("a", 2.0)
    two.save("a")


def test_of_files_that_another_server_removes_nothing_is_kept_in_memory(servers: Servers) -> None:
    one, two = servers.start(), servers.start(keep_versions=1)
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    gone = {str(file.relative_to(servers.folder)) for file in (servers.folder / "sessions").glob("*/*")}
    take_over(servers, one, two)
    files = list((servers.folder / "sessions").glob("*/*"))
    assert len(files) == 1
    assert gone
    assert not gone & one.store.sizes.keys()
    assert two.store.bytes == files[0].stat().st_size


def test_a_session_is_had_by_one(servers: Servers) -> None:
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    assert not claim(two, "a")
    with pytest.raises(RequestError) as refused:
        two.ledger.open(SessionKey("-", "a"))
    assert (refused.value.status, refused.value.retry_after) == (409, 2)
    assert claim(two, "b")
    two.use("b", 2.0)


def test_one_that_is_idle_is_handed_over_with_all_that_it_has_learned(servers: Servers) -> None:
    """It was not saved before: nobody had asked for that."""
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    one.use("a", 1.0, 2.0)
    assert not claim(two, "a")
    servers.passes(2)
    assert claim(two, "a")
    assert two.value("a") == 3.0
    assert SessionKey("-", "a") not in one.ledger.sessions
    assert not claim(one, "a"), "and back only when it is asked for"
    servers.passes(2)
    assert claim(one, "a")
    assert one.use("a").version == 2


def test_one_that_is_in_use_stays(servers: Servers) -> None:
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    session = one.use("a", 1.0)
    session.requests.add("r")
    assert not claim(two, "a")
    servers.passes(5)
    assert not claim(two, "a")
    session.requests.discard("r")
    servers.passes(2)
    assert claim(two, "a")


def test_after_a_kill_what_was_saved_is_served_by_the_other(servers: Servers) -> None:
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    one.use("a", 8.0)
    servers.kill(one)
    servers.passes(DEAD - 1)
    assert not claim(two, "a")
    servers.passes(3)
    assert claim(two, "a")
    assert two.value("a") == 1.0


def test_a_server_that_ends_leaves_nothing_to_wait_for(servers: Servers) -> None:
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    servers.end(one)
    assert claim(two, "a")
    assert two.value("a") == 1.0


@pytest.mark.parametrize("noticed", [True, False])
def test_a_server_that_was_stopped_writes_nothing_of_what_others_have(servers: Servers, noticed: bool) -> None:
    """It finds that by itself, or, where its own clock stood still as well, when it writes."""
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    assert claim(one, "mine")
    for name in ("a", "mine"):
        one.use(name, 1.0)
        one.save(name)
        one.use(name, 10.0)
    session = one.use("a")
    session.requests.add("r")
    if not noticed:
        stop_its_clock(servers, one)
    take_over(servers, one, two)

    refused = len(one.refused)
    if noticed:
        assert not one.store.leases.alive()  # type: ignore[union-attr]
        one.tiers.check()
        assert (one.refused[refused].status, one.refused[refused].retry_after) == (409, 2)
        with pytest.raises(Moved):
            one.ledger.open(SessionKey("-", "a"))
    else:
        with pytest.raises(Moved):
            one.save("a")
        one.run()
        assert isinstance(one.refused[refused], Moved)
    servers.passes(2)
    assert SessionKey("-", "a") not in one.ledger.sessions
    assert not session.requests
    assert two.value("a") == 3.0
    servers.passes(2)
    assert claim(two, "a")


def test_a_server_that_goes_on_answers_when_it_knows_what_it_has_lost(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not answer at the moment at which others can see that it is alive again."""
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    take_over(servers, one, two)
    watch = one.store.watch
    assert watch is not None
    before, unlink, seen = watch.member.id, Path.unlink, list[bool]()

    def while_it_goes_on(path: Path, **how: Any) -> None:
        if path.name == before:  # the other thread is about to remove the old heartbeat
            seen.append(claim(one, "a"))
            with pytest.raises(Moved):
                one.ledger.open(SessionKey("-", "a"))
        unlink(path, **how)

    monkeypatch.setattr(Path, "unlink", while_it_goes_on)
    watch.look()
    assert seen == [False]
    one.run()
    assert watch.member.alive()
    assert not claim(one, "a")
    assert claim(one, "b")


def test_what_nobody_has_taken_meanwhile_stays(servers: Servers) -> None:
    """A state dir that could not be reached for a while costs what has been learned nothing."""
    one = servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    servers.time += STOP + 1
    with pytest.raises(Moved):
        one.ledger.open(SessionKey("-", "a"))
    assert not claim(one, "a")
    servers.passes(1)
    assert claim(one, "a")
    assert one.value("a") == 1.0
    one.save("a")


def test_calls_are_fenced_too(servers: Servers) -> None:
    one, two = servers.start(), servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    stop_its_clock(servers, one)
    take_over(servers, one, two)
    for op, argument in (("delete", None), ("reset", None), ("freeze", None), ("rollback", 1), ("save", None)):
        answer = ask(one, op, "a", argument)
        assert (answer["status"], answer["retry_after"]) == (409, 2), op
        one.run()
    assert ask(two, "get", "a")["result"]["saved_version"] == 2
    assert ask(one, "get", "a")["result"]["saved_version"] == 2, "anybody may look"


def test_a_deletion_holds_everywhere_and_a_fork_needs_both(servers: Servers) -> None:
    one, two = servers.start(), servers.start()
    assert claim(one, "source")
    one.use("source", 1.0)
    assert ask(one, "fork", "source", "copy")["status"] == 409
    assert claim(one, "copy")
    assert ask(one, "fork", "source", "copy")["ok"]
    assert not claim(two, "copy")
    servers.passes(2)
    assert claim(two, "copy")
    assert two.value("copy") == 1.0
    receipt = ask(two, "delete", "copy")["result"]
    assert (receipt["deleted"], receipt["database_wiped"], receipt["files_left"]) == (True, True, [])
    assert not claim(one, "copy")
    servers.passes(2)
    assert claim(one, "copy")
    assert one.use("copy").version == 0


def test_what_nobody_uses_is_released(servers: Servers, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = servers.start(limit=1), servers.start()
    monkeypatch.setattr(sharing, "LINGER", 0.0)
    for name in "ab":
        assert claim(one, name)
        one.use(name, 1.0)
        one.save(name)
    one.tiers.sharing.next_look = 0.0  # type: ignore[union-attr]
    one.run()
    assert claim(two, "a"), "it is on disk alone"
    assert not claim(two, "b")


def test_tenants_and_keys(servers: Servers, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(secrets.token_bytes(32))
    key.chmod(0o600)
    one, two = (servers.start(key_file=str(key)) for _ in range(2))
    assert claim(one, "a", "first")
    assert claim(two, "a", "second")
    one.use("a", 1.0, tenant="first")
    two.use("a", 2.0, tenant="second")
    servers.end(one)
    assert claim(two, "a", "first")
    assert (two.value("a", "first"), two.value("a", "second")) == (1.0, 2.0)


def test_places_are_counted_over_all_servers(servers: Servers) -> None:
    one, two = (servers.start(per_key=2) for _ in range(2))
    for name in "ab":
        assert claim(one, name)
        one.use(name, 1.0)
        one.save(name)
    for world in (one, two):
        world.tiers.sharing.next_count = 0.0  # type: ignore[union-attr]
        world.tiers.check()
    assert claim(two, "c")
    with pytest.raises(RequestError, match="at most 2"):
        two.use("c")
    assert ask(one, "delete", "a")["ok"]
    two.tiers.sharing.next_count = 0.0  # type: ignore[union-attr]
    two.tiers.check()
    two.use("c", 1.0)


def test_room_is_that_of_all_servers(servers: Servers) -> None:
    one = servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    size = one.store.bytes
    two = servers.start(disk=2 * size)
    for name, fits in (("b", True), ("c", False)):
        assert claim(two, name)
        two.use(name, 1.0)
        if fits:
            two.save(name)
        else:
            with pytest.raises(RequestError, match="disk_gib"):
                two.save(name)
    assert two.store.bytes == 2 * size


def test_what_nobody_has_used_for_long_is_removed_by_who_may(servers: Servers) -> None:
    one = servers.start()
    for name in ("old", "had"):
        assert claim(one, name)
        one.use(name, 1.0)
        one.save(name)
    one.store.reader.execute("UPDATE sessions SET last_used = 0")
    two = servers.start(ttl="1h")
    servers.all.remove(one)  # it is there, and is asked for nothing
    servers.passes(1)
    assert ask(two, "get", "had")["ok"], "another server has it"
    one.end()
    two.tiers.expiry.next_look = 0.0
    two.store.reader.execute("UPDATE sessions SET last_used = 0")
    two.run()
    assert not two.store.count()


def test_a_server_that_does_not_share_keeps_out_and_is_kept_out(servers: Servers) -> None:
    one = servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    for shut_out in (lambda: World(servers.folder), lambda: Offline(servers.folder).remove("a")):
        with pytest.raises(ConfigError, match="servers that share it"):
            shut_out()
    servers.end(one)
    alone = World(servers.folder)
    assert alone.value("a") == 1.0
    assert not StateDir(servers.folder).servers.exists()
    assert alone.store.reader.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    with pytest.raises(ConfigError, match="in use by process"):
        servers.start()
    alone.end()
    again = servers.start()
    assert again.store.reader.execute("PRAGMA journal_mode").fetchone()[0] == "truncate"
    assert claim(again, "a")
    assert again.value("a") == 1.0


def test_leftovers_of_a_kill_are_removed_and_what_others_write_is_not(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = servers.start()
    old, fresh = (one.store.folder.root / one.store.folder.new_file(secrets.token_hex(16)) for _ in range(2))
    for file in (old, fresh):
        file.write_bytes(b"x")
    hour = time.time() - recovery._OLD - 60
    os.utime(old, (hour, hour))
    servers.start()
    assert (old.exists(), fresh.exists()) == (False, True)
    # Should it have been wrong, nothing is recorded that is not there.
    assert claim(one, "a")
    session = one.use("a", 1.0)
    put = one.store.put

    def late(row: Any) -> Future:
        one.store.discard(row.newest.file)
        return put(row)

    monkeypatch.setattr(one.store, "put", late)
    with pytest.raises(RequestError, match="leftover"):
        one.save("a")
    assert session.unsaved
    monkeypatch.undo()
    assert one.value("a") == 1.0


def test_reading_beside_it_leaves_its_journal(servers: Servers) -> None:
    one = servers.start()
    assert claim(one, "a")
    one.use("a", 1.0)
    one.save("a")
    assert [row["session_id"] for row in Offline(servers.folder).list()] == ["a"]
    database.connect(StateDir(servers.folder).database, readonly=True).close()
    assert not (servers.folder / "sessions.db-wal").exists()


def test_a_server_beats_looks_and_leaves_by_itself(tmp_path: Path) -> None:
    """With the threads and the clock that it has in earnest."""
    world, woken = World(tmp_path / "s", shared=True), threading.Event()
    watch = world.store.watch
    assert watch is not None
    beat, first = watch.member.folder / watch.member.id, b"%020d\n" % 0
    assert claim(world, "a")
    watch.wake = woken.set
    other = database.connect(world.store.folder.database)
    other.execute("UPDATE leases SET wanted = 1")
    assert woken.wait(20), "nobody looks who wants a session"
    deadline = time.monotonic() + 20
    while beat.read_bytes() == first:
        assert time.monotonic() < deadline, "it does not beat"
        time.sleep(0.05)
    world.end()
    assert not beat.exists()
    assert other.execute("SELECT (SELECT count(*) FROM leases), (SELECT count(*) FROM servers)").fetchone() == (0, 0)
    other.close()
    assert not [thread for thread in threading.enumerate() if thread in watch._threads]
