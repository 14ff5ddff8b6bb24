"""Load on a server that learns, beside the same load without learning; every session must end at the version that was counted.

    python loadtests/run_load.py [--shape ramp|spike|soak] [--seconds 60] [--arms alone,unlearned,learning] [--peak 8]

The server is `vllm serve demo/model --plugin ttt` with a state dir, little host memory and two API keys, or the one at
--base-url. The arms follow one another on it: base users alone; all users, whose sessions learn nothing; all users, whose
sessions learn. Then a backlog is learned while nobody is served, and beside base answers: `load/yielding.py`.

A dated JSON and a Markdown report are written to --out. Exit code 1: an error that was not asked for, a session at another
version than its client counted, or a traceback in the server's log.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import yaml
from load.hosts import check_host
from load.logs import unexpected
from load.memory import Memory
from load.report import ARMS, table
from load.shapes import SHAPES
from runs import DEMO, HERE, about, save

from vllm_ttt.eval import server

FLAGS = [
    *(str(DEMO / "model"), "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**28), "--served-model-name", "demo"),
    *("--enforce-eager", *server.dtype_flags()),
]
#: Six slots, and 39 sessions of the demo model in memory: the rest is on the move. All chunks of a session are remembered.
CONFIG: dict[str, Any] = {
    "sessions": {"resident": 6, "host_gib": 0.165, "per_key": 10**6, "autosave": 5.0},
    "observe": {"recent_chunks": 4096},
    # Tried early and strictly, so that the guard has something to do: one document again and again is enough.
    "guard": {"every": 4, "max_regression": 0.1},
}
KEYS = ("key-of-the-users-0123456789", "key-of-a-stranger-0123456789")


class Target:
    """A server: ``pid`` of its first process, where that is known."""

    def __init__(self, url: str, keys: tuple[str, str] | None, pid: int | None, log: Path | None):
        self.url, self.keys, self.pid, self.log = url, keys, pid, log

    def arm(self, name: str, args: argparse.Namespace, seconds: float) -> dict[str, Any]:
        """Run locust; its figures, and the server's memory."""
        print(f"{name}: {seconds:.0f} s", file=sys.stderr, flush=True)
        memory = Memory(self.pid) if self.pid else None
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / "result.json"
            command = [sys.executable, "-m", "locust", "-f", str(HERE / "locustfile.py"), "--headless", "--only-summary"]
            command += ["--host", self.url, "--shape", args.shape, "--arm", name, "--seconds", str(seconds)]
            command += ["--peak", str(args.peak), "--result", str(result)]
            command += ["--allow-host"] if args.allow_host else []
            if self.keys:
                command += ["--key", self.keys[0], "--hostile-key", self.keys[1]]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if not result.exists():
                sys.exit(f"locust did not come to its end:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
            figures = json.loads(result.read_text())
        for line in done.stdout.splitlines():
            if line.startswith("NOT ASKED FOR"):
                print(f"{name}: {line}", file=sys.stderr)
        return {**figures, **({"memory": memory.stop()} if memory else {})}

    def yielding(self) -> dict[str, Any]:
        from load.texts import Texts
        from load.yielding import SESSIONS, TOKENS, Probe

        key = self.keys[0] if self.keys else None
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        model = httpx.get(f"{self.url}/v1/models", headers=headers, trust_env=False).json()["data"][0]["id"]
        texts, rng = Texts(self.url, model, headers), random.Random(0)
        print("yielding", file=sys.stderr, flush=True)
        return asyncio.run(Probe(self.url, model, key, [texts.window(rng, TOKENS) for _ in range(SESSIONS)]).run())

    def tracebacks(self) -> list[str]:
        """Lines of the log that no request should cause."""
        if self.log is None:
            return []
        return unexpected(self.log.read_text(encoding="utf-8", errors="replace"))


@contextlib.contextmanager
def started(args: argparse.Namespace) -> Any:
    """The server of --base-url, or one of our own."""
    if args.base_url:
        keys = (args.key, args.hostile_key) if args.key else None
        yield Target(args.base_url.rstrip("/"), keys, args.server_pid, None)
        return
    with tempfile.TemporaryDirectory() as folder:
        (config := Path(folder) / "ttt.yaml").write_text(yaml.safe_dump(CONFIG))
        flags = [*FLAGS, "--ttt-config", str(config), "--ttt-state-dir", f"{folder}/state", "--api-key", *KEYS]
        port, log = server.free_port(), Path(args.log) if args.log else Path(folder) / "server.log"
        with server.serve(flags, port, log, keep=False) as process:
            print(f"starting vLLM on port {port}: a minute", file=sys.stderr, flush=True)
            server.wait_healthy(process, port, log)
            target = Target(f"http://127.0.0.1:{port}", KEYS, process.pid, log)
            # vLLM compiles and allocates at the first requests
            body = {"model": "demo", "prompt": [5] * 40, "max_tokens": 2, "session_id": "warm"}
            warm = httpx.Client(
                headers={"Authorization": f"Bearer {KEYS[0]}"}, base_url=target.url, timeout=120, trust_env=False
            )
            warm.post("/v1/completions", json=body).raise_for_status()
            time.sleep(1)
            warm.delete("/v1/ttt/sessions/warm").raise_for_status()
            yield target
            warm.get("/health").raise_for_status()


def failures(report: dict[str, Any]) -> list[str]:
    """Why the run failed; [] where it did not."""
    found = [f"{arm}: {error} ({n} times)" for arm, f in report["arms"].items() for error, n in f["errors"].items()]
    found += [f"{arm}: {problem}" for arm, f in report["arms"].items() for problem in f["audit"]["problems"]]
    return found + [f"server log: {line}" for line in report["tracebacks"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="soak")
    parser.add_argument("--seconds", type=float, default=60, help="of the arm `learning`")
    parser.add_argument("--beside", type=float, help="seconds of the other arms; default: as many")
    parser.add_argument("--arms", default=",".join(ARMS), help="of alone, unlearned, learning; in this order")
    parser.add_argument("--peak", type=int, default=8, help="users at most")
    parser.add_argument("--no-yielding", action="store_true", help="leave out the backlog")
    parser.add_argument("--base-url", help="a server that runs; default: one is started")
    parser.add_argument("--key", help="API key for that server")
    parser.add_argument("--hostile-key", help="another API key, for other people's sessions")
    parser.add_argument("--server-pid", type=int, help="first process of that server, to measure memory")
    parser.add_argument("--allow-host", action="store_true", help="load a server that is not on this machine")
    parser.add_argument("--log", help="keep the server's log here")
    parser.add_argument("--out", default=str(HERE / "out"), help="folder for the dated JSON and Markdown")
    parser.add_argument("--name", default="load", help="of the files, after the date")
    args = parser.parse_args()
    arms = args.arms.split(",")
    if not arms or set(arms) - set(ARMS):
        parser.error(f"--arms: some of {', '.join(ARMS)}; got {args.arms}")
    if args.base_url:
        try:
            check_host(args.base_url, args.allow_host)
        except ValueError as error:
            parser.error(str(error))
    report = about("run_load.py") | {
        "server": "vllm serve demo/model --plugin ttt " + " ".join(FLAGS[1:]) if not args.base_url else args.base_url,
        "config": CONFIG if not args.base_url else None,
        "arms": {},
    }
    with started(args) as target:
        for arm in arms:
            seconds = args.seconds if arm == "learning" or args.beside is None else args.beside
            report["arms"][arm] = target.arm(arm, args, seconds)
        if not args.no_yielding:
            report["yielding"] = target.yielding()
        report["tracebacks"] = target.tracebacks()
    failed = failures(report)
    body = (f"{report['config']}\n\n" if report["config"] else "") + table(report) + "\n\n"
    body += "\n".join(f"- FAILED: {line}" for line in failed[:50]) or "Nothing happened that was not asked for."
    save(f"Load: {args.shape}, {args.peak} users", report, body, args.out, args.name)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
