"""--data-parallel-size: two engines and two API servers are one server for sessions; a kill; then another number of engines."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import Stage, bound, running
from prometheus_client.parser import text_string_to_metric_families
from served import Documents, Served, completion

from vllm_ttt import audit_log
from vllm_ttt.placement import owner
from vllm_ttt.sessions.shelves import opened

pytestmark = [pytest.mark.engine, pytest.mark.alone]

CONFIG = {
    "adapt": {"preset": "last", "layers": 1, "rank": 8},
    "learn": {"chunk": 64},
    "schedule": {"tokens_per_step": 64},
    # Four slots and room for eight more on each engine: twenty sessions are on the move.
    "sessions": {"resident": 4, "host_gib": 0.001, "autosave": 1.0, "audit_log": "audit.jsonl"},
    "guard": {"every": 0},
}
NAMES = [f"session-{i}" for i in range(40)]
#: Engines after the kill.
THEN = 3
#: Tokens of a request: one chunk is learned.
TEXT = 33


@contextlib.contextmanager
def serving(folder: Path, engines: int, api_servers: int) -> Iterator[Served]:
    (folder / "ttt.yaml").write_text(yaml.safe_dump(CONFIG))
    flags = ["--ttt-config", str(folder / "ttt.yaml"), "--ttt-state-dir", str(folder / "state"), "--max-model-len", "512"]
    flags += ["--data-parallel-size", str(engines), "--api-server-count", str(api_servers)]
    # By itself vLLM gives all engines the same core.
    with running(folder / f"server-{engines}.log", "vllm_ttt.cli", flags, bound(range(engines))) as served:
        yield served


def placed(name: str, engines: int) -> int:
    return owner(f"-/{name}", engines)


class Clients:
    """Send pieces of texts, each session one after the other, and count."""

    def __init__(self, served: Served, documents: Documents, sent: int = 0):
        """``sent``: pieces that need not be sent again."""
        self.served, self.sent = served, sent
        self.tokens = [token for domain in documents.values() for ids in domain for token in ids]
        self.versions: Counter[str] = Counter()

    def piece(self) -> list[int]:
        self.sent += 1
        start = 40 * self.sent % (len(self.tokens) - TEXT)
        return self.tokens[start : start + TEXT]

    def round(self, names: list[str], headers: list[dict[str, str]] | None = None) -> None:
        """One request of each, all at once, over connections of their own: whichever API server takes them."""
        answers = self.served.together(*(completion(self.piece(), name) for name in names), headers=headers)
        for name, answer in zip(names, answers, strict=True):
            assert answer.status_code == 200, answer.text
            ttt = answer.json()["ttt"]
            assert ttt == {"session_id": name, "version": self.versions[name], "tokens_learned": TEXT - 1}
            self.versions[name] += 1

    def settled(self) -> dict[str, dict[str, Any]]:
        """What all pages of the list say, once everything has been learned."""
        deadline, versions = time.monotonic() + 60, {}
        while time.monotonic() < deadline:
            found = self.listed()
            versions = {name: s["version"] for name, s in found.items()}
            if versions == self.versions:
                return found
            time.sleep(0.2)
        raise AssertionError(f"{versions} is not {self.versions}")

    def listed(self) -> dict[str, dict[str, Any]]:
        found: list[dict[str, Any]] = []
        params: dict[str, Any] = {"limit": 7}
        while params.get("after", "") is not None:
            page = self.served.http.get("/v1/ttt/sessions", params=params).json()
            found += page["sessions"]
            params["after"] = page["next"]
        used = [s["last_used"] for s in found]
        assert used == sorted(used, reverse=True)
        assert len({s["session_id"] for s in found}) == len(found)
        return {s["session_id"]: s for s in found}

    def metric(self, name: str, **labels: str) -> dict[str, float]:
        """By engine, of both API servers the same. The text is one that Prometheus reads: each family once."""
        families = list(text_string_to_metric_families(httpx.get(f"{self.served.url}/metrics", trust_env=False).text))
        assert len({family.name for family in families}) == len(families)
        found: dict[str, float] = defaultdict(float)
        for sample in (s for family in families for s in family.samples if s.name == f"vllm:{name}"):
            if all(sample.labels[key] == value for key, value in labels.items()):
                found[sample.labels["engine"]] += sample.value
        return found


@pytest.fixture
def state(stage: Stage, tmp_path: Path) -> Path:
    stage.stop()
    return tmp_path


def test_two_engines_are_one_server_and_a_kill_and_another_number_lose_nothing(state: Path, documents: Documents) -> None:
    with serving(state, engines=2, api_servers=2) as served:
        clients = Clients(served, documents)
        sessions_are_pinned(clients)
        nobody_else_is(clients)
        metrics_tell_the_whole_truth(clients)
        operations_find_their_session(clients)
        clients.settled()
        print(memory(served), flush=True)
        acknowledged = killed_under_load(clients)
    log = (state / "server-2.log").read_text(errors="replace")
    assert "Traceback" not in log, log
    for engine in ("", "engine-1/"):
        told = audit_log.verify(state / "state" / f"{engine}audit.jsonl")
        assert told.problem is None
        assert min(told.events[event] for event in ("start", "create", "learn", "serve")) > 0
    with serving(state, engines=THEN, api_servers=1) as served:
        again = Clients(served, documents, sent=1000)
        found = again.listed()
        for name, version in acknowledged.items():
            assert found[name]["version"] >= version, f"{name}: an acknowledged save is gone"
        moved = [name for name in found if placed(name, THEN) != placed(name, 2)]
        assert {placed(name, THEN) for name in moved} == {THEN - 1}
        again.versions.update({name: s["version"] for name, s in found.items()})
        for start in range(0, len(NAMES), 10):
            again.round(NAMES[start : start + 10])
        again.settled()
        versions = again.versions
        os.killpg(served.process.pid, signal.SIGTERM)  # as `systemctl stop` does
        served.process.wait(timeout=60)
    whole = opened(state / "state")
    assert {s["session_id"]: s["version"] for s in whole.list()} == versions, "what was learned last was not saved at the end"
    report = whole.fsck()
    assert (report["problems"], report["leftovers"]) == ([], [])


def memory(served: Served) -> dict[str, list[int]]:
    """MB of each process of the server that are its own, by the end of its name: for docs/scale.md."""
    found: dict[str, list[int]] = defaultdict(list)
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.getpgid(int(folder.name)) == served.process.pid:
                name = (folder / "comm").read_text().strip()
                own = sum(
                    int(line.split()[1]) for line in (folder / "smaps_rollup").read_text().splitlines() if "Private_" in line
                )
                found[name].append(own // 1000)
    return dict(found)


def sessions_are_pinned(clients: Clients) -> None:
    """Whichever API server takes a request, and whatever a balancer in front of it says."""
    for n in range(3):
        names = NAMES[: 40 - 10 * n]
        clients.round(names, [{"X-data-parallel-rank": str(i % 2)} for i in range(len(names))] if n == 1 else None)
    found = clients.settled()
    assert found.keys() == set(NAMES)
    assert {s["tier"] for s in found.values()} == {"slot", "memory", "disk"}, "they are on the move"
    learned = clients.metric("ttt_learned_tokens_total")
    assert learned == {
        str(engine): sum((TEXT - 1) * v for name, v in clients.versions.items() if placed(name, 2) == engine)
        for engine in (0, 1)
    }


def nobody_else_is(clients: Clients) -> None:
    """Requests without a session go where vLLM's balancer says: to both."""
    before = clients.metric("request_success_total")
    answers = clients.served.together(*(completion(clients.piece()) for _ in range(16)))
    assert all(answer.status_code == 200 and "ttt" not in answer.json() for answer in answers)
    after = clients.metric("request_success_total")
    assert sum(after.values()) - sum(before.values()) == 16
    assert all(after[engine] > before[engine] for engine in ("0", "1"))


