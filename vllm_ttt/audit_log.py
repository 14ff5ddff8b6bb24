"""The audit log as a file: JSON lines, each of which holds the digest of the one before. Imports nothing heavy.

``{"seq": 7, "time": ..., "event": ..., ..., "prev": HEX, "hash": HEX}``. ``hash`` is the SHA-256 of the line's bytes before
``,"hash"``, and ``prev`` the ``hash`` of the line before: what was changed, removed or moved does not fit its neighbours.
Where the file is full it becomes ``NAME.00001``, the next ``NAME.00002``, and the chain goes on in a new one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import secrets
import stat
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vllm_ttt.errors import ConfigError
from vllm_ttt.types import SessionKey

#: A file that has so many bytes is full.
FULL = 64 * 2**20
#: What comes before the first line.
NOTHING = "0" * 64
_HASH, _END = b',"hash":"', b'"}'
#: No line is longer.
_LONGEST = 2**22


class Broken(ConfigError):
    """A line is not what it should be; the message says how."""


@dataclass(slots=True)
class Verdict:
    """What a log holds; ``problem``: the first line that is wrong, and how; None: there is none."""

    lines: int = 0
    files: int = 0
    #: of the first line and of the last
    first: int = 0
    last: int = 0
    head: str = NOTHING
    events: Counter[str] = field(default_factory=Counter)
    #: bytes behind the last whole line: a write that a kill has cut off; the next start removes them
    torn: int = 0
    problem: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "ok": self.problem is None, "lines": self.lines, "files": self.files, "first": self.first, "last": self.last,
            "head": f"{self.last}:{self.head}", "events": dict(self.events), "torn_bytes": self.torn, "problem": self.problem,
        }  # fmt: skip


def entry(event: str, key: SessionKey | None, uid: str, **fields: Any) -> dict[str, Any]:
    """What a line says: what has happened now, and to which session; None: to the server."""
    at = datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    whose = {} if key is None else {"tenant": key.tenant, "session": key.name, "uid": uid}
    return {"time": at, "event": event, **whose, **fields}


class Log:
    """One that is written to. Raises ConfigError where it cannot be, where another process does, or its end is damaged."""

    def __init__(self, path: Path, full: int = FULL):
        self.path, self.full = path, full
        self._handle = self._open()
        try:
            self._lock()
            self.torn = self._find_end()
            #: whether something is behind the last whole line
            self._dirty = self.torn > 0
        except BaseException:
            os.close(self._handle)
            raise

    def append(self, records: list[dict[str, Any]], sync: bool) -> None:
        """Write some, all or none of them; ``sync``: they are on the disk when this returns. Raises OSError."""
        seq, head, lines = self.seq, self.head, []
        for record in records:
            seq += 1
            body = json.dumps({"seq": seq, **record, "prev": head}, separators=(",", ":"))[:-1].encode()
            head = hashlib.sha256(body).hexdigest()
            lines.append(body + _HASH + head.encode() + _END + b"\n")
        data = memoryview(b"".join(lines))
        size = self.size + len(data)
        if self._dirty:
            os.ftruncate(self._handle, self.size)
        self._dirty = True
        while data:
            data = data[os.write(self._handle, data) :]
        if sync:
            os.fsync(self._handle)
        self.seq, self.head, self.size, self._dirty = seq, head, size, False
        if self.size >= self.full:
            with contextlib.suppress(OSError):  # it grows beyond, and the next line tries again
                self._rotate()

    def sync(self) -> None:
        os.fsync(self._handle)

    def close(self) -> None:
        os.close(self._handle)

    def _open(self) -> int:
        try:
            flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
            handle = os.open(self.path, flags, 0o600)
        except OSError as error:
            raise ConfigError(f"the audit log {self.path} cannot be opened: {error.strerror or error}") from None
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise ConfigError(f"the audit log {self.path} is not a plain file")
        return handle

    def _lock(self) -> None:
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(self._handle), self.path.stat()):  # it became full meanwhile
                raise BlockingIOError
            if os.fstat(self._handle).st_nlink > 1:  # a kill has cut off `_rotate`
                for file in [file for file in rotated(self.path) if file.samefile(self.path)]:
                    file.unlink()
        except OSError as error:
            why = "another process writes to it" if isinstance(error, BlockingIOError) else error.strerror
            raise ConfigError(f"the audit log {self.path} cannot be locked: {why}") from None

    def _find_end(self) -> int:
        """Find the last whole line. Returns the bytes behind it, which go when the next one is written."""
        size = os.fstat(self._handle).st_size
        tail = os.pread(self._handle, _LONGEST, max(0, size - _LONGEST))
        whole, _, torn = tail.rpartition(b"\n") if b"\n" in tail else (b"", b"", tail)
        if len(torn) == _LONGEST:
            raise ConfigError(f"the audit log {self.path} is no audit log: {_todo(self.path)}")
        self.size = size - len(torn)
        self.seq, self.head = 0, NOTHING
        if whole:
            self.seq, self.head = self._line(self.path, whole)
        elif earlier := rotated(self.path):
            with earlier[-1].open("rb") as stream:
                stream.seek(max(0, earlier[-1].stat().st_size - _LONGEST))
                self.seq, self.head = self._line(earlier[-1], stream.read().rstrip(b"\n"))
        return len(torn)

    @staticmethod
    def _line(path: Path, text: bytes) -> tuple[int, str]:
        try:
            return parse(text.rpartition(b"\n")[2])[:2]
        except Broken as error:
            raise ConfigError(f"the last line of the audit log {path} is damaged: {error}. {_todo(path)}") from None

    def _rotate(self) -> None:
        """Go on in a new file: all of it, or nothing. At every moment this process has locked what the path names."""
        numbers = [int(file.suffix[1:]) for file in rotated(self.path)]
        os.fsync(self._handle)
        full = Path(f"{self.path}.{max(numbers, default=0) + 1:05d}")
        fresh = Path(f"{self.path}.new-{secrets.token_hex(4)}")
        handle = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            full.hardlink_to(self.path)
            try:
                fresh.rename(self.path)
            except BaseException:
                full.unlink()
                raise
        except BaseException:
            os.close(handle)
            fresh.unlink(missing_ok=True)
            raise
        os.close(self._handle)
        self._handle, self.size = handle, 0
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def rotated(path: Path) -> list[Path]:
    """The files that were full, oldest first."""
    name = re.compile(re.escape(path.name) + r"\.\d{5,}")
    return sorted((f for f in path.parent.iterdir() if name.fullmatch(f.name)), key=lambda f: int(f.suffix[1:]))


def parse(line: bytes) -> tuple[int, str, dict[str, Any]]:
    """The number, the digest and the content of a line. Raises Broken."""
    body, found, end = line.rpartition(_HASH)
    if not found or not re.fullmatch(rb'[0-9a-f]{64}"\}', end):
        raise Broken("it does not end in a hash, as a line of an audit log does")
    digest = end[:64].decode()
    if hashlib.sha256(body).hexdigest() != digest:
        raise Broken("its content is not what its hash says: it was changed")
    try:
        content = json.loads(body + b"}")
        return int(content["seq"]), digest, content
    except (ValueError, KeyError, TypeError, RecursionError):
        raise Broken("it is not JSON with a seq") from None


def verify(path: Path, expect: str | None = None) -> Verdict:
    """Check every line of a log and of the files that were full before it, oldest first.

    Args:
        expect: ``SEQ:HASH``, the head that an earlier check has said: it must be a line of this log. Without it nobody can see
            that lines are missing at the end.
    Raises:
        ConfigError: there is no such file, or ``expect`` is none.
    """
    if expect is not None and not re.fullmatch(r"\d+:[0-9a-f]{64}", expect):
        raise ConfigError(f"{expect!r} is no head: it is SEQ:HASH, as `vllm-ttt audit verify` says it")
    verdict, wanted = Verdict(), {expect} if expect is not None and not expect.startswith("0:") else set()
    try:
        full = [file for file in rotated(path) if not (path.exists() and file.samefile(path))]
        for file in [*full, path]:
            verdict.files += 1
            for number, line, whole in _lines(file):
                if not whole and file == path:
                    verdict.torn = len(line)
                    break
                try:
                    seq, digest, content = parse(line)
                    _follows(verdict, seq, content)
                except Broken as error:
                    verdict.problem = {"file": str(file), "line": number, "problem": str(error)}
                    return verdict
                verdict.first = verdict.first or seq
                verdict.last, verdict.head, verdict.lines = seq, digest, verdict.lines + 1
                verdict.events[str(content.get("event"))] += 1
                wanted.discard(f"{seq}:{digest}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    if wanted:
        seq, why = int(wanted.pop().partition(":")[0]), "another is there"
        if seq > verdict.last:
            why = f"it ends with line {verdict.last}: lines were removed from its end"
        elif seq < verdict.first:
            why = f"it begins with line {verdict.first}: check it together with the files that were archived"
        problem = f"line {seq} with the expected hash is not in it: {why}"
        verdict.problem = {"file": str(path), "line": 0, "problem": problem}
    return verdict


def _follows(verdict: Verdict, seq: int, content: dict[str, Any]) -> None:
    prev = content.get("prev")
    if not verdict.lines:
        if seq == 1 and prev != NOTHING:
            raise Broken("it is line 1, and yet names one before it")
        return  # what came before may have been archived elsewhere
    if seq != verdict.last + 1:
        raise Broken(f"it is line {seq} of the log, and comes after line {verdict.last}: some were removed, added or swapped")
    if prev != verdict.head:
        raise Broken("it does not follow the line before it, which was changed")


def _lines(file: Path) -> Iterator[tuple[int, bytes, bool]]:
    """The number of each line in its file, its bytes, and whether it is whole."""
    with file.open("rb") as stream:
        for number, line in enumerate(iter(lambda: stream.readline(_LONGEST), b""), 1):
            yield number, line.removesuffix(b"\n"), line.endswith(b"\n")


def _todo(path: Path) -> str:
    return f"`vllm-ttt audit verify {path}` says more. To begin a new one, move it elsewhere, and keep it"
