"""What the engine refuses, whichever way a request or an adapter comes in: in vLLM's own scheduler, without a worker."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_deep_scheduler import Engine
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.engine import FinishReason
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from vllm_ttt.engine.ledger import Open, Session
from vllm_ttt.engine.limits.admission import check_adapter, other_model
from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTER_PATH, SessionKey
from vllm_ttt.worker.cpu_worker import TTTCPUWorker
from vllm_ttt.worker.serve.slots import SessionLoRAManager

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
    worker = object.__new__(TTTCPUWorker)
    worker.idle = torch.ones(())  # as with presets that have vLLM's slots
    for adapter in (FOREIGN, DISGUISED):
        with pytest.raises(RequestError, match="no LoRA adapter is served beside --plugin ttt"):
            worker.add_lora(adapter)
    with pytest.raises(RequestError, match="no LoRA adapter is served beside --plugin ttt"):
        SessionLoRAManager._load_adapter(object.__new__(SessionLoRAManager), FOREIGN)


def adapter_of(folder: Path, *modules: str) -> LoRARequest:
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps({"target_modules": modules}))
    return LoRARequest(folder.name, 1 + len(modules), str(folder))


def test_adapters_beside_the_preset_head(tmp_path: Path) -> None:
    """Any but those that the step would not know of, or that would share blocks with the base model."""
    plain, head = adapter_of(tmp_path / "plain", "q_proj", "down_proj"), adapter_of(tmp_path / "head", "q_proj", "lm_head")
    check_adapter(SimpleNamespace(lora_request=None), False)  # type: ignore[arg-type]
    check_adapter(SimpleNamespace(lora_request=plain), False)  # type: ignore[arg-type]
    for adapter, says in ((head, "the adapter head changes lm_head"), (DISGUISED, "no LoRA adapter is served")):
        with pytest.raises(RequestError, match=says):
            check_adapter(SimpleNamespace(lora_request=adapter), False)  # type: ignore[arg-type]


def test_a_session_stays_with_the_model_that_it_began_with() -> None:
    """As soon as it learns; and after a restart, where that was saved with it."""

    def named(name: str) -> Any:
        return SimpleNamespace(lora_request=LoRARequest(name, 1, "/x") if name else None)

    session = Session(SessionKey("-", "a"), 1, 8)
    for name in ("", "style", "other"):  # it has learned nothing: it begins anew
        assert other_model(session, named(name)) is None
    session.open["r"] = Open(1)
    error = other_model(session, named("style"))
    assert error is not None
    assert error.status == 409
    assert "session a has learned with the adapter other, and this request names the adapter style" in error.message
    session.open.clear()
    session.version = 2
    again = Session(SessionKey("-", "a"), 1, 8)
    again.from_state(session.to_state())
    assert other_model(again, named("other")) is None
    assert "names the base model" in other_model(again, named("")).message  # type: ignore[union-attr]


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
    engine = Engine("last", learn={"interleave": True, "chunk": CHUNK})
    assert submit(engine, {**params, "extra_args": {"session_id": "a"}}, LONG) is None
    assert engine.scheduled == {"r": first}


def test_a_pause_that_keeps_requests_keeps_learning_still() -> None:
    """What the engine core waits for, before it says that it is paused, is that the scheduler has nothing to do."""
    engine = Engine("last")
    engine.send("a", learn=True, outputs=3)
    engine.report.busy = True
    engine.step()
    for state, works in ((PauseState.PAUSED_ALL, False), (PauseState.UNPAUSED, True), (PauseState.PAUSED_NEW, True)):
        engine.scheduler.set_pause_state(state)
        assert engine.scheduler.has_requests() is works, state
    engine.scheduler.set_pause_state(PauseState.UNPAUSED)
    engine.drain()
    assert engine.session("a").tokens_seen > 0


def test_what_is_refused_from_python_says_why() -> None:
    """There is no front end that would make an error of it: the request ends, with a status and a message."""
    engine = Engine("last", sessions={"resident": 4, "per_key": 1})
    engine.send("a", learn=True)
    engine.drain()
    made = Request("r", [1, 2, 3], SamplingParams(extra_args={"session_id": "b"}), None, block_hasher=engine.hasher)
    engine.scheduler.add_request(made)
    outputs: dict[int, Any] = {}
    engine.scheduler._refuse(outputs)
    (output,) = outputs[0].outputs
    assert output.finish_reason == FinishReason.ABORT
    assert not output.new_token_ids
    assert output.kv_transfer_params["ttt"]["status"] == 429
    assert "1 sessions" in output.kv_transfer_params["ttt"]["message"]


@pytest.mark.parametrize("balanced", [False, True])
def test_a_balancer_hears_that_a_refused_request_is_over(balanced: bool) -> None:
    """Of several engines; of one nobody counts."""
    engine = Engine("last", sessions={"resident": 4, "per_key": 1})
    engine.send("a", learn=True)
    engine.drain()
    if balanced:
        engine.scheduler.finished_req_ids_dict = defaultdict(set, {0: {"ended"}})
    refused = [engine.send(name, learn=True) for name in "bc"]
    outputs = engine.scheduler.update_from_output(engine.scheduler.schedule(), ModelRunnerOutput([], {}, []))
    assert [output.request_id for output in outputs[0].outputs] == refused
    assert outputs[0].finished_requests == ({"ended", *refused} if balanced else None)
