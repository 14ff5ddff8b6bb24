"""A state dir: what lies where, whether it is ours, its lock and its secret. Imports nothing heavy; every process may use it.

vllm-ttt-state-dir        the marker: without it, nothing in a folder is ours, and nothing is removed there
sessions.db               SQLite: what exists. A file that it does not name does not exist
sessions/ab/abcd...-1f.safetensors   one version of one session; the name is drawn, never a client's
damaged/                  files that were not what had been saved
exports/                  adapters on their way to a client
lock                      held by the server that uses the dir
reserve                   room that is given up where the disk is full: to begin, and to remove sessions
secret                    turns API keys into tenants
servers/                  where several servers share the dir (`sessions.shared`): a heartbeat of each
engine-1/                 with several engines: the second's sessions, in a state dir like this one; the first's are here
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import sqlite3
import stat
import time
from pathlib import Path

from vllm_ttt.errors import ConfigError

#: Of the environment: goes before the secret of the state dir. Not VLLM_*: vLLM warns of such variables that it does not know,
#: and --fail-on-environ-validation refuses them.
SECRET_VARIABLE = "TTT_SECRET"
logger = logging.getLogger(f"vllm.{__name__}")  # vLLM configures the loggers below its own

#: Of the database and of the deltas: 3 since the second version of the learning step.
FORMAT = 3
MARKER = "vllm-ttt-state-dir"
_MARKER_TEXT = (
    f"format {FORMAT}\n"
    "This folder is a state dir of vllm-ttt, which keeps sessions here and removes files of its own here.\n"
    "Do not copy this file into another folder.\n"
)
#: What a fresh file system has.
_NOTHING = {"lost+found"}
#: What is ours below sessions/ and in exports/: a finished file, or the draft of one that was cut off.
_SESSION_FILE = re.compile(r"sessions/([0-9a-f]{2})/\1[0-9a-f]{30}-[0-9a-f]{8}\.safetensors")
_DRAFT = re.compile(r"sessions/([0-9a-f]{2})/\.\1[0-9a-f]{30}-[0-9a-f]{8}\.safetensors\.[0-9a-f]{8}")
#: Of an engine but the first.
_SHELF = re.compile(r"engine-([1-9][0-9]{0,4})")
_SERVER = re.compile(r"[0-9a-f]{16}")
#: What `lock` holds while a server that shares the dir begins, and for how many seconds another one waits for that.
_BEGINS, _PATIENCE = "begins", 60.0
_EXPORT = re.compile(r"vllm-ttt-[0-9a-f]{32}\.safetensors|\.vllm-ttt-[0-9a-f]{32}\.safetensors\.[0-9a-f]{8}")


class StateDir:
    def __init__(self, folder: str | Path):
        self.root = Path(folder).absolute()
        self.database = self.root / "sessions.db"
        self.sessions = self.root / "sessions"
        self.damaged = self.root / "damaged"
        self.exports = self.root / "exports"
        self.servers = self.root / "servers"
        self._lock: int | None = None
        self._searched: int | None = None

    def create(self) -> None:
        """Make a state dir of a folder that is missing or empty, or make what is missing in one of ours; for this user alone.

        Raises:
            ConfigError: it cannot be made, it holds something else, or it is of another release. Nothing was changed then.
        """
        try:
            self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not self.owned():
                self._claim()
            self.check_format()
            for folder in (self.sessions, self.damaged, self.exports):
                folder.mkdir(mode=0o700, exist_ok=True)
            _sync(self.sessions)  # whoever made a folder in it may have been killed before that
            self._close_to_others()
        except OSError as error:
            raise ConfigError(f"the state dir {self.root} cannot be used: {error.strerror or error}") from None

    def owned(self) -> bool:
        """Whether the folder has our marker."""
        with contextlib.suppress(FileNotFoundError):
            return stat.S_ISREG(os.lstat(self.root / MARKER).st_mode)
        return False

    def exists(self) -> bool:
        """Whether there is a database; one that is empty has yet to be made."""
        return self.database.is_file() and self.database.stat().st_size > 0

    def shelf(self, engine: int) -> StateDir:
        """Where an engine of several keeps its sessions: the first one in the dir itself."""
        return self if engine == 0 else StateDir(self.root / f"engine-{engine}")

    def shelves(self) -> list[int]:
        """The engines that have a shelf here, also those of an earlier start, and the first."""
        entries = os.scandir(self.root) if self.root.is_dir() else ()
        found = [int(m[1]) for entry in entries if (m := _SHELF.fullmatch(entry.name)) and entry.is_dir(follow_symlinks=False)]
        return [0, *sorted(engine for engine in found if self.shelf(engine).exists())]

    def check_format(self) -> None:
        """Raise ConfigError where the dir is of another release."""
        found = self._format() if self.owned() else _format_of(self.database)
        if found is None or found == str(FORMAT):
            return
        if found.isdigit() and int(found) > FORMAT:
            todo = "serve it with that release"
        else:
            todo = (
                "its deltas mean nothing to this release, which leaves them untouched. Serve them with the release that made "
                f"them, or start a new state dir: vllm serve MODEL --plugin ttt --ttt-state-dir {self.root}-{FORMAT}"
            )
        raise ConfigError(
            f"the state dir {self.root} was made by another release of vllm-ttt: it has format {found}, and this release "
            f"reads format {FORMAT}; {todo}"
        )

    def lock(self, shared: bool = False) -> bool:
        """Keep every other server out until this process ends; with ``shared``, every one that does not share.

        Returns:
            whether nobody else is in. With ``shared`` nobody comes in then before `share` is called.
        Raises:
            ConfigError: another one is in.
        """
        deadline = time.monotonic() + _PATIENCE
        while True:
            handle = None
            try:
                handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                if alone := _flock(handle, fcntl.LOCK_EX):
                    _say(handle, f"{os.getpid()} {_BEGINS}" if shared else f"{os.getpid()}")
            except OSError as error:  # also a file system that has no locks
                if handle is not None:
                    os.close(handle)
                raise ConfigError(f"the state dir {self.root} cannot be locked: {error.strerror or error}") from None
            if alone or (shared and _flock(handle, fcntl.LOCK_SH)):
                self._lock = handle
                return alone
            holder = os.pread(handle, 32, 0).decode(errors="replace").strip()
            os.close(handle)
            if not (shared and holder.endswith(_BEGINS) and time.monotonic() < deadline):
                who = "servers that share it" if holder == "shared" else f"process {holder or '?'}"
                raise ConfigError(
                    f"the state dir {self.root} is in use by {who}; stop that server, or name another state dir"
                    + " (sessions.shared is for servers that all have it)" * shared
                )
            time.sleep(0.1)

    def share(self) -> None:
        """Let others in that share the dir. Raises ConfigError where one that does not was faster."""
        assert self._lock is not None
        _say(self._lock, "shared")
        if not _flock(self._lock, fcntl.LOCK_SH):
            raise ConfigError(f"the state dir {self.root} was taken by another process just now; start again")

    def shared(self, on: bool) -> None:
        """Make it a dir that several servers share, or one that belongs to one; nobody else is in. Old heartbeats go."""
        with contextlib.suppress(FileNotFoundError):
            for entry in os.scandir(self.servers):
                if _SERVER.fullmatch(entry.name):
                    os.unlink(entry.path)  # noqa: PTH108
        if on:
            self.servers.mkdir(mode=0o700, exist_ok=True)
        else:
            with contextlib.suppress(OSError):
                self.servers.rmdir()

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def new_file(self, uid: str) -> str:
        """A name for the next file of a session, relative to the state dir, that no file ever had; its folder exists."""
        folder = self.sessions / uid[:2]
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
            _sync(self.sessions)
        return f"sessions/{uid[:2]}/{uid}-{secrets.token_hex(4)}.safetensors"

    def path(self, file: str) -> Path:
        """Where a file of the database is. Raises ValueError for a name that leads out of ``sessions/``."""
        path = self.root / file
        if path.parent.parent != self.sessions or ".." in path.parts:
            raise ValueError(f"{file!r} is not the name of a session's file")
        return path

    def files_of(self, uid: str) -> list[Path]:
        """All files of a session that there are, recorded or not: saved, cut off, or set aside."""
        folder = self.sessions / uid[:2]
        return [*folder.glob(f"{uid}-*"), *folder.glob(f".{uid}-*"), *self.damaged.glob(f"{uid}-*")]

    def files(self) -> dict[str, int]:
        """Our files below sessions/, relative to the state dir -> bytes; also those that do not exist for the database."""
        found: dict[str, int] = {}
        for folder in os.scandir(self.sessions) if self.sessions.is_dir() else ():
            if not folder.is_dir(follow_symlinks=False):
                continue
            for entry in os.scandir(folder.path):
                name = f"sessions/{folder.name}/{entry.name}"
                if _SESSION_FILE.fullmatch(name) or _DRAFT.fullmatch(name):
                    with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                        found[name] = entry.stat(follow_symlinks=False).st_size
        return found

    def ages(self) -> list[tuple[str, float]]:
        """When the lock and each of `files` were last written, by the clock of the file system; the lock, just now, first."""
        os.utime(self.root / "lock")
        found = [("lock", (self.root / "lock").stat().st_mtime)]
        for file in self.files():
            with contextlib.suppress(FileNotFoundError):
                found.append((file, (self.root / file).stat().st_mtime))
        return found

    def opened(self) -> int:
        """The database, open to be searched, and never closed: to close it would drop the locks that SQLite has on it here."""
        if self._searched is None:
            self._searched = os.open(self.database, os.O_RDONLY | os.O_CLOEXEC)
        return self._searched

    def remove_exports(self, before: float = float("inf")) -> None:
        """Remove adapters that no client came for, written before that time of the file system. Other files stay."""
        for entry in os.scandir(self.exports):
            if _EXPORT.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                with contextlib.suppress(FileNotFoundError):
                    if entry.stat(follow_symlinks=False).st_mtime < before:
                        os.unlink(entry.path)  # noqa: PTH108

    def set_aside(self, file: str) -> None:
        """Keep a damaged file of ours where nothing looks for it, for a person to look at."""
        if not is_session_file(file):
            return
        path = self.path(file)
        with contextlib.suppress(FileNotFoundError):
            path.rename(self.damaged / path.name)

    def has_secret(self) -> bool:
        """Whether one has been drawn here."""
        return (self.root / "secret").exists()

    def secret(self) -> str:
        """64 hexadecimal digits, drawn when it is first asked for; mode 0600. Raises ConfigError."""
        self.create()
        file = self.root / "secret"
        try:
            if not file.exists():
                with contextlib.suppress(FileExistsError):
                    _write_once(file, secrets.token_hex(32) + "\n")
            found = file.read_text(encoding="ascii").strip()
            if file.stat().st_mode & 0o077:
                raise ConfigError(f"{file} can be read by others; chmod 600 it (or draw a new one: delete it)")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{file} cannot be read or made: {error}") from None
        if len(found) != 64:
            raise ConfigError(f"{file} does not hold 64 hexadecimal digits; restore it from a backup: tenants depend on it")
        return found

    def _format(self) -> str | None:
        """What the marker says; None where somebody made it by hand, and the database must tell."""
        found = re.match(r"format (\d+)\n", (self.root / MARKER).read_text(encoding="ascii", errors="replace"))
        return found.group(1) if found else None

    def _claim(self) -> None:
        """Make the folder ours, if nothing is in it."""
        present = sorted({path.name for path in self.root.iterdir()} - _NOTHING)
        if not present:
            with contextlib.suppress(FileExistsError):  # another server begins at the same time: the lock will tell
                handle = os.open(self.root / MARKER, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
                with open(handle, "w", encoding="ascii") as stream:  # noqa: PTH123
                    stream.write(_MARKER_TEXT)
                    stream.flush()
                    os.fsync(handle)
                _sync(self.root)
            return
        if self.owned():
            return  # the other server was faster
        self.check_format()
        if _format_of(self.database) is not None:
            raise ConfigError(
                f"{self.root} has the database of a state dir, but not its marker, the file {MARKER}; nothing in it was "
                f"touched. If it is a state dir, with nothing else in it, put the marker back: touch {self.root / MARKER}"
            )
        few = ", ".join(present[:4]) + (f" and {len(present) - 4} more" if len(present) > 4 else "")
        raise ConfigError(
            f"{self.root} is no state dir of vllm-ttt, and it is not empty: it holds {few}. Nothing in it was touched. Name a "
            "folder that is empty or missing, or one that became a state dir before (--ttt-state-dir, sessions.state_dir)"
        )

    def _close_to_others(self) -> None:
        """Names, tenants and losses are in here: nobody but the server's user may read them."""
        for folder in (self.root, self.sessions, self.damaged, self.exports):
            mode = stat.S_IMODE(folder.stat().st_mode)
            if mode & 0o077:
                logger.warning("vllm-ttt: %s could be read by others (mode %04o); its mode is 0700 now", folder, mode)
                folder.chmod(0o700)
        # Never opened where it exists: to close it would drop the locks that SQLite has on it in this process.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.database, os.O_RDONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))  # SQLite's: 0644
        if self.database.stat().st_mode & 0o077:
            self.database.chmod(0o600)


