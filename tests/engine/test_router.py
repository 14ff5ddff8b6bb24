"""Two servers with one state dir, behind a real nginx and a real vllm-router, whose rings differ: sessions go to and fro, one
server is killed under load, and the other has every acknowledged save within half a minute."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml
from conftest import Stage, bound, running
from served import Documents, Served, completion

from vllm_ttt.eval import server as processes
from vllm_ttt.sessions.offline import Offline

pytestmark = [pytest.mark.engine, pytest.mark.alone]

NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
CONFIG = {
    "adapt": {"preset": "last", "layers": 1, "rank": 8},
    "learn": {"chunk": 32},
    "schedule": {"tokens_per_step": 32},
    # No save but those that are asked for, and the one before a session is handed over.
    "sessions": {"resident": 4, "autosave": 3600.0, "shared": True},
    "guard": {"every": 0},
}
NAMES = [f"session-{i}" for i in range(6)]
#: Tokens of a request: one chunk is learned.
TEXT = 33
#: Seconds from the kill to the last answer.
SOON = 30

CONF = """
daemon off;
{user}
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/nginx-body;
  proxy_temp_path {folder}/nginx-proxy;
  fastcgi_temp_path {folder}/nginx-fastcgi;
  uwsgi_temp_path {folder}/nginx-uwsgi;
  scgi_temp_path {folder}/nginx-scgi;
  # What names no session goes anywhere.
  map $http_x_session_id $session {{ "" $request_id; default $http_x_session_id; }}
  upstream ttt {{
    hash $session consistent;
    {servers}
  }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://ttt;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_buffering off;
      proxy_read_timeout 600s;
      add_header X-Upstream $upstream_addr always;
    }}
  }}
}}
"""


@contextlib.contextmanager
def server(folder: Path, number: int) -> Iterator[Served]:
    flags = ["--ttt-config", str(folder / "ttt.yaml"), "--ttt-state-dir", str(folder / "state"), "--max-model-len", "512"]
    # By itself vLLM gives both the same core.
    with running(folder / f"server-{number}.log", "vllm_ttt.cli", flags, bound([number])) as served:
        yield served


@contextlib.contextmanager
def nginx(folder: Path, urls: list[str]) -> Iterator[str]:
    assert NGINX is not None, "nginx is not installed: apt-get install nginx-light"
    port = processes.free_port()
    servers = "\n    ".join(f"server {url.removeprefix('http://')} max_fails=1 fail_timeout=5s;" for url in urls)
    user = "user root;" if os.geteuid() == 0 else ""
    (folder / "nginx.conf").write_text(CONF.format(folder=folder, user=user, servers=servers, port=port))
    command = [NGINX, "-e", str(folder / "nginx.log"), "-c", str(folder / "nginx.conf")]
    with processes.process_group(command, folder / "nginx.out") as process:
        processes.wait_healthy(process, port, folder / "nginx.out")
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def vllm_router(folder: Path, urls: list[str]) -> Iterator[str]:
    port, metrics = processes.free_port(), processes.free_port()
    command = [sys.executable, "-m", "vllm_router.launch_router", "--policy", "consistent_hash", "--worker-urls", *urls]
    command += ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(metrics)]
    command += ["--health-check-interval-secs", "2", "--health-failure-threshold", "1", "--log-dir", str(folder / "router")]
    with processes.process_group(command, folder / "router.log") as process:
        processes.wait_healthy(process, port, folder / "router.log")
        yield f"http://127.0.0.1:{port}"


class Load:
    """Clients that learn and save until they are told to stop: of each session one behind each router."""

    def __init__(self, routers: list[str], documents: Documents):
        self.tokens = [token for domain in documents.values() for ids in domain for token in ids]
        self.lock = threading.Lock()
        #: of each session and router: when each request was sent and answered, and the version; versions that were acknowledged
        #: as saved; statuses of all answers
        self.answers: dict[tuple[str, str], list[tuple[float, float, int]]] = defaultdict(list)
        self.acknowledged: dict[str, int] = {}
        self.statuses: dict[int, int] = defaultdict(int)
        self.wrong: list[str] = []
        self.ends = threading.Event()
        self.threads = [threading.Thread(target=self._talk, args=(url, n)) for url in routers for n in NAMES]
        for thread in self.threads:
            thread.start()

    def _talk(self, url: str, name: str) -> None:
        with httpx.Client(timeout=60, trust_env=False, headers={"X-Session-ID": name}) as http:
            for i in range(100_000):
                if self.ends.is_set():
                    return
                with contextlib.suppress(httpx.HTTPError):  # of the server that was killed
                    self._ask(http, url, name, i)

    def _ask(self, http: httpx.Client, url: str, name: str, i: int) -> None:
        start = 40 * (i + 11 * NAMES.index(name)) % (len(self.tokens) - TEXT)
        sent = time.monotonic()
        answer = http.post(f"{url}/v1/completions", json=completion(self.tokens[start : start + TEXT]))
        self._note(answer)
        if answer.status_code == 200:
            with self.lock:
                self.answers[name, url].append((sent, time.monotonic(), answer.json()["ttt"]["version"]))
            if i % 2:
                saved = http.post(f"{url}/v1/ttt/sessions/{name}/save")
                self._note(saved)
                if saved.status_code == 200 and (version := saved.json()["saved_version"]) is not None:
                    with self.lock:
                        self.acknowledged[name] = max(self.acknowledged.get(name, 0), version)

    def _note(self, answer: httpx.Response) -> None:
        with self.lock:
            self.statuses[answer.status_code] += 1
        if answer.status_code == 409:
            if answer.headers.get("retry-after") != "2" or answer.json()["error"]["code"] != 409:
                self.wrong.append(f"{answer.headers}: {answer.text}")
            time.sleep(0.5)
        elif answer.status_code not in (200, 502, 503, 504, 500):
            self.wrong.append(f"{answer.status_code}: {answer.text}")

    def versions(self, name: str, after: float = 0.0, before: float = 1e12) -> list[int]:
        """What requests of a session that were sent ``after`` and answered ``before`` have been answered with."""
        with self.lock:
            found = [answer for (of, _), answers in self.answers.items() if of == name for answer in answers]
        return [version for sent, got, version in found if sent > after and got < before]

    def served(self, after: float) -> set[tuple[str, str]]:
        """Of which sessions requests that were sent ``after`` have been answered, and behind which router."""
        with self.lock:
            return {whose for whose, answers in self.answers.items() if answers[-1][0] > after}

    def stop(self) -> None:
        self.ends.set()
        for thread in self.threads:
            thread.join()


def ask(url: str, name: str, documents: Documents) -> httpx.Response:
    text = next(iter(documents.values()))[0][:TEXT]
    headers = {"X-Session-ID": name}
    return httpx.post(f"{url}/v1/completions", json=completion(text), headers=headers, timeout=60, trust_env=False)


def test_two_servers_behind_two_routers_and_one_is_killed(stage: Stage, tmp_path: Path, documents: Documents) -> None:
    stage.stop()
    assert importlib.util.find_spec("vllm_router"), "vllm-router is not installed: make setup"
    (tmp_path / "ttt.yaml").write_text(yaml.safe_dump(CONFIG))
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(server(tmp_path, number)) for number in range(2)]
        urls = [served.url for served in servers]
        routers = [stack.enter_context(vllm_router(tmp_path, urls))]
        if NGINX is not None or os.environ.get("CI"):
            routers.append(stack.enter_context(nginx(tmp_path, urls)))
        each_router_keeps_a_session_in_one_server(routers, servers, documents)
        one_that_is_idle_is_handed_over(urls, documents)

        load = Load(routers, documents)
        stack.callback(load.stop)
        deadline = time.monotonic() + 60
        while len(load.acknowledged) < len(NAMES) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert set(load.acknowledged) == set(NAMES), load.statuses
        with load.lock:
            acknowledged = dict(load.acknowledged)
            os.killpg(servers[0].process.pid, signal.SIGKILL)
            killed = time.monotonic()
        everybody = {(name, router) for name in NAMES for router in routers}
        while load.served(killed) != everybody:
            assert time.monotonic() < killed + SOON, f"{everybody - load.served(killed)}: {dict(load.statuses)}"
            time.sleep(0.1)
        took = time.monotonic() - killed
        load.stop()
        print(f"all served {took:.1f} s after the kill; {dict(load.statuses)}; acknowledged {acknowledged}", flush=True)
        for name in NAMES:
            for versions in (load.versions(name, before=killed), load.versions(name, after=killed)):
                assert len(set(versions)) == len(versions) > 0, f"two servers have answered at once for {name}: {versions}"
            assert min(load.versions(name, after=killed)) >= acknowledged[name], f"an acknowledged save of {name} is lost"
        assert not load.wrong, load.wrong
        assert served_versions_go_on(routers, documents)
    # While it served: that its engine has ended before it, vLLM's API server may log as an error when it ends itself.
    log, _, ending = (tmp_path / "server-1.log").read_text(errors="replace").partition("[shutdown]")
    assert "Traceback" not in log, log
    assert "Application shutdown complete" in ending, ending
    assert all(row["saved_version"] is not None for row in Offline(tmp_path / "state").list())


def each_router_keeps_a_session_in_one_server(routers: list[str], servers: list[Served], documents: Documents) -> None:
    """By its header alone. Both servers get some."""
    for router in routers:
        found: set[int] = set()
        for i in range(40):
            name = f"{router[-5:]}-{i}"
            places = []
            for version in range(2):
                answer = ask(router, name, documents)
                assert (answer.status_code, answer.json()["ttt"]["version"]) == (200, version), answer.text
                places.append(holders(servers, name))
            assert len(places[0]) == 1, f"{name} is in {len(places[0])} servers"
            assert places[0] == places[1], f"{name} went from one server to the other"
            found |= set(places[0])
            if len(found) == 2 and i >= 3:
                break
        assert found == {0, 1}, f"{router} sends all sessions to one server"


def holders(servers: list[Served], name: str) -> list[int]:
    """The servers that have the session in memory."""
    shown = [served.http.get(f"/v1/ttt/sessions/{name}") for served in servers]
    return [n for n, answer in enumerate(shown) if answer.status_code == 200 and answer.json()["tier"] in ("slot", "memory")]


def one_that_is_idle_is_handed_over(urls: list[str], documents: Documents) -> None:
    """With what it has learned, though nobody has saved it. Each may show it, and say what is recorded."""
    for i in range(4):
        answer = ask(urls[i % 2], "to-and-fro", documents)
        assert answer.status_code == 200, answer.text
        assert answer.json()["ttt"]["version"] == i


def served_versions_go_on(routers: list[str], documents: Documents) -> bool:
    """Whichever router is asked it is one session: in the server that is left."""
    first = ask(routers[0], NAMES[0], documents).json()["ttt"]["version"]
    return ask(routers[-1], NAMES[0], documents).json()["ttt"]["version"] == first + 1
