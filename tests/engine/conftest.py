"""Seven servers, of which a process of pytest runs one at a time, on a core of its own.

``reference``: stock vLLM, for its log-probabilities. ``exact``: the preset `last`, float32, four slots and no caches, so that
nothing but the algorithm separates it from the oracle, which has a delta alone. ``deep``: the same at full depth. ``half``:
`last` in bfloat16. ``cached``: `deep` with sessions' own caches, the default. ``small``: `deep` with a KV cache that is soon
full, in chunks of 64. ``server``: full depth and caches as users have it, in bfloat16 where the CPU is fast at it, for
everything else; it, ``exact`` and ``half`` learn in chunks of 256, so that a text has several.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import forked
import pytest
import torch
import yaml
from served import SCORED, Documents, Served, answers_beside, logprobs
from torch import nn

from vllm_ttt.config import EXPERIMENTS, TTTConfig, parse_config
from vllm_ttt.eval import server as processes
from vllm_ttt.eval.oracle import Oracle, load_model

HERE = Path(__file__).parent
MODEL = HERE.parents[1] / "demo" / "model"
FLAGS = ["--served-model-name", "demo", "--max-model-len", "2048", "--kv-cache-memory-bytes", str(2**28)]
FLAGS += ["--enforce-eager", "--enable-prompt-tokens-details", *processes.dtype_flags()]
SHORT = {"chunk": 256}
#: Where what is served is held to the oracle of the delta.
NO_CACHE: dict[str, Any] = {"cache": {"orders": 0}}
#: name: (vllm-ttt's config, further flags)
SERVERS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "exact": (
        {
            "adapt": {"preset": "last"},
            "learn": SHORT,
            "sessions": {"resident": 4},
            "guard": {"hourly_tokens": 8000},
            **NO_CACHE,
        },
        ["--dtype", "float32"],
    ),
    # A guard that tries every few commits, and lets everything pass.
    "deep": ({"sessions": {"resident": 4}, "guard": {"every": 4, "max_regression": 100}, **NO_CACHE}, ["--dtype", "float32"]),
    # A KV cache of eleven blocks of 128 tokens.
    "small": (
        {
            "learn": {"chunk": 64},
            "schedule": {"tokens_per_step": 64, "kv_epoch": 10},
            "sessions": {"resident": 4},
            "guard": {"every": 0},
        },
        ["--dtype", "float32", "--num-gpu-blocks-override", "12", "--max-model-len", "1024"],
    ),
    # Every version is kept.
    "cached": (
        {"learn": SHORT, "sessions": {"resident": 4, "version_every": 1}, "guard": {"every": 0}},
        ["--dtype", "float32"],
    ),
    "half": ({"adapt": {"preset": "last"}, "learn": SHORT, "sessions": {"resident": 4}}, ["--dtype", "bfloat16"]),
    # A guard that is stricter than the default, so that a session can be spoiled within a test.
    "server": ({"learn": SHORT, "sessions": {"resident": 6}, "guard": {"max_regression": 0.15}}, []),
}


@contextlib.contextmanager
def running(
    log: Path, module: str, flags: list[str], environment: dict[str, str], model: Path = MODEL, forking: bool = True
) -> Iterator[Served]:
    """``python -m MODULE serve MODEL FLAGS`` in a process group of its own, on a free port; ``forking``: see forked.py."""
    port = processes.free_port()
    command = [sys.executable, "-m", module, "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *FLAGS, *flags]
    path = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
    popen = forked.Popen if forking and "TTT_SPAWN" not in os.environ else subprocess.Popen
    with pytest.MonkeyPatch.context() as patch:
        for key, value in {EXPERIMENTS: "1", "PYTHONPATH": path, **environment}.items():
            patch.setenv(key, value)
        with processes.process_group(command, log, popen=popen) as process:
            processes.wait_healthy(process, port, log)
            yield Served(f"http://127.0.0.1:{port}", log, process)


def bound(numbers: Iterable[int]) -> dict[str, str]:
    """The environment of a server each of whose workers has the core of its number; several may share one."""
    return {"VLLM_CPU_OMP_THREADS_BIND": "|".join(str(number % (os.cpu_count() or 1)) for number in numbers)}


@contextlib.contextmanager
def running_ttt(folder: Path, config: dict[str, Any], flags: list[str], model: Path = MODEL) -> Iterator[Served]:
    """A server with the plugin, whose worker the tests can watch and break. Its audit log is beside its own."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "sessions": {"audit_log": str(folder / "audit.jsonl"), **config.get("sessions", {})}}
    file = folder / "ttt.yaml"
    file.write_text(yaml.safe_dump(config))
    flags = ["--ttt-config", str(file), "--worker-cls", "faulty_worker.FaultyWorker", *flags]
    environment = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_RESPONSES_API_STORE": "1"}
    with running(folder / "server.log", "vllm_ttt.cli", flags, environment, model) as served:
        served.complete(list(range(10, 30)), prompt_logprobs=0)  # vLLM compiles a kernel at the first of these
        yield served


