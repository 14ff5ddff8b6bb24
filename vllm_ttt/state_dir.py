"""A state dir: what lies where, its lock and its secret. Imports nothing heavy; every process may use it.

sessions.db               SQLite: what exists. A file that it does not name does not exist
sessions/ab/abcd...-1f.safetensors   one version of one session; the name is drawn, never a client's
damaged/                  files that were not what had been saved
exports/                  adapters on their way to a client
lock                      held by the server that uses the dir
secret                    turns API keys into tenants
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from pathlib import Path

from vllm_ttt.errors import ConfigError


class StateDir:
    def __init__(self, folder: str | Path):
        self.root = Path(folder).absolute()
        self.database = self.root / "sessions.db"
        self.sessions = self.root / "sessions"
        self.damaged = self.root / "damaged"
        self.exports = self.root / "exports"
        self._lock: int | None = None

    def create(self) -> None:
        """Make what is missing, for this user alone. Raises ConfigError where that cannot be."""
        try:
            for folder in (self.root, self.sessions, self.damaged, self.exports):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"the state dir {self.root} cannot be used: {error.strerror or error}") from None

    def exists(self) -> bool:
        return self.database.is_file()

    def lock(self) -> None:
        """Keep every other server out until this process ends. Raises ConfigError where another one is in."""
        try:
            handle = os.open(self.root / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ConfigError(f"the state dir {self.root} cannot be used: {error.strerror or error}") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            raise ConfigError(
                f"the state dir {self.root} is in use by process {holder or '?'}; stop that server, or name another state dir"
            ) from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle

    def unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def new_file(self, uid: str) -> str:
        """A name for the next file of a session, relative to the state dir, that no file ever had; its folder exists."""
        (self.sessions / uid[:2]).mkdir(mode=0o700, exist_ok=True)
        return f"sessions/{uid[:2]}/{uid}-{secrets.token_hex(4)}.safetensors"

    def path(self, file: str) -> Path:
        """Where a file of the database is. Raises ValueError for a name that leads out of ``sessions/``."""
        path = self.root / file
        if path.parent.parent != self.sessions or ".." in path.parts:
            raise ValueError(f"{file!r} is not the name of a session's file")
        return path

    def files(self) -> dict[str, int]:
        """Every file below sessions/, relative to the state dir -> bytes; also those that do not exist for the database."""
        found: dict[str, int] = {}
        for folder in os.scandir(self.sessions):
            if folder.is_dir(follow_symlinks=False):
                for entry in os.scandir(folder.path):
                    with contextlib.suppress(FileNotFoundError):  # it went meanwhile
                        found[f"sessions/{folder.name}/{entry.name}"] = entry.stat(follow_symlinks=False).st_size
            else:
                found[f"sessions/{folder.name}"] = folder.stat(follow_symlinks=False).st_size
        return found

    def set_aside(self, file: str) -> None:
        """Keep a damaged file where nothing looks for it, for a person to look at."""
        path = self.path(file)
        with contextlib.suppress(FileNotFoundError):
            path.rename(self.damaged / path.name)

    def secret(self) -> str:
        """64 hexadecimal digits, drawn when it is first asked for; mode 0600. Raises ConfigError."""
        self.create()
        file = self.root / "secret"
        try:
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
