"""The real scheduler, with a worker that computes nothing: what it tells the audit log, what a removed session leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_audit import events
from test_deep_scheduler import PROMPT, Engine
from transformers import AutoTokenizer
from vllm.v1.request import RequestStatus

from vllm_ttt.errors import RequestError
from vllm_ttt.types import Trial

pytestmark = pytest.mark.unit

MODEL = Path(__file__).parents[2] / "demo" / "model"


def test_the_log_has_each_request_and_each_chunk(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    engine = Engine("deep", sessions={"resident": 4, "audit_log": str(path)})
    engine.learn("a", 2)
    engine.read("a")
    engine.read(None)
    aborted = engine.send("a", outputs=9)
    engine.step()
    engine.scheduler.finish_requests(aborted, RequestStatus.FINISHED_ABORTED)
    waiting = engine.send("a", learn=True)
    engine.scheduler.finish_requests(waiting, RequestStatus.FINISHED_ABORTED)
    engine.report.trials.append(Trial(engine.session("a").adapter, 2, 1.5, 1))
    engine.step()
    engine.scheduler.ttt_tiers.end()
    whole = events(path)
    told = [{k: v for k, v in line.items() if k not in ("tenant", "session", "uid")} for line in whole]
    assert {line.get("session") for line in whole} == {None, "a"}
    assert told[0]["event"] == "start"
    assert told[1:] == [
        {"event": "create"},
        {"event": "serve", "request": "r1", "version": 0, "prompt_tokens": 300, "generated_tokens": 1, "end": "length"},
        {"event": "learn", "request": "r1", "tokens": 512, "version": 1},
        {"event": "learn", "request": "r1", "tokens": 512, "version": 2},
        {"event": "serve", "request": "r2", "version": 0, "prompt_tokens": 100, "generated_tokens": 1, "end": "length"},
        {"event": "serve", "request": aborted, "version": 0, "prompt_tokens": 100, "generated_tokens": 1, "end": "abort"},
        {"event": "freeze", "by": "guard", "tried": 2, "version": 1},
        {"event": "stop"},
    ]


def test_a_log_that_cannot_be_written_refuses_sessions_and_nobody_else(tmp_path: Path) -> None:
    engine = Engine("deep", sessions={"resident": 4, "audit_log": str(tmp_path / "audit.jsonl")})
    audit = engine.scheduler.ttt_tiers.audit
    audit.failing = "No space left on device"
    engine.read(None)
    engine.send("a")
    ((_, error),) = engine.scheduler.ttt_refused
    assert isinstance(error, RequestError)
    assert (error.status, "No space left" in error.message) == (503, True)
    engine.scheduler.ttt_tiers.end()


def test_no_block_of_a_removed_session_is_read_again() -> None:
    engine = Engine("deep")
    engine.learn("a", 3)
    engine.learn("b", 3)
    for name in ("a", "b"):
        assert [engine.read(name) for _ in range(2)] == [0, 96], "computed under its delta, and then read from the cache"
    receipt = engine.finish(engine.scheduler.ttt_tiers.owner.remove(engine.session("a")))
    assert (receipt["version"], receipt["digest"]) == (3, "d" * 64)
    assert engine.scheduler.ttt_ledger.peek(engine.session("b").key._replace(name="a")) is None
    assert engine.read("a") == 0, "the same name is another session"
    assert engine.read("b") == 96, "others keep theirs"
    assert engine.read("a", list(PROMPT)) == engine.read(None) == 96, "what a fresh session has read is the base model's"


def test_what_matches_travels_to_the_worker() -> None:
    ids = AutoTokenizer.from_pretrained(MODEL)("Write to bob@example.com, or come by. " + "And so on and on it went. " * 9)[
        "input_ids"
    ]
    engine = Engine("deep", learn={"filter": [r"\S+@\S+"]})
    for knobs in ({"learn": True}, {"learn": False}):
        name = engine.send("a", ids, **knobs)
        plan = engine.step().ttt.started[name]  # type: ignore[attr-defined]
        assert bool(plan.filtered) == knobs["learn"]
        assert all(0 < first < end < 30 for first, end in plan.filtered)
        engine.drain()
        if knobs["learn"]:
            engine.learned(name, "a", 1)
            engine.step()
