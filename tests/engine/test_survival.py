"""Sessions that last: what was acknowledged survives SIGKILL at any moment, and belongs to its owner alone.

Each kill costs a start of the server: here a few are enough, TTT_KILLS=30 makes thirty. `tests/unit/test_kill.py` kills the
same code thirty times, without a model.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import yaml
from conftest import Stage, running
from served import Documents, Served, completion

from vllm_ttt import audit_log
from vllm_ttt.geometry import Geometry
from vllm_ttt.sessions.offline import Offline, tenant_of
from vllm_ttt.state_dir import StateDir
from vllm_ttt.worker.deltas import delta_file

pytestmark = pytest.mark.engine

KILLS = int(os.environ.get("TTT_KILLS", "2"))
KEYS = {"a": "key-of-tenant-a-12345", "b": "key-of-tenant-b-12345", "admin": "key-of-the-admin-12345"}
NAMES = [f"s{i}" for i in range(10)]
#: Two slots and room for two more: ten sessions are always on the move.
CONFIG = {"learn": {"chunk": 256}, "sessions": {"resident": 2, "host_gib": 0.005, "autosave": 1.0, "audit_log": "audit.jsonl"}}


def headers(who: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {KEYS[who]}"}


@contextlib.contextmanager
def server(folder: Path, log: str, key: Path | None = None, forking: bool = True) -> Iterator[Served]:
    (folder / "admin").write_text(KEYS["admin"])
    files = {"admin_key_file": str(folder / "admin"), "key_file": None if key is None else str(key)}
    config = {**CONFIG, "sessions": {**CONFIG["sessions"], **files}}
    (folder / "ttt.yaml").write_text(yaml.safe_dump(config))
    flags = ["--ttt-config", str(folder / "ttt.yaml"), "--ttt-state-dir", str(folder / "state")]
    flags += ["--worker-cls", "faulty_worker.FaultyWorker", "--api-key", KEYS["a"], KEYS["b"]]
    environment = {"VLLM_SERVER_DEV_MODE": "1"}
    with running(folder / log, "vllm_ttt.cli", flags, environment, forking=forking) as served:
        served.http.headers.update(headers("a"))
        yield served


class Load:
    """Clients that learn, probe and save until the server is gone. ``acknowledged``: name -> version of an answered save."""

    def __init__(self, served: Served, documents: Documents, seed: int, acknowledged: dict[str, int]):
        self.served, self.acknowledged, self.errors = served, acknowledged, []
        self.texts = [ids for domain in documents.values() for ids in domain if len(ids) > 600]
        self.threads = [threading.Thread(target=self._run, args=(random.Random(seed + i),)) for i in range(3)]
        self.gone, self.saved = False, threading.Event()
        for thread in self.threads:
            thread.start()

    def _run(self, rng: random.Random) -> None:
        with httpx.Client(base_url=self.served.url, headers=headers("a"), timeout=60, trust_env=False) as http:
            try:
                while not self.gone:
                    name, text = rng.choice(NAMES), rng.choice(self.texts)
                    start = rng.randrange(len(text) - 400)
                    learns = rng.random() < 0.8
                    knobs = {"vllm_xargs": {"ttt_learn": int(learns)}}
                    answer = http.post("/v1/completions", json=completion(text[start : start + 300], name, **knobs))
                    if rng.random() < 0.5 and answer.status_code == 200:
                        saved = http.post(f"/v1/ttt/sessions/{name}/save")
                        if saved.status_code == 200 and saved.json()["saved_version"] is not None:
                            self.acknowledged[name] = max(self.acknowledged.get(name, 0), saved.json()["saved_version"])
                            self.saved.set()
                        # A name that has learned nothing is forgotten where others need its place.
                        elif saved.status_code not in ((200, 503) if learns else (200, 404, 503)):
                            self.errors.append(saved.text)
            except httpx.HTTPError:
                pass  # the server was killed

    def end(self) -> None:
        self.gone = True
        for thread in self.threads:
            thread.join(timeout=90)
            assert not thread.is_alive()
        assert self.errors == []


def check(served: Served, folder: Path, documents: Documents, acknowledged: dict[str, int], key: Path | None) -> dict[str, int]:
    """Every session is at a version that was saved, no older than acknowledged, and holds what the file of it holds."""
    offline = Offline(folder, key_file=key)
    offline.tenant = tenant_of(offline.folder, KEYS["a"])
    versions = {}
    for name in NAMES:
        found = served.http.get(f"/v1/ttt/sessions/{name}")
        if found.status_code == 404:
            assert name not in acknowledged
            continue
        version = found.json()["version"]
        assert version >= acknowledged.get(name, 0), f"{name}: an acknowledged save is gone"
        answer = served.complete(documents["kjv"][0][:40], name, vllm_xargs={"ttt_learn": 0})
        assert answer["ttt"]["version"] == versions.setdefault(name, version)
        if version:
            newest = offline.find(name).newest
            assert newest is not None
            assert newest.version == version
            tensors, _ = delta_file.load(offline.folder.path(newest.file), newest.checksum, offline.geometry, offline.vault)
            assert_same_delta(served.delta(name), tensors, offline.geometry)
    return versions


def assert_same_delta(delta: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor], geometry: Geometry) -> None:
    """Bit for bit."""
    expected = [tensors[name].flatten() for name in geometry.shapes]
    assert torch.equal(torch.cat([x.flatten() for x in delta.values()]), torch.cat(expected))


@pytest.mark.parametrize("sealed", [False, True])
def test_kill_9_at_random_moments(stage: Stage, tmp_path: Path, documents: Documents, sealed: bool) -> None:
    stage.stop()
    key = tmp_path / "key" if sealed else None
    if key is not None:
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(32))
    rng, acknowledged, last = random.Random(KILLS), {}, {}
    state = tmp_path / "state"
    for cycle in range(KILLS):
        forking = sealed or cycle > 0  # the first one without a key is as users start it, on a CPU
        with server(tmp_path, f"server-{cycle}.log", key, forking) as served:
            found = check(served, state, documents, acknowledged, key) if cycle else {}
            assert all(found.get(name, 0) >= version for name, version in last.items()), "what had been recovered is gone"
            last = found
            load = Load(served, documents, 100 * cycle, acknowledged)
            if cycle == KILLS - 1:  # with nothing acknowledged there would be nothing to lose
                assert load.saved.wait(60), "no save is answered"
            time.sleep(rng.uniform(0.5, 6))
            if cycle % 2:  # while it is shutting down
                os.kill(served.process.pid, signal.SIGTERM)
                time.sleep(rng.uniform(0, 1.5))
            with contextlib.suppress(ProcessLookupError):
                os.killpg(served.process.pid, signal.SIGKILL)
            served.process.wait()
            load.end()
        report = Offline(state, key_file=key).fsck()
        assert report["problems"] == [], f"after kill {cycle}"
        assert audit_log.verify(state / "audit.jsonl").problem is None, f"after kill {cycle}"
        versions, leftovers = report["versions"], len(report["leftovers"])
        print(f"kill {cycle}: {len(acknowledged)} acknowledged, {versions} versions, {leftovers} leftovers", flush=True)
    with server(tmp_path, "server-last.log", key) as served:
        check(served, state, documents, acknowledged, key)
        before = ask_around(served, documents)
        # As `systemctl stop` does: every process gets the signal.
        os.killpg(served.process.pid, signal.SIGTERM)
        served.process.wait(timeout=60)
    tenant = tenant_of(StateDir(state), KEYS["a"])
    rows = {row["session_id"]: row for row in Offline(state, tenant, key).list()}
    assert {name: rows[name]["version"] for name in before} == before, "what was learned last was not saved at the end"
    assert Offline(state, key_file=key).fsck()["leftovers"] == []
    if sealed:  # names and losses are nowhere, but for names in the audit log
        for file in (path for path in state.rglob("*") if path.is_file() and path.name != "audit.jsonl"):
            data = file.read_bytes()
            assert not any(text in data for text in (b"__metadata__", b"frozen_loss", b"tokens_learned")), file
    told = audit_log.verify(state / "audit.jsonl").to_json()
    for _ in range(300):  # the engine core ends after the API server
        if "stop" in told["events"]:
            break
        time.sleep(0.1)
        told = audit_log.verify(state / "audit.jsonl").to_json()
    assert (told["ok"], told["torn_bytes"], told["events"]["start"]) == (True, 0, KILLS + 1)
    assert min(told["events"][event] for event in ("create", "learn", "serve", "stop")) > 0
    log = (state / "audit.jsonl").read_text()
    assert not any(key in log for key in KEYS.values())


def ask_around(served: Served, documents: Documents) -> dict[str, int]:
    """Two keys with the same session ids, over every route; returns the versions of tenant a's sessions."""
    learned = {"kjv": served.complete(documents["kjv"][1][:300], "both")["ttt"]}
    assert learned["kjv"]["version"] == 0
    other = served.post(documents["py_dns"][0][:600], "both", headers=headers("b")).json()["ttt"]
    assert other["version"] == 0, "another key's session of that name is another session"
    served.settle()
    mine = served.session("both")
    theirs = served.http.get("/v1/ttt/sessions/both", headers=headers("b")).json()
    assert (mine["version"], theirs["version"]) == (2, 3)
    for who, count in (("b", 1), ("admin", 0)):
        listed = served.http.get("/v1/ttt/sessions", headers=headers(who)).json()["sessions"]
        assert len(listed) == count
        assert "tenant" not in listed[0] or listed[0]["tenant"] is None if listed else True
    everybody = served.http.get("/v1/ttt/sessions", params={"all": "true"}, headers=headers("admin")).json()["sessions"]
    assert len({s["tenant"] for s in everybody}) == 2
    assert not any(key in str(everybody) for key in KEYS.values())
    for who in ("a", "b"):
        answer = served.http.get("/v1/ttt/sessions", params={"all": "true"}, headers=headers(who))
        assert answer.status_code == 403, answer.text
    alone: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", "", {}), ("POST", "/save", {}), ("POST", "/freeze", {}), ("POST", "/unfreeze", {}), ("POST", "/reset", {}),
        ("POST", "/rollback", {"json": {"version": 1}}), ("POST", "/fork", {"json": {"to": "x"}}), ("GET", "/adapter", {}),
        ("DELETE", "", {}),
    ]  # fmt: skip
    served.complete(documents["kjv"][0][:300], "mine")
    served.settle()
    for method, rest, options in alone:
        answer = served.http.request(method, "/v1/ttt/sessions/mine" + rest, headers=headers("b"), **options)
        assert answer.status_code == 404, (method, rest, answer.text)
        for wrong in ({"Authorization": ""}, {"Authorization": "Bearer nobody-knows-this-key"}):
            answer = served.http.request(method, "/v1/ttt/sessions/mine" + rest, headers=wrong, **options)
            assert answer.status_code == 401, (method, rest)
    for path in ("/v1/ttt/sessions", "/v1/ttt/config"):
        assert served.http.get(path, headers={"Authorization": ""}).status_code == 401
    assert served.session("mine")["version"] == 2
    assert not any(key in served.logged().replace("--api-key", "") for key in (KEYS["admin"],))
    return {s["session_id"]: s["version"] for s in served.http.get("/v1/ttt/sessions").json()["sessions"]}


def test_while_it_drains_it_takes_nothing_new(stage: Stage, tmp_path: Path, documents: Documents) -> None:
    stage.stop()
    text = documents["kjv"][0][:100]
    with server(tmp_path, "drains.log") as served, ThreadPoolExecutor() as pool:
        running = pool.submit(served.complete, text, "s0", max_tokens=1500, ignore_eos=True)
        with httpx.Client(base_url=served.url, headers=headers("a"), timeout=60, trust_env=False) as http:
            while not http.get("/v1/ttt/sessions").json()["sessions"]:
                pass
            os.kill(served.process.pid, signal.SIGTERM)
            while (health := http.get("/health")).status_code == 200:
                assert not running.done(), "it never said that it ends"
            assert health.status_code == 503
            for body in (
                completion("text", "s1"),
                completion(text, "s1"),
                completion(text),
                completion(text, "s1", stream=True),
            ):
                answer = http.post("/v1/completions", json=body)
                assert (answer.status_code, running.done()) == (503, False), answer.text
                assert "shutting down" in answer.json()["error"]["message"]
            assert http.get("/v1/ttt/sessions").status_code == 503
        assert running.result()["usage"]["completion_tokens"] == 1500, "what was asked before is answered"
