"""Room that is kept aside in a state dir, so that on a full disk a server can begin, and sessions can be removed."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from vllm_ttt.engine.storage.failures import store_error

T = TypeVar("T")

#: Bytes: what SQLite needs to open a database and to record that something is removed, and some more.
_BYTES = 2**18


def keep(root: Path) -> None:
    """Keep some room in the state dir ``root``, where there is any."""
    file = root / "reserve"
    try:
        handle = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError:
        return  # it is there, or there is no room for a name
    try:
        os.posix_fallocate(handle, 0, _BYTES)
    except OSError:
        file.unlink(missing_ok=True)
    finally:
        os.close(handle)


def using(root: Path, do: Callable[[], T]) -> T:
    """``do``, and where it finds no room, once more with that of the reserve: `keep` what is left of it afterwards."""
    try:
        return do()
    except (sqlite3.Error, OSError) as error:
        if not (store_error(error).everywhere and _give(root)):
            raise
    return do()


def _give(root: Path) -> bool:
    """Whether there was any."""
    try:
        (root / "reserve").unlink()
    except OSError:
        return False
    return True
