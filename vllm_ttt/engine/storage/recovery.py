"""What is done with the files of a state dir when a server begins, after a stop of any kind."""

from __future__ import annotations

import contextlib
import sqlite3

from vllm_ttt.engine.storage import records
from vllm_ttt.errors import ConfigError
from vllm_ttt.log import logger_of
from vllm_ttt.state_dir import StateDir

logger = logger_of(__name__)

#: Seconds after which a file that is not recorded is nobody's any more, where other servers write too.
_OLD = 3600.0


def recover(db: sqlite3.Connection, folder: StateDir) -> None:
    """Remove what was never recorded, and fall back where a file is gone or cut short. Nobody else uses the state dir.

    Raises ConfigError, and changes nothing, where all files are gone.
    """
    recorded, present = records.files(db), folder.files()
    if recorded and not recorded.keys() & present.keys():
        raise ConfigError(
            f"the state dir {folder.root} has a sessions.db that names {len(recorded)} files of sessions, and none of them is "
            "there: bring the folder sessions back (is something to be mounted there?), or, if they are lost, let the sessions "
            f"begin anew: vllm-ttt sessions fsck {folder.root} --repair"
        )
    leftovers = [file for file in present if file not in recorded]
    for file in leftovers:
        (folder.root / file).unlink(missing_ok=True)
    folder.remove_exports()
    lost = [file for file, (_, _, size) in recorded.items() if present.get(file) != size]
    for file in lost:
        with db:
            db.execute("BEGIN IMMEDIATE")
            records.without(db, recorded[file][0], file)
        folder.set_aside(file)
        logger.error("vllm-ttt: %s is gone or was cut short; its session falls back to the version before", file)
    sessions = db.execute("SELECT count(*) FROM sessions").fetchone()[0]
    logger.info(
        "vllm-ttt: state dir %s: %d sessions, %d files; %d leftovers of cut-off saves removed, %d damaged set aside",
        folder.root, sessions, len(recorded) - len(lost), len(leftovers), len(lost),
    )  # fmt: skip


def sweep(db: sqlite3.Connection, folder: StateDir) -> None:
    """The same where other servers are at work: what is old and not recorded is removed.

    Nothing is recorded meanwhile, and later nothing whose file is not there (`Store.put`).
    """
    (_, now), *files = folder.ages()
    folder.remove_exports(now - _OLD)
    old = [file for file, written in files if now - written > _OLD]
    with db:
        db.execute("BEGIN IMMEDIATE")
        recorded = records.files(db)
        leftovers = [file for file in old if file not in recorded]
        for file in leftovers:
            with contextlib.suppress(OSError):
                (folder.root / file).unlink()
    logger.info("vllm-ttt: state dir %s is shared; %d leftovers of cut-off saves removed", folder.root, len(leftovers))