class Stage:
    """Holds the server that runs; another one starts when it has ended."""

    def __init__(self, folder: Path):
        self.folder, self.name, self.served, self.running = folder, "", None, contextlib.ExitStack()

    def get(self, name: str) -> Served:
        if self.name != name:
            self.running.close()
            self.name = name
            self.served = self.running.enter_context(running_ttt(self.folder / name, *SERVERS[name]))
        assert self.served is not None
        return self.served

    def stop(self) -> None:
        self.running.close()
        self.name = ""


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    stage = Stage(tmp_path_factory.mktemp("servers"))
    with stage.running, pytest.MonkeyPatch.context() as patch:
        if worker := os.environ.get("PYTEST_XDIST_WORKER"):  # by itself vLLM's CPU worker takes core 0
            for key, value in bound([int(worker.removeprefix("gw"))]).items():
                patch.setenv(key, value)
        yield stage


@pytest.fixture
def exact(stage: Stage) -> Iterator[Served]:
    yield from at_rest(stage.get("exact"))


@pytest.fixture
def server(reference: Any, stage: Stage) -> Iterator[Served]:
    yield from at_rest(stage.get("server"))


@pytest.fixture
def deep(stage: Stage) -> Iterator[Served]:
    yield from at_rest(stage.get("deep"))


@pytest.fixture
def cached(stage: Stage) -> Iterator[Served]:
    yield from at_rest(stage.get("cached"))


@pytest.fixture
def small(stage: Stage) -> Iterator[Served]:
    yield from at_rest(stage.get("small"))


@pytest.fixture
def half(stage: Stage) -> Iterator[Served]:
    yield from at_rest(stage.get("half"))


def at_rest(served: Served) -> Iterator[Served]:
    """Nothing is under way before a test, and nothing has leaked after it."""
    served.settle()
    yield served
    state = served.settle()
    assert state["pages_free"] == state["pages"], "pages of the backlog have leaked"
    assert state["rows_known"] == state["rows"], "rows of the masters have leaked"


@pytest.fixture(scope="session")
def base_prompts(documents: Documents) -> list[list[int]]:
    """Prompts of 200 tokens, which stock vLLM reads batch-invariantly (``steady``)."""
    return [ids[start : start + 200] for domain in documents.values() for ids in domain[:1] for start in (0, 300)]


@pytest.fixture(scope="session")
def long_prompts(documents: Documents) -> list[list[int]]:
    return [documents["kjv"][0][:1025], documents["py_dns"][0][:700], documents["man_fr"][0][:260]]


@dataclass(frozen=True)
class Stock:
    """What stock vLLM answers. ``alone``: log-probabilities by prompt. The first ``steady`` of a 200-token prompt are the same
    whatever else is in the batch.
    """

    alone: dict[tuple[int, ...], list[float]]
    steady: int


@pytest.fixture(scope="session")
def stock(base_prompts: list[list[int]], long_prompts: list[list[int]], documents: Documents, stage: Stage) -> Stock:
    stage.stop()
    with running(stage.folder / "stock.log", "vllm.entrypoints.cli.main", [], {"VLLM_PLUGINS": ""}) as served:
        assert served.http.get("/v1/ttt/config").status_code == 404
        alone = {tuple(p): logprobs(served.complete(p, **SCORED)) for p in [*base_prompts, *long_prompts]}
        talkers = {f"talker{i}": (None, texts[2]) for i, texts in enumerate(list(documents.values())[:5])}
        steady = len(alone[tuple(base_prompts[0])])
        for answer, prompt in zip(answers_beside(served, 2 * base_prompts, talkers), 2 * base_prompts, strict=True):
            same = [mine == theirs for mine, theirs in zip(logprobs(answer), alone[tuple(prompt)], strict=True)]
            steady = min(steady, [*same, False].index(False))
    return Stock(alone, steady)


@pytest.fixture(scope="session")
def reference(stock: Stock) -> dict[tuple[int, ...], list[float]]:
    """Log-probabilities of stock vLLM, each prompt alone."""
    return stock.alone


@pytest.fixture(scope="session")
def steady(stock: Stock) -> int:
    """How many log-probabilities of a 200-token prompt and its answer are stock vLLM's own in every batch.

    The prompt's and that of the first token everywhere; the others, computed a few rows at a time, not on CPUs with AMX, where
    vLLM's products of small matrices have one kernel for up to four rows and another for more.
    """
    assert stock.steady >= 200, "stock vLLM does not serve the prompts batch-invariantly"
    return stock.steady


@pytest.fixture(scope="session")
def models() -> dict[torch.dtype, nn.Module]:
    """The model that is served, for the oracle."""
    torch.set_num_threads(1)
    return {dtype: load_model(MODEL, dtype) for dtype in (torch.float32, torch.bfloat16)}


@pytest.fixture
def oracle(models: dict[torch.dtype, nn.Module]) -> Callable[[], Oracle]:
    """Fresh sessions of the plain loop, float32 throughout as ``exact`` is."""
    return lambda: Oracle(models[torch.float32], config_of("exact"))


@pytest.fixture
def deep_oracle(models: dict[torch.dtype, nn.Module]) -> Callable[[], Oracle]:
    """The same for ``deep``."""
    return lambda: Oracle(models[torch.float32], config_of("deep"))


def config_of(server: str) -> TTTConfig:
    return parse_config(SERVERS[server][0])
