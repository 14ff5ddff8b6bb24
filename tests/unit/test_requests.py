"""What a session knows of requests that ended early: at a stop string, or because the client left; in vLLM's own scheduler."""

from __future__ import annotations

from typing import Any

import pytest
import tokenizers.decoders
from hypothesis import given
from hypothesis import strategies as st
from test_deep_scheduler import MODEL, PROMPT, Engine
from test_filter import NO_TEXT, CountingStream
from transformers import AutoTokenizer
from vllm.sampling_params import SamplingParams
from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer
from vllm.v1.request import Request, RequestStatus

from vllm_ttt.engine.ledger import Session
from vllm_ttt.engine.limits.stops import Stops
from vllm_ttt.engine.requests import Attached
from vllm_ttt.types import Knobs, SessionKey

pytestmark = pytest.mark.unit

TOKENIZER: Any = AutoTokenizer.from_pretrained(MODEL)
TEXT = "The quick brown fox, as they say, jumps over the lazy dog; and that was that. Ärger über Öl: 42 €, naïve."
#: The token that the stand-in for the worker generates.
SEVEN = TOKENIZER.decode([7])


class Asking(Engine):
    def ask(self, prompt: list[int] = PROMPT, outputs: int = 1, stop: list[str] | None = None, **knobs: int) -> str:
        """A request of the session a; its prompt's start once it has begun."""
        self.number += 1
        extra = {"session_id": "a", **knobs}
        params = SamplingParams(max_tokens=outputs, ignore_eos=True, stop=stop, extra_args=extra)
        request = Request(f"r{self.number}", prompt, params, None, block_hasher=self.hasher)
        self.scheduler.add_request(request)
        self.step()
        return request.request_id

    def leave(self, request: str) -> None:
        self.scheduler.finish_requests(request, RequestStatus.FINISHED_ABORTED)

    def start(self, request: str) -> int:
        """The first of its pairs to be learned."""
        return self.scheduler.ttt_requests[request].start

    def settle(self, request: str, pairs: int) -> None:
        self.learned(request, "a", 1)
        self.report.chunks[-1].end = self.report.chunks[-1].tokens = pairs
        self.step()


@pytest.mark.parametrize("left", ["before it was learned", "while it was answered"])
def test_a_request_that_was_given_up_is_learned_once(left: str) -> None:
    engine = Asking("last")
    first = engine.ask(outputs=50)
    if left == "before it was learned":
        engine.leave(first)
        engine.settle(first, len(PROMPT) - 1)
    else:
        engine.settle(first, len(PROMPT) - 1)
        engine.leave(first)
    again = engine.ask(outputs=50)
    assert engine.start(again) == len(PROMPT) - 1
    engine.settle(again, len(PROMPT) - 1)
    engine.drain()
    third = engine.ask(outputs=50)
    assert engine.start(third) == 0, "that was answered to its end: this one is sent on purpose"


def test_what_was_given_up_halfway_is_learned_from_there() -> None:
    engine = Asking("last")
    first = engine.ask(outputs=50)
    engine.leave(first)
    engine.settle(first, 64)
    assert engine.start(engine.ask(outputs=50)) == 64


def test_a_stop_string_is_no_giving_up() -> None:
    """vLLM's API server aborts a request whose answer has come to a stop string, as it does when the client leaves."""
    engine = Asking("last")
    first = engine.ask(outputs=50, stop=[SEVEN * 3])
    engine.settle(first, len(PROMPT) - 1)
    engine.step()
    engine.leave(first)
    assert engine.start(engine.ask(outputs=50)) == 0


def test_a_stop_string_is_not_learned() -> None:
    engine = Asking("last")
    request = engine.ask(outputs=50, stop=[SEVEN * 3], ttt_learn_output=1)
    for _ in range(5):
        engine.step()
    attached = engine.scheduler.ttt_requests[request]
    assert (attached.outputs, attached.shown) == (6, 0)
    assert attached.accepted(engine.scheduler.ttt_config.learn) == len(PROMPT) - 1
    seen = engine.session("a").tokens_seen
    engine.leave(request)
    output = engine.scheduler.schedule()
    assert output.ttt.ended == {request: len(PROMPT) - 1}  # type: ignore[attr-defined]
    assert seen == len(PROMPT) - 1


