"""What the engine refuses, whichever way a request or an adapter comes in: in vLLM's own scheduler, without a worker."""

from __future__ import annotations

from typing import Any

import pytest
from test_deep_scheduler import Engine
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTER_PATH
from vllm_ttt.worker.cpu_worker import TTTCPUWorker
from vllm_ttt.worker.slots import SessionLoRAManager

pytestmark = pytest.mark.unit

CHUNK = 256
FOREIGN = LoRARequest("mine", 6, "/somewhere/mine")
DISGUISED = LoRARequest("mine", 6, f"{ADAPTER_PATH}6")


def submit(engine: Engine, params: dict[str, Any], prompt: list[int] | None = None, **request: Any) -> RequestError | None:
    """Send a request and step once; what the engine says of it where it is refused."""
    sampling = SamplingParams(max_tokens=1, **params)
    made = Request("r", prompt or [*range(1000, 1100)], sampling, None, block_hasher=engine.hasher, **request)
    engine.scheduler.add_request(made)
    assert engine.scheduler.has_requests(), "the engine would rest, and nobody would be told"
    refused = [error for of, error in engine.scheduler.ttt_refused if of is made]
    engine.step()
    return refused[0] if refused else None


@pytest.mark.parametrize("adapter", [FOREIGN, DISGUISED], ids=["a path", "a session's path"])
@pytest.mark.parametrize("extra", [{}, {"session_id": "a"}], ids=["alone", "with a session"])
def test_a_request_that_brings_an_adapter(adapter: LoRARequest, extra: dict[str, Any]) -> None:
    engine = Engine("last")
    refused = submit(engine, {"extra_args": extra}, lora_request=adapter)
    assert refused is not None
    assert refused.status == 400
    assert "an adapter would share their ids" in refused.message
    assert not engine.scheduled, "it must not run"
    assert not engine.scheduler.ttt_ledger.by_adapter, "no session was made"


def test_an_adapter_that_is_given_to_the_worker() -> None:
    """`LLM.llm_engine.add_lora`, `AsyncLLM.add_lora` and collective_rpc all end here."""
    for adapter in (FOREIGN, DISGUISED):
        with pytest.raises(RequestError, match="no LoRA adapter is served beside --plugin ttt"):
            TTTCPUWorker.add_lora(object.__new__(TTTCPUWorker), adapter)
    with pytest.raises(RequestError, match="no LoRA adapter is served beside --plugin ttt"):
        SessionLoRAManager._load_adapter(object.__new__(SessionLoRAManager), FOREIGN)


SEEDED = {"temperature": 1.0, "seed": 1}
LONG = [*range(1000, 1000 + 450)]


def test_a_seed_and_an_interleaved_prompt() -> None:
    """vLLM's CPU runner ends of a seeded prompt that is read in parts."""
    engine = Engine("last")
    refused = submit(engine, {**SEEDED, "extra_args": {"session_id": "a", "ttt_interleave": 1}}, LONG)
    assert refused is not None
    assert refused.status == 400
    assert "cannot sample with a seed on a CPU" in refused.message
    assert not engine.scheduled


@pytest.mark.parametrize(
    ("params", "first"),
    [(SEEDED, len(LONG)), ({"temperature": 0.0, "seed": 1}, CHUNK), ({"temperature": 1.0}, CHUNK)],
    ids=["seeded", "greedy", "no seed"],
)
def test_where_prompts_are_interleaved_anyway_a_seeded_one_is_read_whole(params: dict[str, Any], first: int) -> None:
    engine = Engine("last", learn={"scales": [1], "interleave": True})
    assert submit(engine, {**params, "extra_args": {"session_id": "a"}}, LONG) is None
    assert engine.scheduled == {"r": first}
