"""What it costs to start with another number of engines: the time in which every session is brought to its engine. No model.

    python loadtests/place_sessions.py [--sessions 10000] [--bytes 100000]

A state dir is written with so many sessions, each with one file and as many losses as a session keeps; then a server with 2,
3 and 1 engines would start on it. docs/scale.md has the figures.
"""

from __future__ import annotations

import argparse
import json
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any

from vllm_ttt.engine.storage import records
from vllm_ttt.engine.storage.records import Row, Version
from vllm_ttt.engine.storage.shelves import settle
from vllm_ttt.engine.storage.store import Store
from vllm_ttt.state_dir import StateDir
from vllm_ttt.types import SessionKey

IDENTITY: dict[str, Any] = {"model": {"name": "none", "config": "c", "weights": "w"}, "adapt": {}}
LOSS = {"version": 1, "tokens": 512, "loss": 2.5, "frozen_loss": None, "rate": 0.01, "skipped": None}


def opened(folder: StateDir) -> Store:
    return Store(folder, IDENTITY, 3, 2**40)


def write(root: StateDir, sessions: int, size: int) -> None:
    store, data = opened(root), secrets.token_bytes(size)
    store.reader.execute("BEGIN")
    for i in range(sessions):
        uid = secrets.token_hex(16)
        state: dict[str, Any] = {"version": 1, "losses": [LOSS] * 64}
        file = root.new_file(uid)
        root.path(file).write_bytes(data)
        newest = Version(1, file, size, "0" * 64, 1.0, state)
        records.put(store.reader, Row(uid, SessionKey("-", f"session-{i}"), 1.0, float(i), state, newest), keep=3)
    store.reader.execute("COMMIT")
    store.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--bytes", type=int, default=100_000, help="of each file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = StateDir(Path(folder) / "state")
        write(root, args.sessions, args.bytes)
        for engines in (1, 2, 2, 3, 1):
            began = time.monotonic()
            moved = settle(root, engines, opened)
            print(json.dumps({"engines": engines, "moved": moved, "seconds": round(time.monotonic() - began, 2)}), flush=True)


if __name__ == "__main__":
    main()
