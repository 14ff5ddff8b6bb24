"""The threads of a server that shares its state dir: one beats, one sees who else is there, and which sessions they want."""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from vllm_ttt.engine.storage import database, leases
from vllm_ttt.engine.storage.leases import Leases
from vllm_ttt.engine.storage.member import BEAT, Member
from vllm_ttt.log import logger_of
from vllm_ttt.state_dir import StateDir
from vllm_ttt.vault import Vault

logger = logger_of(__name__)


@dataclass(frozen=True, slots=True)
class Kept:
    """This server had stopped, and goes on. Of what it was given up to the epoch ``last`` it has what ``sessions`` says."""

    last: int
    sessions: dict[str, int]


class Watch:
    def __init__(self, folder: StateDir, vault: Vault, alone: bool):
        """``alone``: no other server is there. Raises OSError, sqlite3.Error, ConfigError."""
        self.member = Member(folder.servers)
        #: for the engine's thread: what it does not know yet, and sessions that another server has asked for
        self.kept, self.wanted = deque[Kept](), deque[list[str]]()
        self.leases = Leases(vault, self._alive)
        #: wakes the engine's thread, and whether that has something to do
        self.wake: Callable[[], None] = lambda: None
        self.due: Callable[[], bool] = lambda: False
        self._ends = threading.Event()
        self.db = database.connect(folder.database, vault=vault)
        leases.create(self.db, alone)
        self.member.rejoin(self.db)
        self._threads: list[threading.Thread] = []
        self.start()

    def start(self) -> None:
        for do in (self.beat, self.look):
            self._threads.append(threading.Thread(target=self._run, args=(do,), name=f"ttt-{do.__name__}", daemon=True))
            self._threads[-1].start()

    def beat(self) -> None:
        self.member.beat()

    def look(self) -> None:
        """One round, of a second each."""
        if not self.member.alive() or not leases.stands(self.db, self.member.id):
            self.member.rejoin(self.db, self._went_on)
        self.member.look(self.db)
        if wanted := leases.wanted(self.db, self.member.id):
            self.wanted.append(wanted)
        if self.kept or self.wanted or self.due():
            self.wake()

    def _alive(self) -> bool:
        """Whether the engine may answer for what it has: not before it knows what it has lost meanwhile. In this order: what
        makes this server alive again comes after what it has kept."""
        return self.member.alive() and not self.kept

    def _went_on(self, last: int, sessions: dict[str, int]) -> None:
        self.kept.append(Kept(last, sessions))
        logger.warning("vllm-ttt: this server gave no sign of life for a while; it still has %d sessions", len(sessions))

    def leave(self) -> None:
        """Everything has been written: others may have what this server has."""
        self._ends.set()
        for thread in self._threads:
            thread.join(timeout=30)
        try:
            self.member.leave(self.db)
        except (sqlite3.Error, OSError) as error:
            logger.error("vllm-ttt: this server could not give up its sessions: %s; others find it dead in some seconds", error)
        self.db.close()

    def _run(self, do: Callable[[], None]) -> None:
        said = ""
        while not self._ends.wait(BEAT):
            try:
                do()
                said = ""
            except Exception as error:
                if said != (said := f"{type(error).__name__}: {error}"):
                    logger.error("vllm-ttt: the shared state dir cannot be used, this server may stop answering: %s", said)
