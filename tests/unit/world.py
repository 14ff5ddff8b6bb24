"""The engine's and the worker's side of sessions on disk, for real, without vLLM: only learning and serving are stand-ins."""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vllm_ttt.config import GuardConfig, SessionsConfig, TTTConfig
from vllm_ttt.engine.guarded import Guarded
from vllm_ttt.engine.ledger import Ledger, Session
from vllm_ttt.engine.life.tiers import Tiers
from vllm_ttt.engine.limits.quotas import Quotas
from vllm_ttt.engine.limits.trust import Trust
from vllm_ttt.engine.storage import database
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.errors import RequestError
from vllm_ttt.geometry import Geometry
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import ChunkReport, SessionKey, StepReport, Trial
from vllm_ttt.vault import Vault
from vllm_ttt.worker.clock import Clock
from vllm_ttt.worker.deltas import peft
from vllm_ttt.worker.deltas.masters import Deltas, WorkerSession
from vllm_ttt.worker.deltas.versions import Versions, keep, restore
from vllm_ttt.worker.files import Files
from vllm_ttt.worker.guard.guard import Guard
from vllm_ttt.worker.guard.probe import Probe
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.step.micro_step import Tail

D, Q, F, R = 8, 12, 16, 4
CHUNK = 16
GEOMETRY = Geometry(layer=1, rank=R, seed=0, hidden=D, attention=Q, feed_forward=F)
IDENTITY: dict[str, Any] = {
    "model": {"name": "tiny", "config": "c", "weights": "w"},
    "adapt": {"rank": R, "seed": 0, "layers": 1, "modules": ["o_proj", "gate_up_proj", "down_proj"]},
    "geometry": GEOMETRY.to_json(),
    "dtype": "bfloat16",
}
#: Of a fresh session, and after so many chunks.
RATE = 0.012


def rate_after(version: int) -> float:
    return RATE + version / 1024


class FakeTrainer:
    """Learning a chunk adds the next number of a sequence to B; the last update and the rate count chunks: what a session holds
    says what it learned, in order."""

    def __init__(self, rows: int):
        zeros, drawn = torch.zeros, peft.projections(GEOMETRY, torch.bfloat16)
        tail = Tail(
            zeros(D, Q), zeros(2 * F, D), zeros(D, F), zeros(10, D), torch.ones(D), torch.ones(D), 1e-5, 1e-5,
            drawn[Q], drawn[D], drawn[F], dict.fromkeys("ogud", 1.0),
        )  # fmt: skip
        self.deltas, self.dtype, self.report = Deltas(tail, rows, RATE), torch.bfloat16, StepReport()
        self.flying: set[int] = set()
        clock, self.versions = Clock(torch.device("cpu")), Versions(3, 1, 2**30)
        self.guard = Guard(GuardConfig(), tail, Probe(1, zeros(1, D), zeros(1, Q)), self.versions, clock)

    def learn(self, key: int, value: float) -> None:
        row = self.deltas.row(key)
        assert row is not None
        session, master = self.deltas.session(key), self.deltas.masters.row(row)
        session.version += 1
        session.rate = rate_after(session.version)
        for b, u in zip(master.delta.tensors(), master.last.tensors(), strict=True):
            b += value
            u.fill_(session.version)
        master.rate_S.fill_(session.rate)
        self.guard.committed(key)
        if self.versions.due(key):
            self.versions.add(key, session.version, keep(self.deltas, key))
        self.report.chunks.append(
            ChunkReport(key, "r", CHUNK, 1.0, None, None, CHUNK * session.version, session.version, session.rate)
        )

    def in_flight(self, key: int) -> bool:
        return key in self.flying

    def collect(self, wait: bool = False) -> None:
        """There is nothing under way."""

    def copy(self, key: int, to: int) -> int:
        return Trainer.copy(self, key, to)  # type: ignore[arg-type]  # the real one, on these parts

    def resume(self, key: int, session: WorkerSession, untried: int, good: WorkerSession | None) -> None:
        Trainer.resume(self, key, session, untried, good)  # type: ignore[arg-type]  # likewise

    def roll_back(self, key: int, version: int) -> bool:
        if (kept := self.versions.find(key, version)) is None:
            return False
        restore(self.deltas, key, version, kept)
        self.versions.cut(key, version)
        return True

    def drop(self, key: int) -> None:
        self.deltas.drop(key)
        self.versions.drop(key)
        self.guard.drop(key)


class Unguarded(Guarded):
    """Whatever is wrong in a hook is wrong in the test."""

    def __call__(self, hook: Callable[..., Any], *args: Any) -> Any:
        return hook(*args)

    def failed(self, what: str) -> None:
        raise AssertionError(f"{what} failed") from sys.exc_info()[1]


