"""Requests with n > 1, as vLLM makes them and in vLLM's own scheduler; and requests whose names only look like theirs."""

from __future__ import annotations

from typing import Any

import pytest
from test_deep_scheduler import PROMPT, Engine
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.parallel_sampling import ParentRequest
from vllm.v1.request import Request, RequestStatus

from vllm_ttt.types import SAMPLES

pytestmark = pytest.mark.unit

LONGER = [*PROMPT, *range(3000, 3060)]


class Answering(Engine):
    """Keeps what each request's last output says, in the order in which they end."""

    def __init__(self) -> None:
        super().__init__("last")
        self.said: dict[str, dict[str, Any]] = {}
        scheduler: Any = self.scheduler
        update = scheduler.update_from_output

        def listen(*args: Any) -> Any:
            outputs = update(*args)
            for output in outputs.get(0).outputs if 0 in outputs else ():
                if output.finish_reason is not None:
                    self.said[output.request_id] = output.kv_transfer_params["ttt"]
            return outputs

        scheduler.update_from_output = listen

    def ask(self, name: str, prompt: list[int], n: int = 1, outputs: tuple[int, ...] = (1,), **knobs: Any) -> list[str]:
        """As `AsyncLLM.add_request` does, but that each sample may have its own length; the ids that vLLM gives."""
        params = SamplingParams(max_tokens=1, n=n, temperature=1, ignore_eos=True, extra_args={"session_id": "a", **knobs})
        request = EngineCoreRequest(name, prompt, None, params, None, 0.0, None, None, None)
        InputProcessor.assign_request_id(request)
        parent, names = ParentRequest(request), []
        for i in range(n):
            if n > 1:
                request.request_id, request.sampling_params = parent.get_child_info(i)
            made = Request.from_engine_core_request(request, self.hasher)
            made.max_tokens = outputs[i]
            self.scheduler.add_request(made)
            names.append(made.request_id)
        return names

    def settle(self, request: str, pairs: int) -> None:
        """The worker's report: all of the request has been learned, as one chunk."""
        self.learned(request, "a", 1)
        self.report.chunks[-1].end = self.report.chunks[-1].tokens = pairs
        self.step()


@pytest.mark.parametrize("name", ["abc", "20261124_run7", "1_x", "0_x", "1_1_1_", "7", "1_", "_", "²_x"])
def test_a_request_may_have_any_name(name: str) -> None:
    engine = Answering()
    (request,) = engine.ask(name, PROMPT)
    assert engine.session("a").tokens_seen == len(PROMPT) - 1
    assert list(engine.session("a").open) == [request], "it is to be learned"
    engine.drain()
    assert engine.said[request]["tokens_learned"] == len(PROMPT) - 1


@pytest.mark.parametrize("told", [10**12, 1, -1, "many"])
def test_nobody_else_says_how_many_samples_there_are(told: Any) -> None:
    """Over HTTP it is refused (test_frontend_patches.py); a script is not believed."""
    engine = Answering()
    samples = engine.ask("abc", PROMPT, 2, (1, 1), **{SAMPLES: told})
    engine.drain()
    assert {*engine.said} == {*samples}
    assert not engine.scheduler.ttt_arrivals.beginning


@pytest.mark.parametrize("name", ["abc", "1_x", "0_x", "1_1_1_", "7"])
@pytest.mark.parametrize("outputs", [(1, 1, 1), (1, 2, 3), (3, 2, 1)])
def test_all_samples_say_what_the_first_has_learned(name: str, outputs: tuple[int, ...]) -> None:
    engine = Answering()
    first, *_ = samples = engine.ask(name, PROMPT, 3, outputs)
    assert list(engine.session("a").open) == [first]
    assert engine.session("a").tokens_seen == len(PROMPT) - 1, "once"
    engine.drain()
    assert {engine.said[sample]["tokens_learned"] for sample in samples} == {len(PROMPT) - 1}


@pytest.mark.parametrize("outputs", [(1, 1), (2, 1), (1, 2)])
def test_samples_of_a_later_turn_say_what_is_new(outputs: tuple[int, ...]) -> None:
    engine = Answering()
    (request,) = engine.ask("turn", PROMPT)
    engine.drain()
    engine.settle(request, len(PROMPT) - 1)
    engine.ask("next", LONGER, 2, outputs)
    engine.drain()
    _, *said = engine.said.values()
    assert [one["tokens_learned"] for one in said] == [len(LONGER) - len(PROMPT)] * 2


@pytest.mark.parametrize("outputs", [(20, 9), (9, 20), (20, 20)])
def test_what_is_said_last_counts_the_answer_that_is_learned(outputs: tuple[int, ...]) -> None:
    """vLLM hands on what the sample said that ended last."""
    engine = Answering()
    engine.ask("both", PROMPT, 2, outputs, ttt_learn_output=1)
    engine.drain()
    assert [*engine.said.values()][-1]["tokens_learned"] == len(PROMPT) - 1 + outputs[0]