def metrics_tell_the_whole_truth(clients: Clients) -> None:
    clients.settled()
    time.sleep(1.1)  # exposition.FRESH
    assert sum(clients.metric("ttt_commits_total").values()) == sum(clients.versions.values())
    for engine in (0, 1):
        mine = [name for name in NAMES if placed(name, 2) == engine]
        tiers = [clients.metric("ttt_sessions", tier=tier)[str(engine)] for tier in ("slot", "memory", "disk", "new")]
        assert sum(tiers) == len(mine)
    assert clients.metric("ttt_refused_requests_total") == {"0": 0, "1": 0}
    assert clients.served.http.get("/v1/ttt/config").json()["sessions"]["disk_gib"] == 100.0, "the server's, not an engine's"


def operations_find_their_session(clients: Clients) -> None:
    http = clients.served.http
    for engine in (0, 1):
        name = next(name for name in NAMES if placed(name, 2) == engine)
        path = f"/v1/ttt/sessions/{name}"
        assert http.get(path).json()["version"] == clients.versions[name]
        assert http.post(f"{path}/save").json()["saved_version"] == clients.versions[name]
        assert http.get(f"{path}/adapter").status_code == 200
        assert http.post(f"{path}/freeze").json()["frozen"]
        assert not http.post(f"{path}/unfreeze").json()["frozen"]
        for near in (True, False):
            copies = (f"{name}-copy-{i}" for i in range(100))
            copy = next(copy for copy in copies if (placed(copy, 2) == engine) is near)
            made = http.post(f"{path}/fork", json={"to": copy})
            assert (made.status_code, made.json()["saved_version"]) == (200, clients.versions[name]), made.text
            assert http.post(f"{path}/fork", json={"to": copy}).status_code == 409
            clients.versions[copy] = clients.versions[name]
            clients.round([copy])
            assert http.delete(f"/v1/ttt/sessions/{copy}").json()["deleted"]
            assert http.get(f"/v1/ttt/sessions/{copy}").status_code == 404
            del clients.versions[copy]
        assert http.post(f"{path}/rollback", json={"version": 0}).json()["version"] == 0
        clients.versions[name] = 0
        clients.round([name])
        assert http.post(f"{path}/reset").json()["version"] == 0
        clients.versions[name] = 0
        clients.round([name])
    assert http.get("/v1/ttt/sessions/nobody").status_code == 404


def killed_under_load(clients: Clients) -> dict[str, int]:
    """SIGKILL to every process of the server while all learn and save. Returns the versions of answered saves."""
    acknowledged: dict[str, int] = {}
    enough = threading.Event()

    def learn(names: list[str]) -> None:
        with contextlib.suppress(httpx.HTTPError), httpx.Client(base_url=clients.served.url, trust_env=False) as http:
            while True:
                for name in names:
                    http.post("/v1/completions", json=completion(clients.piece(), name))
                    saved = http.post(f"/v1/ttt/sessions/{name}/save")
                    if saved.status_code == 200:
                        acknowledged[name] = saved.json()["saved_version"]
                    if len(acknowledged) >= 20:
                        enough.set()

    threads = [threading.Thread(target=learn, args=(NAMES[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(60), "saves are not answered"
    os.killpg(clients.served.process.pid, signal.SIGKILL)
    clients.served.process.wait()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    return acknowledged
