"""Servers that share a state dir, as objects on one real folder and database: whatever is killed, stopped or late, and however
fast their clocks run, a session is answered by one of them at a time, and no acknowledged save is lost."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from vllm_ttt.engine.storage import database, leases
from vllm_ttt.engine.storage.failures import Moved
from vllm_ttt.engine.storage.leases import Leases
from vllm_ttt.engine.storage.member import DEAD, STOP, Member
from vllm_ttt.types import SessionKey

pytestmark = pytest.mark.unit

SESSIONS = [SessionKey("-", name) for name in "ab"]
SERVERS = st.integers(0, 2)
WHAT = st.sampled_from(["claim", "learn", "save", "save", "release"])


class Server:
    """What of a server touches the folder, in steps between which anything may happen."""

    def __init__(self, root: Path, clock: Any):
        self.root = root
        self.db = database.connect(root / "sessions.db")
        self.member = Member(root / "servers", clock)
        self.leases = Leases(alive=self.member.alive)
        self.member.rejoin(self.db)
        #: the newest number of each session that it has learned, and what it is in the middle of
        self.memory: dict[SessionKey, int] = {}
        self.doing: Iterator[None] | None = None
        self.stopped = False

    def write(self, do: Any) -> Any:
        self.db.execute("BEGIN IMMEDIATE")
        try:
            found = do(self.db)
            self.db.execute("COMMIT")
        except BaseException:
            self.db.execute("ROLLBACK")
            raise
        return found

    def look(self) -> None:
        """As `Watch.look`, and what the engine does then."""
        if not self.member.alive() or not leases.stands(self.db, self.member.id):
            self.member.rejoin(self.db, self.went_on)
        self.member.look(self.db)

    def went_on(self, last: int, kept: dict[str, int]) -> None:
        for key in self.leases.went_on(last, kept):
            del self.leases.held[key]
            self.memory.pop(key, None)

    def answers(self, key: SessionKey) -> bool:
        return key in self.memory and self.leases.holds(key)


class Shared(RuleBasedStateMachine):
    @initialize(rates=st.lists(st.sampled_from([0.95, 1.0, 1.05]), min_size=3, max_size=3))
    def begin(self, rates: list[float]) -> None:
        self.folder = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        self.root, self.time, self.rates = Path(self.folder.name), 1000.0, rates
        (self.root / "servers").mkdir()
        with contextlib.closing(database.connect(self.root / "sessions.db")) as db:
            database.create(db, {})
            leases.create(db, alone=True)
            db.execute("CREATE TABLE saved (session TEXT PRIMARY KEY, file TEXT)")
        self.numbers = itertools.count(1)
        #: of each session, the newest number whose save was answered
        self.acknowledged = dict.fromkeys(SESSIONS, 0)
        #: whose each epoch is
        self.owners: dict[int, Server] = {}
        self.servers: list[Server | None] = [self.server(i) for i in range(3)]

    def server(self, i: int) -> Server:
        return Server(self.root, lambda: 1e6 * i + self.rates[i] * self.time)

    def teardown(self) -> None:
        for server in getattr(self, "servers", ()):
            if server is not None:
                server.db.close()
        if hasattr(self, "folder"):
            self.folder.cleanup()

    def running(self, i: int) -> Server | None:
        server = self.servers[i]
        return None if server is None or server.stopped else server

    # What befalls the servers.

    @rule(seconds=st.sampled_from([0.5, 1.0, STOP - 1, STOP, DEAD, 60.0]))
    def time_passes(self, seconds: float) -> None:
        self.time += seconds

    @rule(seconds=st.integers(1, 12))
    def all_is_well_for(self, seconds: int) -> None:
        for _ in range(seconds):
            self.time += 1.0
            for i in range(3):
                self.beat(i)
                self.look(i)

    @rule(i=SERVERS)
    def kill(self, i: int) -> None:
        if (server := self.servers[i]) is not None:
            server.db.close()
            self.servers[i] = None

    @rule(i=SERVERS)
    def start(self, i: int) -> None:
        if self.servers[i] is None:
            self.servers[i] = self.server(i)

    @rule(i=SERVERS)
    def leave(self, i: int) -> None:
        if (server := self.running(i)) is not None and server.doing is None:
            server.member.leave(server.db)
            self.kill(i)

    @rule(i=SERVERS, stopped=st.booleans())
    def stop_or_go_on(self, i: int, stopped: bool) -> None:
        if (server := self.servers[i]) is not None:
            server.stopped = stopped

    @rule(i=SERVERS)
    def beat(self, i: int) -> None:
        if (server := self.running(i)) is not None:
            server.member.beat()

    @rule(i=SERVERS)
    def look(self, i: int) -> None:
        if (server := self.running(i)) is not None:
            server.look()

    # What clients do.

    @rule(i=SERVERS, key=st.sampled_from(SESSIONS), what=WHAT)
    def ask(self, i: int, key: SessionKey, what: str) -> None:
        if (server := self.running(i)) is not None and server.doing is None:
            server.doing = getattr(self, f"do_{what}")(server, key)

    @rule(i=SERVERS, steps=st.integers(1, 4))
    def go_on(self, i: int, steps: int) -> None:
        for _ in range(steps):
            if (server := self.running(i)) is not None and server.doing is not None:
                try:
                    next(server.doing)
                except StopIteration:
                    server.doing = None

    @precondition(lambda self: hasattr(self, "servers"))
    @rule(i=SERVERS, key=st.sampled_from(SESSIONS))
    def serve(self, i: int, key: SessionKey) -> None:
        """All of it at once: most of what happens is no accident."""
        for what in ("claim", "learn", "save"):
            self.ask(i, key, what)
            self.go_on(i, 4)

    @precondition(lambda self: hasattr(self, "servers"))
    @rule(
        i=SERVERS, j=SERVERS, key=st.sampled_from(SESSIONS), steps=st.integers(0, 3), what=WHAT,
        held=st.booleans(), looks=st.booleans(), goes_on=st.booleans(),
    )  # fmt: skip
    def stop_in_the_middle(
        self, i: int, j: int, key: SessionKey, steps: int, what: str, held: bool, looks: bool, goes_on: bool
    ) -> None:
        """For so long that others take over; then it goes on as if nothing had happened."""
        if held:
            self.serve(i, key)
        self.ask(i, key, what)
        self.go_on(i, steps)
        self.stop_or_go_on(i, True)
        self.all_is_well_for(12)
        self.serve(j, key)
        self.stop_or_go_on(i, False)
        if looks:
            self.look(i)
        if goes_on:
            self.go_on(i, 4)

    def do_claim(self, server: Server, key: SessionKey) -> Iterator[None]:
        if key in server.leases.held or not server.member.alive():
            return
        session, id = server.leases.session(key), server.member.id
        yield
        with contextlib.suppress(Moved):
            epoch = server.write(lambda db: leases.claim(db, id, session))
            if epoch is None or key in server.leases.held:
                return
            assert self.owners.setdefault(epoch, server) is server, "two have had one epoch"
            yield
            if not server.leases.granted(key, epoch):
                return
            found = server.db.execute("SELECT file FROM saved WHERE session = ?", (session,)).fetchone()
            server.memory[key] = int((self.root / found[0]).read_text()) if found else 0
            assert server.memory[key] >= self.acknowledged[key], "an acknowledged save is lost"
            yield

    def do_learn(self, server: Server, key: SessionKey) -> Iterator[None]:
        if server.answers(key):
            server.memory[key] = next(self.numbers)
        yield

    def do_save(self, server: Server, key: SessionKey) -> Iterator[None]:
        if not server.answers(key):
            return
        number, session = server.memory[key], server.leases.session(key)
        file = f"{session[:8]}-{next(self.numbers)}"

        def record(db: sqlite3.Connection) -> None:
            db.execute("INSERT OR REPLACE INTO saved VALUES (?, ?)", (session, file))

        write = server.leases.fenced(key, record)
        (self.root / f".{file}").write_text(str(number))
        yield
        (self.root / f".{file}").rename(self.root / file)
        yield
        try:
            server.write(write)
        except Moved:
            server.leases.held.pop(key, None)
            server.memory.pop(key, None)
            return
        yield
        self.acknowledged[key] = max(self.acknowledged[key], number)

    def do_release(self, server: Server, key: SessionKey) -> Iterator[None]:
        if (lease := server.leases.held.pop(key, None)) is not None:
            del server.memory[key]
            yield
            server.write(lambda db: leases.release(db, [lease.epoch]))

    @invariant()
    def one_answers(self) -> None:
        for key in SESSIONS:
            serving = [s for s in getattr(self, "servers", ()) if s is not None and s.answers(key)]
            assert len(serving) <= 1, f"{len(serving)} servers answer for {key}"

    @invariant()
    def what_is_acknowledged_is_there(self) -> None:
        if not hasattr(self, "servers"):
            return
        with contextlib.closing(sqlite3.connect(self.root / "sessions.db")) as db:
            for key in SESSIONS:
                found = db.execute("SELECT file FROM saved WHERE session = ?", (Leases().session(key),)).fetchone()
                assert (int((self.root / found[0]).read_text()) if found else 0) >= self.acknowledged[key]


TestShared = Shared.TestCase


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[tuple[list[float], Server, Server]]:
    """A clock, and two servers."""
    (tmp_path / "servers").mkdir()
    with contextlib.closing(database.connect(tmp_path / "sessions.db")) as db:
        database.create(db, {})
        leases.create(db, alone=True)
    clock = [0.0]
    one, two = (Server(tmp_path, lambda: clock[0]) for _ in range(2))
    yield clock, one, two
    one.db.close()
    two.db.close()


def take(server: Server, key: SessionKey) -> int | None:
    epoch = server.write(lambda db: leases.claim(db, server.member.id, server.leases.session(key)))
    if epoch is not None:
        server.leases.granted(key, epoch)
    return epoch


def test_the_dead_are_found_in_time_and_the_living_never(pair: tuple[list[float], Server, Server]) -> None:
    clock, one, two = pair
    assert take(one, SESSIONS[0]) == 1
    for _ in range(100):
        clock[0] += 1.0
        for server in (one, two):
            server.member.beat()
            server.look()
    assert take(two, SESSIONS[0]) is None
    began = clock[0]  # one is killed here
    while take(two, SESSIONS[0]) is None:
        clock[0] += 1.0
        two.member.beat()
        two.look()
    assert STOP < clock[0] - began <= DEAD + 2
    assert not one.member.alive()


def test_who_stopped_goes_on_with_what_nobody_has_taken(pair: tuple[list[float], Server, Server]) -> None:
    clock, one, two = pair
    epochs = [take(one, key) for key in SESSIONS]
    clock[0] += STOP
    one.member.beat()
    assert not one.member.alive(), "a beat that comes too late counts"
    one.memory = dict.fromkeys(SESSIONS, 1)
    one.look()
    assert one.member.alive()
    assert [lease.epoch for lease in one.leases.held.values()] == epochs
    assert take(two, SESSIONS[0]) is None


def test_a_server_that_was_buried_alive_writes_nothing(pair: tuple[list[float], Server, Server]) -> None:
    """Its clock stood still meanwhile, as that of a machine that was moved: it believes that it is well."""
    clock, one, two = pair
    take(one, SESSIONS[0])
    one.member.clock = lambda: 0.0
    two.look()
    clock[0] += DEAD
    two.member.rejoin(two.db)
    two.look()
    assert take(two, SESSIONS[0]) == 2
    assert one.member.alive()
    with pytest.raises(Moved):
        one.write(one.leases.fenced(SESSIONS[0], lambda db: pytest.fail("it was written")))
    with pytest.raises(Moved):
        take(one, SESSIONS[1])
    one.member.beat()
    assert not one.member.alive()
    one.memory[SESSIONS[0]] = 1
    one.look()
    assert not one.leases.held
    two.write(two.leases.fenced(SESSIONS[0], lambda db: None))


def test_epochs_are_never_given_again(pair: tuple[list[float], Server, Server]) -> None:
    """Also when nobody has a session any more, and after a start with an empty table."""
    _, one, _ = pair
    first = take(one, SESSIONS[0])
    assert first is not None
    one.write(lambda db: leases.release(db, [first]))
    assert take(one, SESSIONS[0]) == first + 1
    leases.create(one.db, alone=True)
    one.member.rejoin(one.db)
    assert take(one, SESSIONS[1]) == first + 2


def test_who_cannot_take_part_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on a disk that is full nor beside a database that cannot be had: it tries again each second."""
    member, db = Member(tmp_path), sqlite3.connect(":memory:", isolation_level=None)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        member.rejoin(db)
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        member.rejoin(db)
    assert not list(tmp_path.iterdir())
    held = [str(handle.readlink()) for handle in Path("/proc/self/fd").iterdir() if handle.is_symlink()]
    assert not [file for file in held if file.startswith(str(tmp_path))]
    assert not member.alive()
