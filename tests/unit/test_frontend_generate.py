"""AsyncLLM.generate as patched, over vLLM's own generate with a fake engine behind it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.exceptions import GracefulHTTPError, VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM

from vllm_ttt import engine_args
from vllm_ttt.frontend import engines, receipt
from vllm_ttt.patches import frontend

pytestmark = pytest.mark.unit

PROMPT = {"type": "token", "prompt_token_ids": [1, 2]}


@pytest.fixture(autouse=True)
def _patched() -> None:
    frontend.install()


def output(kv: dict[str, Any] | None, finished: bool) -> RequestOutput:
    return RequestOutput("r", None, [1], None, [], finished, kv_transfer_params=kv)


class FakeLLM:
    """What ``AsyncLLM.generate`` uses of its object; gives the outputs that it is made with, then waits forever."""

    log_requests = False
    vllm_config = SimpleNamespace(additional_config=engine_args()["additional_config"])

    def __init__(self, *outputs: RequestOutput):
        self.outputs, self.aborted, self.added = list(outputs), [], {}

    async def add_request(self, request_id: str, _prompt: Any, _params: Any, **kwargs: Any) -> Any:
        self.added = kwargs
        return SimpleNamespace(
            request_id=request_id,
            get_nowait=lambda: self.outputs.pop(0) if self.outputs else None,
            get=asyncio.Event().wait,
            close=lambda: None,
        )

    async def abort(self, request_id: str, **_: Any) -> None:
        self.aborted.append(request_id)

    def generate(self, prompt: Any = PROMPT, extra: dict[str, Any] | None = None, **kwargs: Any) -> Any:
        params = SimpleNamespace(extra_args=extra)
        return AsyncLLM.generate(cast(Any, self), prompt, cast(Any, params), "r", **kwargs)


def collect(stream: Any) -> list[RequestOutput]:
    async def run() -> list[RequestOutput]:
        return [out async for out in stream]

    return asyncio.run(run())


def test_what_the_engine_says_goes_into_the_receipt() -> None:
    first = output({"ttt": {"version": 2, "tokens_learned": 0}, "remote": 1}, finished=False)
    last = output({"ttt": {"version": 2, "tokens_learned": 9}}, finished=True)
    shared = first.kv_transfer_params
    note = receipt.Receipt(session="s")
    token = receipt.current.set(note)
    try:
        outs = collect(FakeLLM(first, last).generate(session_id="-/s"))
    finally:
        receipt.current.reset(token)
    assert [out.kv_transfer_params for out in outs] == [{"remote": 1}, None]
    assert shared is not None
    assert "ttt" in shared  # the engine may share it between outputs
    assert note.answer() == {"session_id": "s", "version": 2, "tokens_learned": 9}
    assert note.finished


def test_an_aborted_request_keeps_what_was_said_last() -> None:
    outs = [output({"ttt": {"version": 2, "tokens_learned": 9}}, finished=False), output(None, finished=True)]
    token = receipt.current.set(note := receipt.Receipt(session="s"))
    try:
        collect(FakeLLM(*outs).generate(session_id="-/s"))
    finally:
        receipt.current.reset(token)
    assert note.answer() == {"session_id": "s", "version": 2, "tokens_learned": 9}


@pytest.mark.parametrize(("status", "error"), [(400, VLLMValidationError), (429, GracefulHTTPError)])
def test_what_the_engine_refuses_is_an_error(status: int, error: type[Exception]) -> None:
    llm = FakeLLM(output({"ttt": {"status": status, "message": "at most 3 sessions"}}, finished=True))
    with pytest.raises(error, match="at most 3 sessions") as caught:
        collect(llm.generate(session_id="-/s"))
    assert create_error_response(caught.value).error.code == status


def test_without_a_session_vllms_own_generator_is_returned() -> None:
    kv = {"remote": 1}
    stream = FakeLLM(output(kv, finished=True)).generate()
    assert stream.ag_code is AsyncLLM.generate.__wrapped__.__code__  # pyright: ignore[reportFunctionMemberAccess]
    assert collect(stream)[0].kv_transfer_params is kv


def test_without_a_receipt_the_session_is_served_all_the_same() -> None:
    llm = FakeLLM(output({"ttt": {"version": 0, "tokens_learned": 0}}, finished=True))
    assert collect(llm.generate(session_id="s"))[0].kv_transfer_params is None
    assert llm.added["session_id"] == "-/s"


@pytest.mark.parametrize("asked", [None, 0, 1], ids=["nobody says", "a balancer says 0", "a balancer says 1"])
def test_of_several_engines_the_one_that_has_the_session_is_named(asked: int | None) -> None:
    llm: Any = FakeLLM(*(output({"ttt": {"version": 0, "tokens_learned": 0}}, finished=True) for _ in range(3)))
    llm.engine_core = SimpleNamespace(core_engines=[b"0", b"1"])
    collect(llm.generate(session_id="carol", data_parallel_rank=asked))
    assert llm.added["data_parallel_rank"] == 1
    collect(llm.generate(data_parallel_rank=asked))
    assert llm.added["data_parallel_rank"] == asked, "of a request without a session vLLM decides"
    llm.engine_core = SimpleNamespace(core_engines=[b"0"])
    collect(llm.generate(session_id="carol", data_parallel_rank=asked))
    assert llm.added["data_parallel_rank"] == asked


@pytest.mark.parametrize("how", ["close", "cancel"])
def test_a_client_that_leaves_aborts_the_request(how: str) -> None:
    llm = FakeLLM(output(None, finished=False))

    async def run() -> None:
        stream = llm.generate(session_id="-/s")
        await anext(stream)
        if how == "close":
            await stream.aclose()
            return
        task = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert llm.aborted == ["r"]


async def _streamed() -> Any:
    yield None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"prompt": {"type": "embeds", "prompt_embeds": object()}}, "prompt_embeds have none"),
        ({"prompt": {"prompt_embeds": object()}}, "prompt_embeds have none"),
        ({"prompt": SimpleNamespace(prompt_embeds=object())}, "prompt_embeds have none"),
        ({"prompt": _streamed()}, "in one piece"),
        ({"lora_request": object()}, "LoRA adapter"),
        ({"session_id": "a b"}, "1 to 128 characters"),
        ({"extra": {"ttt_learn": {"a": 1}}}, "ttt_learn must be 0 or 1"),
        ({"extra": {"ttt_rate": 1}, "session_id": None}, "ttt_learn_output"),
    ],
)
def test_refused_before_anything_is_generated(kwargs: dict[str, Any], message: str) -> None:
    llm = FakeLLM()
    with pytest.raises(VLLMValidationError, match=message):
        llm.generate(**{"session_id": "-/s", **kwargs})
    assert not llm.added


def test_adapters_go_on_to_the_engine_with_the_preset_head() -> None:
    llm, adapter = FakeLLM(output(None, finished=True)), object()
    llm.vllm_config = SimpleNamespace(additional_config=engine_args("head")["additional_config"])
    assert len(collect(llm.generate(session_id="-/s", lora_request=adapter))) == 1
    assert llm.added["lora_request"] is adapter


def test_over_http_sampling_parameters_name_no_session() -> None:
    llm = FakeLLM(output(None, finished=True))
    token = receipt.current.set(receipt.Receipt())
    try:
        with pytest.raises(VLLMValidationError, match="X-Session-ID"):
            llm.generate(extra={"session_id": "other-tenant/s"})
    finally:
        receipt.current.reset(token)
    # From Python it is the engine that takes it.
    assert len(collect(llm.generate(extra={"session_id": "s"}))) == 1


def test_who_waits_for_an_engine_that_ends_is_answered() -> None:
    """vLLM's HTTP server waits for all of its requests before it ends: one that nobody answers would keep it for ever."""

    async def run() -> str:
        waiting = asyncio.get_running_loop().create_future()
        answered = asyncio.get_running_loop().create_future()
        answered.set_result("in time")
        core = SimpleNamespace(shutdown=lambda timeout: None, utility_results={1: waiting, 2: answered})
        client: Any = SimpleNamespace(engine_core=core)
        await asyncio.get_running_loop().run_in_executor(None, AsyncLLM.shutdown, client)
        assert answered.result() == "in time"
        with pytest.raises(RuntimeError) as error:
            await asyncio.wait_for(waiting, 20)
        return str(error.value)

    assert "shutting down" in asyncio.run(run())


