"""Faults while others are served: what docs/faults.md promises, on a server with a state dir on a small disk of its own.

TTT_STORM=1000 makes a thousand new sessions where here sixty are enough.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from conftest import Stage, running
from load.books import Book, Rule
from load.logs import unexpected
from served import Documents, Served, completion

from vllm_ttt.sessions.offline import Offline

pytestmark = pytest.mark.engine

STORM = int(os.environ.get("TTT_STORM", "60"))
#: Four slots, and 14 sessions in memory, with what they remember; the disk holds what the storm makes, and some more.
CONFIG = {
    "learn": {"chunk": 256},
    "sessions": {"resident": 4, "host_gib": 0.036, "per_key": 10**6, "keep_versions": 1, "autosave": 2.0, "ttl": "1d"},
    "observe": {"recent_chunks": 4096},
}
DISK_MB = 100 + 3 * STORM
YEARS = 10 * 365 * 86400


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system of its own, where we may make one; else a folder."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_MB}m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def clock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("clock") / "seconds"


@pytest.fixture(scope="module")
def stormy(stage: Stage, disk: Path, clock: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    stage.stop()
    folder = tmp_path_factory.mktemp("stormy")
    (folder / "ttt.yaml").write_text(yaml.safe_dump(CONFIG))
    flags = ["--ttt-config", str(folder / "ttt.yaml"), "--ttt-state-dir", str(disk / "state")]
    flags += ["--worker-cls", "faulty_worker.FaultyWorker"]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "TTT_TEST_CLOCK": str(clock)}
    with running(folder / "server.log", "shifted_clock", flags, environment) as served:
        yield served


@pytest.fixture
def calm(stormy: Served, documents: Documents) -> Iterator[Served]:
    """After each storm: nothing has leaked, nothing was logged that was not expected, and a new session learns."""
    logged = len(stormy.logged())
    yield stormy
    state = stormy.settle()
    assert state["pages_free"] == state["pages"], "pages of the backlog have leaked"
    assert state["rows_known"] == state["rows"], "rows of the masters have leaked"
    name = stormy.fresh("after")
    for version in (0, 1):
        assert stormy.complete(documents["kjv"][0][:257], name)["ttt"]["version"] == version
    assert unexpected(stormy.logged()[logged:]) == []


class Beside:
    """Base requests, one after the other, from before the context until its end; each must be answered."""

    def __init__(self, served: Served, prompt: list[int]):
        self.served, self.prompt, self.answers, self.ended = served, prompt, [], threading.Event()
        self.answered = threading.Event()

    def __enter__(self) -> Beside:
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        assert self.answered.wait(60), "no base answer before anything has happened"
        return self

    def _run(self) -> None:
        with httpx.Client(base_url=self.served.url, timeout=60, trust_env=False) as http:
            while not self.ended.is_set():
                self.answers.append(http.post("/v1/completions", json=completion(self.prompt, max_tokens=4)).status_code)
                self.answered.set()

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.thread.join()
        assert set(self.answers) == {200}


def all_at_once(served: Served, calls: list[dict[str, Any]], at_once: int = 16) -> list[httpx.Response]:
    """POST completions, so many at a time."""

    async def run() -> list[httpx.Response]:
        turn = asyncio.Semaphore(at_once)
        async with httpx.AsyncClient(base_url=served.url, timeout=120, trust_env=False) as http:

            async def one(body: dict[str, Any]) -> httpx.Response:
                async with turn:
                    return await http.post("/v1/completions", json=body)

            return list(await asyncio.gather(*(one(body) for body in calls)))

    return asyncio.run(run())


def test_many_new_sessions(calm: Served, documents: Documents) -> None:
    """Each is answered, learned once and kept, most of them on disk; base requests are answered beside."""
    prompts = [ids[at : at + 48] for domain in documents.values() for ids in domain for at in range(0, len(ids) - 48, 31)]
    prompts = random.Random(0).sample(prompts, len(prompts))
    names = [f"storm-{i}" for i in range(STORM)]
    began = time.monotonic()
    with Beside(calm, documents["kjv"][1][:60]) as beside:
        bodies = [completion(prompts[i % len(prompts)], name) for i, name in enumerate(names)]
        answers = all_at_once(calm, bodies)
        took = time.monotonic() - began
    assert [answer.status_code for answer in answers] == [200] * STORM
    assert all(a.json()["ttt"]["version"] == 0 and a.json()["ttt"]["tokens_learned"] == 47 for a in answers)
    calm.settle()
    listed = {s["session_id"]: s for s in calm.http.get("/v1/ttt/sessions").json()["sessions"]}
    assert set(names) <= set(listed)
    unlearned = {name for name in names if listed[name]["tokens_skipped"]}
    assert len(unlearned) < STORM / 5, "their text was noise to the model"
    assert all(listed[name]["version"] == (name not in unlearned) for name in names)
    learned = [name for name in names if name not in unlearned]  # of the others there is nothing to put on disk
    assert sum(listed[name]["tier"] == "disk" for name in learned) > len(learned) - 20
    print(f"{STORM} new sessions in {took:.1f} s, {len(beside.answers)} base answers beside")


def test_a_storm_of_cancellations(calm: Served, documents: Documents) -> None:
    """Clients leave at any moment: before their answer begins, in the middle of it, or while they are held. Every session ends
    at a version that its requests explain, and those who stay are answered in full."""
    rng, rule = random.Random(1), Rule(256, 8)
    texts = [ids for domain in documents.values() for ids in domain if len(ids) > 900]
    books = [Book(calm.fresh("cancelled"), rule) for _ in range(6)]

    async def run() -> None:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=calm.url, timeout=120, trust_env=False, limits=limits) as http:

            async def leave(book: Book) -> None:
                start = rng.randrange(1, 100)  # no prompt begins as another does
                prompt = rng.choice(texts)[start : start + rng.randrange(100, 800)]
                book.left(len(prompt))
                body = completion(prompt, book.name, max_tokens=300, ignore_eos=True, stream=rng.random() < 0.7)
                await asyncio.sleep(rng.uniform(0, 3))
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(rng.choice([0.001, 0.02, 0.1, 0.5, 1.5])):
                        await http.post("/v1/completions", json=body)

            await asyncio.gather(*(leave(book) for book in books for _ in range(15)))

    with Beside(calm, documents["kjv"][1][:60]):
        asyncio.run(run())
    calm.settle()
    for book in books:
        stayed = documents["kjv"][0][:600]
        answer = calm.complete(stayed, book.name)
        book.answered(stayed, answer["usage"]["prompt_tokens"], answer["ttt"])
        calm.settle()
        session = calm.session(book.name)
        assert book.check(session) == []
        assert session["requests_open"] == 0
        assert calm.rpc("test_slot_is_master") == {"held": True, "equal": True}


def test_connections_that_go_nowhere(calm: Served, documents: Documents) -> None:
    """Half a request and then silence; a whole one of which nobody reads the answer; one that is reset. Others are served."""
    host, port = calm.url.removeprefix("http://").split(":")
    body = b'{"model":"demo","prompt":"In the beginning","max_tokens":300,"ignore_eos":true,"stream":true,'
    body += b'"session_id":"silent-%d"}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    sockets: list[socket.socket] = []
    for i in range(30):
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        connection.connect((host, int(port)))
        sent = body % i
        whole = head % len(sent) + sent
        connection.sendall(whole[: (40, len(whole) - 9, len(whole))[i % 3]])
        sockets.append(connection)
    with Beside(calm, documents["kjv"][1][:60]) as beside:
        while len(beside.answers) < 10:
            time.sleep(0.05)
        name = calm.fresh("beside-silence")
        assert calm.complete(documents["kjv"][0][:257], name)["ttt"]["version"] == 0
        assert calm.complete(documents["kjv"][0][:257], name)["ttt"]["version"] == 1
        for connection in sockets:  # no FIN but RST
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            connection.close()
    calm.settle()
    names = [s["session_id"] for s in calm.http.get("/v1/ttt/sessions").json()["sessions"]]
    silent = sorted(name for name in names if name.startswith("silent"))
    assert silent == sorted(f"silent-{i}" for i in range(2, 30, 3)), "who sent a whole request has a session, nobody else"
    deadline = time.monotonic() + 60
    while any(calm.session(name)["requests_open"] for name in silent):
        assert time.monotonic() < deadline, "a request of a client that is gone goes on"
        time.sleep(0.1)


@pytest.mark.parametrize("jump", [YEARS, -YEARS, 0])
def test_a_clock_that_jumps(calm: Served, documents: Documents, clock: Path, jump: int) -> None:
    """Ten years ahead, then back to twenty before, then to what it was: no session is lost, and learning and saving go on."""
    # What has learned nothing takes no place, and may be forgotten at any time.
    known = {s["session_id"]: s["version"] for s in calm.http.get("/v1/ttt/sessions").json()["sessions"] if s["version"]}
    assert known
    name = calm.fresh("clock")
    with Beside(calm, documents["kjv"][1][:60]):
        calm.complete(documents["kjv"][0][:257], name)
        clock.write_text(str(jump))
        time.sleep(3)  # three looks for sessions that have expired
        assert calm.complete(documents["kjv"][0][300:557], name)["ttt"]["version"] == 1
        calm.settle()
        saved = calm.http.post(f"/v1/ttt/sessions/{name}/save").json()
    assert saved["saved_version"] == 2
    assert abs(saved["saved"] - time.time() - jump) < 60, "the server is in that time"
    now = {s["session_id"]: s["version"] for s in calm.http.get("/v1/ttt/sessions").json()["sessions"]}
    assert {key: now.get(key) for key in known} == known


def test_a_full_disk(calm: Served, documents: Documents, disk: Path) -> None:
    """Sessions go on from memory, a save is a 507 that says why, new sessions are a 429; with room again all is saved."""
    if not os.path.ismount(disk):
        pytest.skip("only root may mount a file system")
    name = calm.fresh("full")
    calm.complete(documents["kjv"][0][:257], name)
    calm.settle()
    assert calm.http.post(f"/v1/ttt/sessions/{name}/save").status_code == 200
    filler = disk / "filler"
    with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)) == 4096:
            pass
    try:
        with Beside(calm, documents["kjv"][1][:60]):
            for i in range(1, 4):
                answer = calm.complete(documents["kjv"][0][300 * i : 300 * i + 257], name)
                assert answer["ttt"]["version"] == i
            calm.settle()
            refused = calm.http.post(f"/v1/ttt/sessions/{name}/save")
            assert refused.status_code == 507, refused.text
            assert refused.json()["error"]["message"]
            fresh = [calm.post(documents["man2"][0][:48], calm.fresh("no-room")) for _ in range(20)]
            assert {answer.status_code for answer in fresh} <= {200, 429}
            assert 429 in {answer.status_code for answer in fresh}, "memory holds 14 sessions, and none can be put away"
        assert calm.session(name)["saved_version"] == 1
    finally:
        filler.unlink()
    saved = calm.http.post(f"/v1/ttt/sessions/{name}/save")
    assert saved.status_code == 200, saved.text
    assert saved.json()["saved_version"] == 4
    assert calm.session(name)["error"] is None


def test_a_killed_worker(stormy: Served, documents: Documents, disk: Path) -> None:
    """Every request gets an end, the server leaves instead of hanging, and what was saved is there for the next one.

    The last test of this server.
    """
    name = stormy.fresh("killed")
    stormy.complete(documents["kjv"][0][:513], name)
    stormy.settle()
    assert stormy.http.post(f"/v1/ttt/sessions/{name}/save").json()["saved_version"] == 2
    family = psutil.Process(stormy.process.pid).children(recursive=True)
    (worker,) = [process for process in family if process.name().startswith("VLLM::Worker")]
    bodies = [completion(documents["kjv"][0][:600], f"dies-{i}", max_tokens=900, ignore_eos=True) for i in range(6)]
    ends: list[int | str] = []

    def send(body: dict[str, Any]) -> None:
        try:
            ends.append(httpx.post(f"{stormy.url}/v1/completions", json=body, timeout=60, trust_env=False).status_code)
        except httpx.TransportError as error:
            ends.append(type(error).__name__)

    threads = [threading.Thread(target=send, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    time.sleep(1)
    os.kill(worker.pid, signal.SIGKILL)
    for thread in threads:
        thread.join(timeout=90)
        assert not thread.is_alive()
    assert len(ends) == 6
    assert "ReadTimeout" not in ends, "a client was left waiting"
    assert 200 not in ends
    stormy.process.wait(timeout=60)  # the exit code is vLLM's own
    _, alive = psutil.wait_procs(family, timeout=30)  # Python's own helpers see that their pipes are closed a moment later
    assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    offline = Offline(disk / "state")
    assert offline.fsck()["problems"] == []
    versions = {row["session_id"]: row["version"] for row in offline.list()}
    assert versions[name] == 2
