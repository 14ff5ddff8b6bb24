"""What surrounds the API server: each of several loads the plugin before it reads the flags, and spans say what was learned."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ttt.patches import api_servers, tracing

pytestmark = pytest.mark.unit


def test_each_of_several_api_servers_loads_the_plugin_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own, where nothing has been loaded yet, as vLLM starts them."""
    import multiprocessing
    import pickle

    spawn = multiprocessing.get_context("spawn")

    from vllm.v1.utils import APIServerProcessManager

    started: list[Any] = []

    class Context:
        def RawArray(self, *_: Any) -> Any:
            return None

        def Process(self, target: Any, **_: Any) -> Any:
            started.append(pickle.loads(pickle.dumps(target)))
            return SimpleNamespace(start=lambda: None, sentinel=0, name="p", is_alive=lambda: False, pid=None)

    monkeypatch.setattr(APIServerProcessManager, "__init__", inspect.unwrap(APIServerProcessManager.__init__))
    api_servers.install()
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: Context())
    listeners: list[Any] = [
        SimpleNamespace(address="a", socket=None, cleanup=lambda: None, close=lambda: None) for _ in range(2)
    ]
    APIServerProcessManager("address", None, SimpleNamespace(), 2, listeners, listeners)  # type: ignore[arg-type]
    assert len(started) == 2
    queue = spawn.SimpleQueue()
    process = spawn.Process(target=started[0].func, args=(_look, queue))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert queue.get() is True


def _look(queue: Any) -> None:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_ttt.patches import _contract

    queue.put(getattr(EngineArgs.from_cli_args.__func__, _contract.MARK, False))  # type: ignore[attr-defined]


def test_spans_of_sessions_say_the_version() -> None:
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from vllm.v1.engine.output_processor import OutputProcessor

    tracing.install()
    spans = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    stats = SimpleNamespace(
        arrival_time=1.0, scheduled_ts=1.0, queued_ts=1.0, first_token_ts=2.0, last_token_ts=3.0, first_token_latency=1.0,
        num_generation_tokens=4,
    )  # fmt: skip
    request = SimpleNamespace(
        stats=stats, prompt_token_ids=[1, 2], prompt_embeds=None, external_req_id="r", top_p=None, max_tokens_param=None,
        temperature=None, n=1,
    )  # fmt: skip
    said = ({"ttt": {"version": 7, "tokens_learned": 99}}, None, {"ttt": {"status": 429, "message": "full"}}, {"other": 1})
    for params in said:
        output = SimpleNamespace(trace_headers=None, kv_transfer_params=params)
        OutputProcessor.do_tracing(None, output, request, SimpleNamespace(iteration_timestamp=4.0))  # type: ignore[arg-type]
    first, *others = [dict(span.attributes or {}) for span in spans.get_finished_spans()]
    assert (first["vllm_ttt.version"], first["vllm_ttt.tokens_learned"]) == (7, 99)
    assert len(others) == 3
    for other in others:
        assert not any(name.startswith("vllm_ttt") for name in other)
    assert set(first) - set(others[0]) == {"vllm_ttt.version", "vllm_ttt.tokens_learned"}, "vLLM's own are all there"