def _flock(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _say(handle: int, text: str) -> None:
    line = f"{text}\n".encode()
    os.pwrite(handle, line, 0)  # over what is there, which takes no room
    os.ftruncate(handle, len(line))


def fingerprint(secret: str) -> str:
    """What a state dir remembers of the secret that its tenants are made with: enough to know it again."""
    return hmac.new(secret.encode(), b"vllm-ttt state dir", hashlib.sha256).digest()[:8].hex()


def is_session_file(file: str) -> bool:
    """Whether that is a name that `StateDir.new_file` gives."""
    return _SESSION_FILE.fullmatch(file) is not None


def _format_of(database: Path) -> str | None:
    """The format that a database of ours has; None where there is none, or it is something else. Leaves no trace.

    Not of a database that is open in this process: closing an immutable one drops the locks of the others.
    """
    if not database.is_file():
        return None
    # With a log beside it, that must be read too. Without, `immutable` keeps SQLite from making one.
    how = "mode=ro" if Path(f"{database}-wal").exists() else "mode=ro&immutable=1"
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?{how}", uri=True, timeout=10)) as db:
            (found,) = db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
            return str(found)
    except (sqlite3.Error, TypeError):
        return None


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_once(file: Path, text: str) -> None:
    """Make ``file`` with its content at once; raises FileExistsError where there is one."""
    draft = file.with_name(f".{file.name}-{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, text.encode("ascii"))
        os.fsync(handle)
        os.link(draft, file)
    finally:
        os.close(handle)
        draft.unlink()