def test_each_token_is_decoded_once_however_long_the_stop_string_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a client with a long stop string has the whole answer decoded at each token, in the loop that serves everybody."""
    request = Request("r", [1, 2], SamplingParams(max_tokens=100, stop=["x" * 100_000]), None)
    attached = Attached(request, Session(SessionKey("-", "s"), 1, 4), Knobs(), True, 1, 2)
    stops, decoded = Stops(Engine("last").config.model_config), list[int]()
    real = FastIncrementalDetokenizer.decode_next

    def count(self: FastIncrementalDetokenizer, token: int) -> str:
        decoded.append(token)
        return real(self, token)

    monkeypatch.setattr(FastIncrementalDetokenizer, "decode_next", count)
    ids = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    for token in ids:
        request.append_output_token_ids(token)
        attached.outputs += 1
        stops.look(attached)
        stops.look(attached)
    assert decoded == ids
    assert attached.stopped is None


class Slow:
    """A tokenizer that is not of the library tokenizers, as vLLM's detokenizer uses one."""

    is_fast = False

    def __init__(self) -> None:
        #: tokens that have been decoded
        self.decoded = 0

    def __len__(self) -> int:
        return len(TOKENIZER)

    def get_added_vocab(self) -> dict[str, int]:
        return {}

    def convert_ids_to_tokens(self, ids: list[int], skip_special_tokens: bool = False) -> list[str]:
        return TOKENIZER.convert_ids_to_tokens(ids, skip_special_tokens)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        self.decoded += len(tokens)
        return TOKENIZER.convert_tokens_to_string(tokens)


def looking(tokenizer: Any, stop: str, ids: list[int]) -> Attached:
    """A request whose answer has been looked through, token by token."""
    request = Request("r", [1, 2], SamplingParams(max_tokens=10_000, stop=[stop]), None)
    attached = Attached(request, Session(SessionKey("-", "s"), 1, 4), Knobs(), True, 1, 2)
    stops = Stops(Engine("last").config.model_config)
    stops._tokenizer = tokenizer
    for token in ids:
        request.append_output_token_ids(token)
        attached.outputs += 1
        stops.look(attached)
    return attached


@pytest.mark.parametrize("slow", [False, True], ids=["tokenizers", "another library"])
@pytest.mark.parametrize("ids", NO_TEXT)
def test_no_answer_keeps_it_busy(monkeypatch: pytest.MonkeyPatch, ids: list[int], slow: bool) -> None:
    """vLLM's detokenizer decodes at each token all since it last said something; here each id is decoded a few times."""
    monkeypatch.setattr(tokenizers.decoders, "DecodeStream", CountingStream)
    monkeypatch.setattr(CountingStream, "decoded", 0)
    tokenizer: Any = Slow() if slow else TOKENIZER
    many = ids * (1200 // len(ids))
    assert looking(tokenizer, "lazy", many).stopped is None
    assert len(many) <= (tokenizer.decoded if slow else CountingStream.decoded) < 40 * len(many)


@pytest.mark.parametrize("slow", [False, True], ids=["tokenizers", "another library"])
@pytest.mark.parametrize("count", [3, 15, 16, 17, 50])
@pytest.mark.parametrize("ids", NO_TEXT)
def test_a_stop_string_is_found_after_much_that_is_no_text(ids: list[int], count: int, slow: bool) -> None:
    before, text = (ids * count)[:count], TOKENIZER("☃STOP and on", add_special_tokens=False)["input_ids"]
    shown = len(TOKENIZER("☃", add_special_tokens=False)["input_ids"])
    assert looking(Slow() if slow else TOKENIZER, "STOP", [*before, *text]).stopped == count + shown
    parted = [*TOKENIZER("ST", add_special_tokens=False)["input_ids"], *before, *TOKENIZER("OP.")["input_ids"]]
    if ids != NO_TEXT[-1]:
        assert looking(Slow() if slow else TOKENIZER, "STOP", parted).stopped is None, "there is something in between"


@given(st.integers(0, len(TEXT) - 2), st.integers(1, 12), st.booleans(), st.integers(0, 6))
def test_the_stop_string_is_found_where_it_is(at: int, length: int, included: bool, least: int) -> None:
    """Token by token, beside the text as it grows."""
    stop = TEXT[at : at + length]
    params = SamplingParams(max_tokens=100, stop=[stop], include_stop_str_in_output=included, min_tokens=least)
    ids = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
    request = Request("r", [1, 2], params, None)
    attached = Attached(request, Session(SessionKey("-", "s"), 1, 4), Knobs(), True, 1, 2)
    stops = Stops(Engine("last").config.model_config)
    for count, token in enumerate(ids, 1):
        request.append_output_token_ids(token)
        attached.outputs += 1
        stops.look(attached)
        before, text = TOKENIZER.decode(ids[: count - 1]).rstrip("\ufffd"), TOKENIZER.decode(ids[:count])
        # It has ended in this token: vLLM looks at nothing that had come by `min_tokens`.
        found = text.find(stop, max(0, len(before) - length + 1))
        if count > least and found >= 0:
            assert attached.stopped is not None
            shown = text[:found]
            said = TOKENIZER.decode(ids[: attached.stopped])
            if included:
                assert attached.stopped == count
            else:
                assert shown.startswith(said)
                assert not shown.startswith(TOKENIZER.decode(ids[: attached.stopped + 1]))
            return
        assert attached.stopped is None