def test_a_sample_that_comes_when_the_first_has_left() -> None:
    """It belongs to the first all the same: it does not wait until its own prompt has been learned."""
    engine = Answering()
    scheduler: Any = engine.scheduler
    add, late = scheduler.add_request, []
    scheduler.add_request = lambda request: late.append(request) if request.request_id[0] == "1" else add(request)
    engine.ask("late", PROMPT, 2, (1, 1))
    engine.drain()
    add(late[0])
    engine.drain()
    first, second = engine.said.values()
    assert first == second == {"version": 0, "tokens_learned": len(PROMPT) - 1}
    assert engine.session("a").tokens_seen == len(PROMPT) - 1


def arriving_one_by_one(engine: Answering, name: str, n: int, outputs: int = 1) -> list[Request]:
    """The first is in the engine, the others are still to come."""
    scheduler: Any = engine.scheduler
    add, late = scheduler.add_request, list[Request]()
    scheduler.add_request = lambda request: add(request) if request.request_id.startswith("0_") else late.append(request)
    engine.ask(name, PROMPT, n, (outputs,) * n)
    scheduler.add_request = add
    return late


def still(output: Any) -> list[int]:
    return output.ttt.still


def test_the_session_is_served_as_it_is_until_all_samples_have_begun() -> None:
    engine = Answering()
    second, third = arriving_one_by_one(engine, "abc", 3)
    assert still(engine.step()) == [], "what was sent before may be served with what it has taught"
    session = engine.session("a").adapter
    assert still(engine.step()) == [session], "the others have not arrived"
    engine.scheduler.add_request(second)
    assert still(engine.step()) == [session]
    assert still(engine.step()) == [session]
    engine.scheduler.add_request(third)
    assert still(engine.step()) == [session], "before the batch with which the last begins, too"
    assert still(engine.step()) == []


def test_nobody_waits_for_samples_whose_client_has_left() -> None:
    engine = Answering()
    arriving_one_by_one(engine, "abc", 3, outputs=9)
    engine.step()
    assert still(engine.step()) == [engine.session("a").adapter]
    engine.scheduler.finish_requests(list(engine.scheduler.requests), RequestStatus.FINISHED_ABORTED)
    assert still(engine.step()) == []


def test_a_sample_that_is_refused_is_not_waited_for() -> None:
    engine = Answering()
    (second,) = arriving_one_by_one(engine, "abc", 2)
    engine.step()
    second.lora_request = LoRARequest("mine", 7, "/mine")
    engine.scheduler.add_request(second)
    engine.step()
    assert still(engine.step()) == []


def test_samples_do_not_read_and_learn_in_turns() -> None:
    engine = Answering()
    (request,) = engine.ask("abc", PROMPT, 2, (1, 1), ttt_interleave=1)[:1]
    engine.step()
    assert engine.said[request]["status"] == 400
    assert "one version" in engine.said[request]["message"]


def told(engine: Answering) -> dict[str, int | None]:
    """By sample, with which status it was refused; None: it was answered."""
    return {request.rpartition("-")[0] or request: said.get("status") for request, said in engine.said.items()}


def waiting(most: int) -> tuple[Answering, str]:
    """A session whose first request is still to be learned: what comes now waits for it, and ``most`` may."""
    engine = Answering()
    (request,) = engine.ask("one", PROMPT)
    engine.drain()
    engine.said.clear()
    engine.scheduler.ttt_holding.most = most
    return engine, request


def test_samples_are_let_in_or_refused_together() -> None:
    engine, first = waiting(3)
    engine.ask("two", PROMPT, 2, (1, 1))
    engine.ask("three", PROMPT, 2, (1, 1))
    engine.step()
    assert told(engine) == {"0_three": 429, "1_three": 429}, "there is room for one of them"
    assert "3 may" in engine.said[next(iter(engine.said))]["message"]
    engine.said.clear()
    engine.settle(first, len(PROMPT) - 1)
    engine.drain()
    assert told(engine) == {"0_two": None, "1_two": None}


@pytest.mark.parametrize("refused", [False, True])
def test_what_the_first_sample_is_told_holds_for_those_that_come_later(refused: bool) -> None:
    engine, _ = waiting(1 if refused else 2)
    (second,) = arriving_one_by_one(engine, "two", 2)
    engine.scheduler.ttt_holding.most = 2 if refused else 1
    engine.scheduler.add_request(second)
    engine.step()
    assert told(engine) == ({"0_two": 429, "1_two": 429} if refused else {}), "else both wait"
    assert engine.scheduler.ttt_holding.count == (0 if refused else 2)


def test_only_so_many_refusals_are_remembered() -> None:
    engine, _ = waiting(1)
    for number in range(70):
        engine.ask(f"r{number}", PROMPT, 2, (1, 1))
    assert len(engine.scheduler.ttt_arrivals.refused) == 64
