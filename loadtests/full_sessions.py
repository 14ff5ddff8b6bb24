"""What many full sessions cost: a page of a long list, and removals. Over HTTP.

    python loadtests/full_sessions.py [--sessions 10000] [--asked 50]

One session learns until it has as many losses and as much history as a session keeps. The server is stopped, and its rows are
written again under other names, and its file as hard links: each of the sessions is one that has learned as much. Then the
server is started on them, and asked for the first page: of 100 sessions, and of 500, which is the default. Then some sessions
are removed at once, while another one is saved. A base answer is decoded all the while: told is its time between two tokens,
alone and beside. The state dir is on a file system in memory where there is one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import secrets
import sqlite3
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx
from load.texts import Texts
from runs import EAGER, HERE, about, save, served

CONFIG: dict[str, Any] = {"sessions": {"resident": 4, "keep_versions": 1}, "learn": {"chunk": 64}}
#: Requests of the session, each longer by so many tokens, until its lists of losses and of history are full.
TURNS, TURN = 140, 70
#: Sessions that are removed at once.
REMOVED = 30


def grow(url: str) -> dict[str, Any]:
    """The session, full and saved."""
    texts = Texts(url, "demo", {})
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:
        ids = [token for _, document in texts.documents for token in document]
        for turn in range(TURNS):
            at = turn * TURN % (len(ids) - TURN)
            prompt = ids[at : at + TURN]
            http.post("/v1/completions", json={"model": "demo", "prompt": prompt, "max_tokens": 1, "session_id": "full"})
        while (state := http.get("/v1/ttt/sessions/full").json())["tokens_pending"] or state["requests_open"]:
            time.sleep(0.1)
        http.post("/v1/ttt/sessions/full/save").raise_for_status()
        return http.get("/v1/ttt/sessions/full").json()


def multiply(state: Path, count: int) -> int:
    """So many sessions of one; returns the bytes of what is recorded of each."""
    with contextlib.closing(sqlite3.connect(state / "sessions.db")) as db, db:
        (row,) = db.execute("SELECT * FROM sessions").fetchall()
        (version,) = db.execute("SELECT * FROM versions").fetchall()
        for i in range(count - 1):
            uid = secrets.token_hex(16)
            file = f"sessions/{uid[:2]}/{uid}-{secrets.token_hex(4)}.safetensors"
            (state / file).parent.mkdir(mode=0o700, exist_ok=True)
            os.link(state / version[2], state / file)
            mine = (uid, row[1], f"full-{i}", row[3], row[4] - i, *row[5:])
            db.execute("INSERT INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?)", mine)
            db.execute("INSERT INTO versions VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (uid, version[1], file, *version[3:]))
        return sum(len(str(x)) for x in (*row[5:], *version[6:]))


def decode(url: str, end: threading.Event, gaps: list[float]) -> None:
    """Base answers, one after the other, until the end."""
    body = {"model": "demo", "prompt": "In the beginning", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:
        while not end.is_set():
            last = 0.0
            with http.stream("POST", "/v1/completions", json=body) as stream:
                for line in stream.iter_lines():
                    if line.startswith("data: {"):
                        now = time.perf_counter()
                        if last:
                            gaps.append(now - last)
                        last = now


@contextlib.contextmanager
def decoding(url: str, gaps: list[float]) -> Any:
    end = threading.Event()
    thread = threading.Thread(target=decode, args=(url, end, gaps))
    thread.start()
    try:
        yield
    finally:
        end.set()
        thread.join()


def asked(url: str, limit: int, count: int) -> list[float]:
    took = []
    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:
        for _ in range(count):
            began = time.perf_counter()
            page = http.get("/v1/ttt/sessions", params={"limit": limit}).json()
            took.append(time.perf_counter() - began)
            assert len(page["sessions"]) == limit
            assert page["next"]
    return took


def removed(url: str, count: int) -> list[float]:
    """Remove so many sessions at once; how long a save took that was asked for behind them, and then all of them."""
    with httpx.Client(base_url=url, timeout=600, trust_env=False) as http, ThreadPoolExecutor(count) as pool:
        body = {"model": "demo", "prompt": "In the beginning there was something to learn.", "session_id": "saved"}
        http.post("/v1/completions", json=body).raise_for_status()
        began = time.perf_counter()
        remove = lambda i: httpx.delete(f"{url}/v1/ttt/sessions/full-{i}", timeout=600, trust_env=False)  # noqa: E731
        removals = [pool.submit(remove, i) for i in range(count)]
        time.sleep(0.2)
        asked = time.perf_counter()
        http.post("/v1/ttt/sessions/saved/save").raise_for_status()
        saved = time.perf_counter() - asked
        assert all(removal.result().json()["database_wiped"] for removal in removals)
        return [saved, time.perf_counter() - began]


def shown(seconds: list[float]) -> str:
    cut = quantiles(seconds, n=100)
    return f"{1e3 * cut[49]:.1f} / {1e3 * cut[98]:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=10_000)
    parser.add_argument("--asked", type=int, default=50)
    parser.add_argument("--out", default=str(HERE / "out"))
    args = parser.parse_args()
    run = about("full_sessions.py")
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as folder:
        flags = [*EAGER, "--ttt-state-dir", folder]
        with served(flags, CONFIG) as url:
            full = grow(url)
        run["losses"] = len(full["losses"])
        run["bytes"] = multiply(Path(folder), args.sessions)
        with served(flags, CONFIG) as url:
            asked(url, 100, 3)
            alone: list[float] = []
            with decoding(url, alone):
                time.sleep(15)
            found: list[list[Any]] = [["a page of", "median / p99, ms", "between two tokens of a base answer beside, ms"]]
            for limit in (100, 500):
                run[f"idle_{limit}"] = asked(url, limit, args.asked)
                gaps: list[float] = []
                with decoding(url, gaps):
                    run[f"busy_{limit}"] = asked(url, limit, args.asked)
                found.append([f"{limit}, idle", shown(run[f"idle_{limit}"]), ""])
                found.append([f"{limit}, beside", shown(run[f"busy_{limit}"]), f"{shown(gaps)} (alone {shown(alone)})"])
            beside: list[float] = []
            with decoding(url, beside):
                run["removed"] = removed(url, REMOVED)
            longest = f"{shown(beside)}, at most {1e3 * max(beside):.0f} (alone {1e3 * max(alone):.0f})"
            took = " / ".join(f"{1e3 * x:.0f}" for x in run["removed"])
            found.append([f"{REMOVED} removals: a save behind them / all of them", took, longest])
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [found[0], ["---"] * 3, *found[1:]]]
    said = f"{args.sessions:,} sessions with {run['losses']} losses each; {run['bytes']:,} bytes are recorded of each.\n\n"
    save("Many full sessions", run, said + "\n".join(lines), args.out, "many-full-sessions")


if __name__ == "__main__":
    main()
