"""Moves sessions between memory and files, beside the serving: snapshots between two iterations, threads for the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from vllm_ttt.config import CacheConfig
from vllm_ttt.geometry import Geometry
from vllm_ttt.log import logger_of
from vllm_ttt.types import FileOrder, FileReport
from vllm_ttt.vault import PLAIN, Vault
from vllm_ttt.worker.delta import Delta, State
from vllm_ttt.worker.deltas import delta_file, peft
from vllm_ttt.worker.deltas.delta_file import CACHE, UPDATE
from vllm_ttt.worker.deltas.masters import WorkerSession
from vllm_ttt.worker.learn.trainer import Trainer
from vllm_ttt.worker.ngrams import stream as streams
from vllm_ttt.worker.ngrams.ngrams import NGrams
from vllm_ttt.worker.ranks import Channel

logger = logger_of(__name__)


@dataclass(slots=True)
class Snapshot:
    """A session as it is written. ``tensors`` are on the host once ``mark`` is done; None: fresh."""

    tensors: State | None
    mark: Any
    state: dict[str, Any]
    ngrams: NGrams | None
    #: the last version, up to this one, that the guard found good
    good: int


class _GoneError(Exception):
    """The version that is to be saved is not kept any more."""


class _AbsentError(Exception):
    """The session is not in memory: on no rank."""


class Files:
    """``step`` runs between iterations and never raises. No thread and no memory before the first order."""

    def __init__(
        self, trainer: Trainer, geometry: Geometry, base_model: str, vault: Vault = PLAIN, cache: CacheConfig | None = None
    ):
        """``vault``: what files are sealed with."""
        self.cache = cache or CacheConfig()
        self.trainer, self.deltas, self.geometry, self.base_model = trainer, trainer.deltas, geometry, base_model
        self.clock, self.vault = trainer.deltas.clock, vault
        #: orders that wait until the outcome of a step of their session is known
        self.waiting: list[FileOrder] = []
        self.running: list[tuple[FileOrder, Future]] = []
        self.reports: list[FileReport] = []
        # Three, so that who waits for a session to come back does not wait for others to be saved, nor those for exports.
        self.writer = ThreadPoolExecutor(1, "ttt-write")
        self.reader = ThreadPoolExecutor(1, "ttt-read")
        self.exporter = ThreadPoolExecutor(1, "ttt-export")
        #: of several ranks each has a part of a session, and the first has the files; a thread speaks to those of its name
        self.ranks = trainer.deltas.tail.ranks
        self.written, self.loaded, self.exported = (self.ranks.channel() for _ in range(3))

    @property
    def idle(self) -> bool:
        return not (self.waiting or self.running)

    def step(self, orders: list[FileOrder]) -> None:
        """Begin what can be begun, and take in what is done."""
        waiting, self.waiting = [*self.waiting, *orders], []
        for order in waiting:
            try:
                self._begin(order)
            except _GoneError as error:
                self.reports.append(FileReport(order.action, order.session, order.path, "gone", error=str(error)))
            except Exception as error:
                if not isinstance(error, _AbsentError):
                    self.ranks.failed(f"{order.action} of a session could not begin here")
                logger.exception("vllm-ttt: %s of a session failed", order.action)
                self._failed(order, error)
        if not self.running:
            return
        outcomes = self.ranks.agree("which files are done", lambda: [_outcome(future) for _, future in self.running])
        running, self.running = self.running, []
        for outcome, (order, future) in zip(outcomes, running, strict=True):
            if outcome is None:
                self.running.append((order, future))
            else:
                self._end(order, future, outcome)

    def take_reports(self) -> list[FileReport]:
        reports, self.reports = self.reports, []
        return reports

    def _begin(self, order: FileOrder) -> None:
        if order.action == "drop":
            self.trainer.drop(order.session)
        elif order.action == "load":
            self._run(self.reader, order, self._load, order)
        elif order.action == "check":
            self._run(self.reader, order, self._check, order)
        elif self.trainer.in_flight(order.session):
            self.waiting.append(order)
        else:
            session = self.deltas.sessions.get(order.session)
            if session is None and order.action == "save" and order.version != 0:
                raise _AbsentError("the session is not in memory")
            session = session or self.deltas.fresh()
            snapshot = self._snapshot(order.session, session) if order.version is None else self._kept(order, session)
            version = snapshot.state["version"]
            counted = len(self.trainer.report.chunks)
            self.reports.append(FileReport(order.action, order.session, order.path, "taken", version, counted))
            if order.action == "save":
                self._run(self.writer, order, self._save, order, snapshot)
            elif order.action == "digest":
                self._run(self.reader, order, self._digest, order, snapshot)
            else:
                self._run(self.exporter, order, self._export, order, snapshot)

    def _run(self, pool: ThreadPoolExecutor, order: FileOrder, job: Callable[..., Any], *args: Any) -> None:
        self.running.append((order, pool.submit(job, *args)))

    def _snapshot(self, key: int, session: WorkerSession) -> Snapshot:
        state = {**session.to_state(), "untried": self.trainer.guard.untried(key)}
        # Copied in the stream of the steps: before any later step, and without waiting for it.
        tensors = self.deltas.to_host(key)
        mark = self.clock.mark() if key in self.deltas.rows else session.copied
        return Snapshot(tensors, mark, state, session.ngrams, self.trainer.versions.last_good(key))

    def _kept(self, order: FileOrder, session: WorkerSession) -> Snapshot:
        """The session as it was at an earlier version. Raises _GoneError where that is not kept, or not any more."""
        assert order.version is not None
        if (kept := self.trainer.versions.find(order.session, order.version)) is None:
            raise _GoneError(f"version {order.version} is not kept any more")
        state, since = self.deltas.fresh().to_state() | {"version": order.version}, session.version - order.version
        if kept.rate is not None:
            state |= {"rate": kept.rate, "norms": kept.norms}
        state["untried"] = max(0, self.trainer.guard.untried(order.session) - since)
        if kept.ngrams is not None:
            state["cache"] = kept.ngrams.to_state()
        good = self.trainer.versions.last_good(order.session)
        return Snapshot(kept.state, self.clock.mark(), state, kept.ngrams, good if good <= order.version else 0)

    def _end(self, order: FileOrder, future: Future, outcome: bool) -> None:
        """``outcome``: whether the first rank could do it."""
        error = future.exception()  # another rank may wait here: its thread is a little behind
        self.ranks.note(order.session, outcome)
        if error is not None and outcome:
            self.ranks.failed(f"{order.action} of a session failed here alone: {error}")
        if error is not None:
            self._failed(order, error)
            return
        report, session = future.result()
        if session is not None and outcome:
            self.trainer.resume(order.session, *session)
        self.reports.append(report)

    def _failed(self, order: FileOrder, error: BaseException) -> None:
        damaged = isinstance(error, delta_file.FileError | FileNotFoundError)
        outcome = "damaged" if damaged and order.action in ("load", "check") else "failed"
        text, number = getattr(error, "strerror", None) or str(error), getattr(error, "errno", None) or 0
        self.reports.append(FileReport(order.action, order.session, order.path, outcome, error=text, errno=number))

    # In a thread.

    def _save(self, order: FileOrder, snapshot: Snapshot) -> tuple[FileReport, None]:
        metadata = {**order.metadata, "state": json.dumps(snapshot.state)}
        found = self._read(snapshot, self.written)
        if found is None:
            return self._nothing(order, snapshot), None
        delta = self._named(found.delta)
        tensors = delta | self._named(found.last, UPDATE)
        if snapshot.ngrams is not None:
            tensors[CACHE] = torch.from_numpy(snapshot.ngrams.stream.copy())
        path = Path(order.path)
        data = self.vault.seal(delta_file.encode(tensors, metadata), path.name)
        checksum, digest = delta_file.write(path, data), delta_file.digest(delta)
        report = FileReport("save", order.session, order.path, "done", snapshot.state["version"], bytes=len(data))
        return replace(report, good=snapshot.good, checksum=checksum, digest=digest), None

    def _digest(self, order: FileOrder, snapshot: Snapshot) -> tuple[FileReport, None]:
        found = self._read(snapshot, self.loaded)
        if found is None:
            return self._nothing(order, snapshot), None
        digest = delta_file.digest(self._named(found.delta))
        return FileReport("digest", order.session, order.path, "done", snapshot.state["version"], digest=digest), None

    def _load(self, order: FileOrder) -> tuple[FileReport, tuple[WorkerSession, int, WorkerSession | None]]:
        session, untried, metadata = self._read_file(order.path, order.checksum)
        good = None if untried else session
        if order.good is not None and untried:
            try:
                good = self._read_file(*order.good)[0]
            except (delta_file.FileError, OSError) as error:
                logger.error("vllm-ttt: the last good version of a session cannot be read, it goes on without: %s", error)
        report = FileReport("load", order.session, order.path, "done", session.version, metadata=metadata)
        return report, (session, untried, good)

    def _read_file(self, path: str, checksum: str) -> tuple[WorkerSession, int, dict[str, str]]:
        """A session as a file has it, its commits that the guard has not tried, and the file's metadata."""
        load = lambda: delta_file.load(Path(path), checksum, self.geometry, self.vault)  # noqa: E731
        tensors, metadata = self.loaded.tell(load)
        state = json.loads(metadata["state"])
        session = self.deltas.revive(state)
        if (stream := tensors.pop(CACHE, None)) is not None:
            session.ngrams = self._ngrams(stream, state)
        pinned = torch.Tensor.pin_memory if self.clock.cuda else lambda x: x
        like = self.deltas.masters.delta
        like = like.by(like.thin, like.wide.new_empty(0, *like.wide.shape[1:2], self.geometry.feed_forward, like.wide.shape[3]))
        delta, last = (
            self._part(Delta.of(like, [tensors[name + end] for name in self.geometry.shapes])) for end in ("", UPDATE)
        )
        session.host = State(delta, last, torch.tensor([session.rate]))
        session.host = session.host.by(*map(pinned, session.host.tensors()))
        return session, int(state.get("untried", 0)), metadata

    def _check(self, order: FileOrder) -> tuple[FileReport, None]:
        def read() -> int:
            _, metadata = delta_file.load(Path(order.path), order.checksum, self.geometry, self.vault)
            return json.loads(metadata["state"])["version"]

        return FileReport("check", order.session, order.path, "done", self.loaded.tell(read)), None

    def _export(self, order: FileOrder, snapshot: Snapshot) -> tuple[FileReport, None]:
        metadata = {**order.metadata, "version": str(snapshot.state["version"])}
        tail = self.deltas.tail
        found = self._read(snapshot, self.exported)
        if found is None:
            return self._nothing(order, snapshot), None
        served = {width: a.cpu() for width, a in tail.projections.items()}
        tensors = self._named(found.delta)
        path = Path(order.path)
        key = Vault(bytes.fromhex(order.key) if order.key else None)
        data = key.seal(peft.adapter(tail.exported(tensors), served, self.geometry, self.base_model, metadata), path.name)
        delta_file.write(path, data)
        report = FileReport("export", order.session, order.path, "done", snapshot.state["version"], bytes=len(data))
        return replace(report, digest=delta_file.digest(tensors), metadata={"rate": str(snapshot.state["rate"])}), None

    def _ngrams(self, stream: torch.Tensor, state: dict[str, Any]) -> NGrams:
        if not streams.valid(stream.numpy(), self.deltas.tail.vocabulary):
            raise delta_file.FileError("its cache has tokens that the model does not have")
        try:
            return NGrams.revive(stream.numpy(), state.get("cache", ()), self.cache)
        except ValueError as error:
            raise delta_file.FileError(str(error)) from None

    def _read(self, snapshot: Snapshot, channel: Channel) -> State | None:
        """Whole; None on all ranks but the first."""
        with self.ranks.alike("a session could not be brought together here"):  # the others' threads would wait for this one
            if snapshot.mark is not None:
                self.clock.wait(snapshot.mark)
            found = snapshot.tensors or self.deltas.fresh_on_host()
            if self.ranks.size == 1:
                return found
            wide, updates = channel.gather(found.delta.wide), channel.gather(found.last.wide)
        if wide is None or updates is None:
            return None
        delta, last = (x.by(x.thin, torch.cat(parts, 2)) for x, parts in ((found.delta, wide), (found.last, updates)))
        return State(delta, last, found.rate_S)

    def _part(self, delta: Delta) -> Delta:
        """This rank's of a whole one."""
        return delta if self.ranks.size == 1 else delta.by(delta.thin, self.ranks.part(delta.wide, 2).contiguous())

    def _nothing(self, order: FileOrder, snapshot: Snapshot) -> FileReport:
        """What another rank than the first reports, which nobody reads."""
        return FileReport(order.action, order.session, order.path, "done", snapshot.state["version"])

    def _named(self, delta: Delta, end: str = "") -> dict[str, torch.Tensor]:
        """One session's matrices by the names of `Geometry.shapes`, with ``end`` behind each."""
        named = zip(self.geometry.shapes, delta.matrices(), strict=True)
        return {name + end: matrix.contiguous() for name, matrix in named}


def _outcome(future: Future) -> bool | None:
    """Whether it could be done; None: it is not over yet."""
    return future.exception() is None if future.done() else None