class World:
    """A server's sessions on a state dir."""

    def __init__(self, folder: Path, limit: int = 3, disk: int = 2**40, rows: int = 2, **config: Any):
        settings: dict[str, Any] = {"autosave": 3600.0, **config}
        self.config = SessionsConfig(state_dir=str(folder), **settings)
        vault = Vault.of(self.config.key_file)
        self.store = Store(StateDir(folder), IDENTITY, self.config.keep_versions, disk, None, vault, self.config.shared)
        database.name_audit_log(self.store.reader, self.config.audit_log)
        quotas = Quotas(10**9, self.config.per_key, store=self.store)
        self.ledger = Ledger(100, limit, quotas, 8, self.store)
        self.tiers = Tiers(self.ledger, self.config, self.store, self.give_up, guard=Unguarded())
        assert self.tiers.saves is not None
        self.saves = self.tiers.saves
        self.trainer = FakeTrainer(rows)
        self.files: Any = Files(self.trainer, GEOMETRY, "tiny", vault)  # type: ignore[arg-type]
        self.refused: list[RequestError] = []

    def give_up(self, session: Session, error: RequestError) -> None:
        self.refused.append(error)
        session.requests.clear()

    def step(self) -> None:
        """One step of the engine: orders out, reports in."""
        self.tiers.check()
        self.files.step(self.tiers.take_orders())
        report, self.trainer.report = self.trainer.report, StepReport()
        counted = 0
        for file in self.files.take_reports():
            if file.outcome == "taken":
                self._count(report.chunks[counted : file.chunks])
                counted = file.chunks
            self.tiers.read(file)
        self._count(report.chunks[counted:])

    def run(self, until: Any = None) -> None:
        """Step until ``until()``, or until there is nothing to be done."""
        deadline = time.monotonic() + 20
        while not until() if until else self.tiers.busy:
            assert time.monotonic() < deadline, "it does not come to rest"
            self.step()
            time.sleep(0.0005)

    def use(self, name: str, *learn: float, tenant: str = "-") -> Session:
        """A request of a session, which learns some chunks; it has left the engine when this returns."""
        session = self.ledger.open(SessionKey(tenant, name))
        session.requests.add("r")
        self.tiers.changes(session)
        self.run(lambda: self.tiers.ready(session) or self.refused)
        session.tokens_seen += CHUNK * len(learn)
        for value in learn:
            self.trainer.learn(session.adapter, value)
            self.step()
        session.requests.discard("r")
        self.tiers.left(session)
        return session

    def value(self, name: str, tenant: str = "-", imported: bool = False) -> float:
        """What the session's delta holds, brought back where it must be; its update and its rate are those of its
        version, or where it was ``imported``, none and the server's own."""
        session = self.use(name, tenant=tenant)
        master = self.trainer.deltas.read(session.adapter)
        known = self.trainer.deltas.session(session.adapter)
        assert known.version == session.version
        counted = 0 if imported else known.version
        assert master.rate_S.item() == np.float32(known.rate) == np.float32(rate_after(counted))
        assert {x for t in master.last.tensors() for x in t.flatten().tolist()} == {counted}
        values = {x for t in master.delta.tensors() for x in t.flatten().tolist()}
        assert len(values) == 1
        return values.pop()

    def wait(self, future: Future) -> Any:
        self.run(future.done)
        return future.result()

    def worker(self, method: str, *args: Any) -> Any:
        """What the worker answers to an operation."""
        if method == "ttt_copy":
            return self.trainer.copy(*args)
        if method == "ttt_session":
            return {"tier": "memory", "bytes": 1, "tokens_pending": 0, "norm": {}, "versions": self.trainer.versions.of(*args)}
        assert method == "ttt_roll_back"
        return None if self.trainer.roll_back(*args) else self.trainer.versions.of(args[0])

    def go_back(self, session: Session, version: int) -> Future:
        return self.tiers.owner.go_back(session, version, self.worker)

    def guard_stops(self, session: Session, tried: int, back_to: int) -> None:
        """The guard has returned the session, and the engine core hears of it as of any trial."""
        assert self.trainer.roll_back(session.adapter, back_to)
        Trust(TTTConfig()).tried(session, Trial(session.adapter, tried, 1.0, back_to))
        self.tiers.changes(session)

    def save(self, name: str) -> Any:
        session = self.ledger.find(SessionKey("-", name))
        assert session is not None
        saved = self.wait(self.tiers.save(session))
        self.tiers.left(session)
        return saved

    def crash(self) -> None:
        """Let go of everything, as if the process had been killed: nothing is saved."""
        self.store._turns.put(None)
        self.store._thread.join()
        self.store.reader.close()
        if self.store.watch is not None:
            self.store.watch.db.close()
        self.store.folder.unlock()
        self.tiers.audit.close()
        self.files.writer.shutdown()
        self.files.reader.shutdown()

    def end(self) -> None:
        """As SIGTERM does."""
        self.tiers.close()
        self.run()
        self.tiers.end()
        self.files.writer.shutdown()
        self.files.reader.shutdown()

    def _count(self, chunks: list[ChunkReport]) -> None:
        for chunk in chunks:
            if (session := self.ledger.by_adapter.get(chunk.session)) is not None:
                self.ledger.record(session, chunk)
                session.version = chunk.version
                self.tiers.changes(session)


def killed(life: Callable[[], None]) -> None:
    """``life``, in a process of its own that ends then as by SIGKILL."""
    if (child := os.fork()) == 0:
        try:
            life()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
