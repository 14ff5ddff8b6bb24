"""What becomes of sessions, in the audit log: written by a thread, so that no step waits for it. No content, and no key."""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from concurrent.futures import Future
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from vllm_ttt.audit_log import Log, entry
from vllm_ttt.config import SessionsConfig
from vllm_ttt.errors import RequestError
from vllm_ttt.log import logger_of

if TYPE_CHECKING:
    from vllm_ttt.engine.ledger import Session
    from vllm_ttt.engine.life.operations import Steps
    from vllm_ttt.engine.requests import Attached

logger = logger_of(__name__)

#: Seconds after which a line is on the disk for which nobody waits; and to the next try where the log cannot be written.
_SYNC = 1.0


def open_audit(sessions: SessionsConfig) -> Audit:
    """The log that the settings name, or one that notes nothing. Raises ConfigError."""
    return Audit(None if (path := sessions.audit_path) is None else Log(path))


class Audit:
    def __init__(self, log: Log | None = None):
        """``log`` None: nothing is noted."""
        self.log = log
        #: why the log cannot be written; "" while it can
        self.failing = ""
        self._queue: queue.SimpleQueue[tuple[dict[str, Any], Future | None] | None] = queue.SimpleQueue()
        #: what operations wait for, in order
        self._awaited: deque[Future] = deque()
        self._thread = threading.Thread(target=self._run, name="ttt-audit", daemon=True)
        if log is not None:
            self._thread.start()
            self._put(None, "start", {"vllm_ttt": version("vllm-ttt"), "torn_bytes": log.torn})

    def note(self, event: str, session: Session, **fields: Any) -> None:
        """Something has happened to a session."""
        if self.log is not None:
            self._put(session, event, fields)

    def created(self, session: Session) -> None:
        """The session takes a place of its key, perhaps not for the first time."""
        if self.log is not None and session.noted != session.uid:
            session.noted = session.uid
            self._put(session, "create", {})

    def served(self, attached: Attached) -> None:
        """A request of a session leaves the engine."""
        if attached.started:
            end = attached.request.get_finished_reason()
            self.note(
                "serve", attached.session, request=attached.request.request_id, version=attached.version,
                prompt_tokens=attached.prompt, generated_tokens=attached.outputs, end="abort" if end is None else str(end),
            )  # fmt: skip

    def durable(self, event: str, session: Session, **fields: Any) -> Steps:
        """Part of an operation: the same, and it is on the disk when the operation goes on."""
        if self.log is not None:
            self._put(session, event, fields, done := Future())
            self._awaited.append(done)
            yield done

    @property
    def busy(self) -> bool:
        """Whether an operation waits for the disk."""
        while self._awaited and self._awaited[0].done():
            self._awaited.popleft()
        return bool(self._awaited)

    def check(self) -> None:
        """Raise RequestError (503) where the log cannot be written: what it cannot tell of is not done."""
        if self.failing:
            raise RequestError(f"the audit log cannot be written: {self.failing}; nothing is done that it cannot tell of", 503)

    def close(self) -> None:
        """Write what is left, and that the server ends. A second call does nothing."""
        if self.log is not None and self._thread.is_alive():
            self._put(None, "stop", {})
            self._queue.put(None)
            self._thread.join(timeout=10)

    def _put(self, session: Session | None, event: str, fields: dict[str, Any], done: Future | None = None) -> None:
        key, uid = (None, "") if session is None else (session.key, session.uid)
        self._queue.put((entry(event, key, uid, **fields), done))

    def _run(self) -> None:
        assert self.log is not None
        waiting: list[tuple[dict[str, Any], Future | None]] = []
        synced, ending = True, False
        while not ending:
            fresh = self._take(None if synced and not waiting else _SYNC)
            ending = None in fresh
            waiting += [item for item in fresh if item is not None]
            try:
                if waiting:
                    urgent = ending or any(done is not None for _, done in waiting)
                    self.log.append([record for record, _ in waiting], urgent)
                    synced = urgent
                elif not synced:
                    self.log.sync()
                    synced = True
                self.failing = ""
            except OSError as error:
                waiting = self._failed(error, waiting)
                time.sleep(0 if ending else _SYNC)
                continue
            for done in [done for _, done in waiting if done is not None]:
                done.set_result(None)
            waiting = []
        self.log.close()

    def _take(self, timeout: float | None) -> list[tuple[dict[str, Any], Future | None] | None]:
        """What is queued; where there is nothing, wait for it."""
        try:
            found = [self._queue.get(timeout=timeout)]
        except queue.Empty:
            return []
        while not self._queue.empty():
            found.append(self._queue.get())
        return found

    def _failed(self, error: OSError, waiting: list[Any]) -> list[tuple[dict[str, Any], Future | None]]:
        """The lines are kept, and written when they can be. Who waits is told so when it has failed twice."""
        first, self.failing = not self.failing, error.strerror or str(error)
        if first:
            logger.error("vllm-ttt: the audit log cannot be written: %s; sessions are refused until it can", error)
            return waiting
        for _, done in waiting:
            if done is not None:
                message = f"this was done, but the audit log cannot tell of it yet: {self.failing}"
                done.set_exception(RequestError(message, 507))
        return [(record, None) for record, _ in waiting]