class SharingLLM(FakeLLM):
    """A server that shares its state dir; ``claims`` are what its engine answers when it is asked for a session."""

    vllm_config = SimpleNamespace(
        additional_config=engine_args(config={"sessions": {"shared": True, "state_dir": "s"}})["additional_config"]
    )

    def __init__(self, claims: list[bool], *outputs: RequestOutput):
        super().__init__(*outputs)
        self.claims, self.asked, self.engine_core = claims, [], self

    async def call_utility_async(self, *call: Any) -> dict[str, Any]:
        self.asked.append(call)
        return {"ok": True, "result": {"held": self.claims.pop(0) if len(self.claims) > 1 else self.claims[0]}}


def test_a_session_is_claimed_before_the_engine_sees_its_request(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "_PAUSE", 0.0)
    llm = SharingLLM([False, False, True], output({"ttt": {"version": 0, "tokens_learned": 0}}, finished=True))
    add = llm.add_request

    async def add_request(*args: Any, **kwargs: Any) -> Any:
        assert llm.asked == [("ttt_admin", "claim", "k", "s")] * 3
        return await add(*args, **kwargs)

    llm.add_request = add_request
    assert collect(llm.generate(session_id="k/s"))
    assert llm.added
    collect(SharingLLM([False], output(None, finished=True)).generate())  # without a session nobody is asked


def test_one_that_another_server_keeps_is_a_409_that_says_when_to_ask_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "HANDOVER", 0.0)
    monkeypatch.setattr(engines, "_PAUSE", 0.0)
    llm = SharingLLM([False])
    token = receipt.current.set(note := receipt.Receipt(session="s"))
    try:
        with pytest.raises(GracefulHTTPError, match="another server") as caught:
            collect(llm.generate(session_id="k/s"))
    finally:
        receipt.current.reset(token)
    assert create_error_response(caught.value).error.code == 409
    assert note.retry_after == 2
    assert not llm.added, "the engine has seen the request"
