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


@dataclass(frozen=True, slots=True)
class Wanted:
    """Another server has asked for these sessions."""

    sessions: list[str]


class Watch:
    def __init__(self, folder: StateDir, vault: Vault, alone: bool):
        """``alone``: no other server is there. Raises OSError, sqlite3.Error, ConfigError."""
        self.member = Member(folder.servers)
        self.leases = Leases(vault, self.member.alive)
        #: for the engine's thread
        self.events: deque[Kept | Wanted] = deque()
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
            last, sessions = self.member.rejoin(self.db)
            self.events.append(Kept(last, sessions))
            logger.warning("vllm-ttt: this server gave no sign of life for a while; it still has %d sessions", len(sessions))
        self.member.look(self.db)
        if wanted := leases.wanted(self.db, self.member.id):
            self.events.append(Wanted(wanted))
        if self.events or self.due():
            self.wake()

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
