"""Which blocks the requests of deep sessions read, in vLLM's own scheduler and block pool; the worker's reports alone are
written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from vllm_ttt import engine_args
from vllm_ttt.engine.scheduler import TTTScheduler
from vllm_ttt.types import ChunkReport, FileReport, SessionKey, StepReport, Trial

pytestmark = pytest.mark.unit

MODEL = Path(__file__).parents[2] / "demo" / "model"
BLOCK = 16
PROMPT = list(range(1000, 1100))


class Engine:
    """A scheduler, and a worker that computes nothing: every step of a whole prompt or answer yields the token 7."""

    def __init__(self, preset: str, flags: dict[str, Any] | None = None, **config: Any):
        args = EngineArgs(
            model=str(MODEL),
            enforce_eager=True,
            **{"max_model_len": 512, **(flags or {})},
            **engine_args(preset, {"sessions": {"resident": 4}, "guard": {"every": 0}, **config}),
        )
        self.config = args.create_engine_config()
        self.config.cache_config.num_gpu_blocks = 200
        spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
        blocks = KVCacheConfig(200, [], [KVCacheGroupSpec(["layer"], spec)])
        self.scheduler = TTTScheduler(self.config, blocks, StructuredOutputManager(self.config), BLOCK, log_stats=True)
        hashing = get_hash_fn_by_name("sha256")
        init_none_hash(hashing)
        self.hasher, self.number = get_request_block_hasher(BLOCK, hashing), 0
        self.report, self.scheduled = StepReport(), dict[str, int]()

    def send(
        self,
        session: str | None,
        prompt: list[int] = PROMPT,
        learn: bool = False,
        outputs: int = 1,
        priority: int = 0,
        **knobs: Any,
    ) -> str:
        self.number += 1
        extra = {"ttt_learn": int(learn), **knobs} | ({} if session is None else {"session_id": session})
        params = SamplingParams(max_tokens=outputs, ignore_eos=True, extra_args=extra)
        request = Request(f"r{self.number}", prompt, params, None, block_hasher=self.hasher, priority=priority)
        self.scheduler.add_request(request)
        return request.request_id

    def step(self) -> SchedulerOutput:
        output = self.scheduler.schedule()
        self.scheduled = dict(output.num_scheduled_tokens)
        ids = list(self.scheduled)
        requests = self.scheduler.requests
        tokens = [[7] if requests[i].num_computed_tokens >= requests[i].num_prompt_tokens else [] for i in ids]
        done = ModelRunnerOutput(ids, {name: i for i, name in enumerate(ids)}, tokens)
        done.ttt, self.report = self.report, StepReport()  # type: ignore[attr-defined]
        self.scheduler.update_from_output(output, done)
        return output

    def read(self, session: str | None, prompt: list[int] = PROMPT, **options: Any) -> int:
        """Send a request that learns nothing, to its end; how many of its tokens the cache had."""
        name = self.send(session, prompt, **options)
        self.step()
        assert name in self.scheduled, "it must not wait"
        computed = self.scheduled[name]
        self.drain()
        return len(prompt) - computed

    def drain(self) -> None:
        while self.scheduler.get_num_unfinished_requests():
            self.step()

    def learned(self, request: str, session: str, chunks: int, settled: bool = True) -> None:
        """The worker's next report: so many chunks of the request have been learned."""
        known = self.session(session)
        for i in range(chunks):
            version = known.version + i + 1
            self.report.chunks.append(ChunkReport(known.adapter, request, 512, 1.0, None, None, 512 * (i + 1), version, 0.012))
        if settled:
            self.report.settled.append((request, known.adapter))

    def learn(self, session: str, chunks: int) -> None:
        """A request that learns, to its end; its prompt is of no interest."""
        name = self.send(session, [*range(2000 + 300 * self.number, 2300 + 300 * self.number)], learn=True)
        self.drain()
        self.learned(name, session, chunks)
        self.step()

    def finish(self, answer: Any) -> Any:
        """Step until an operation is done, and return what it returns. Deltas have the digest of 64 times d."""
        while not answer.done():
            orders = self.step().ttt.files  # type: ignore[attr-defined]
            digests = [o for o in orders if o.action == "digest"]
            self.report.files += [FileReport(o.action, o.session, o.path, "done", digest="d" * 64) for o in digests]
        return answer.result()

    def session(self, name: str) -> Any:
        found = self.scheduler.ttt_ledger.find(SessionKey("-", name))
        assert found is not None
        return found


def test_last_shares_all_blocks() -> None:
    engine = Engine("last")
    assert engine.read(None) == 0
    engine.learn("a", 3)
    assert engine.read("a") == engine.read("b") == engine.read(None) == 96


def test_blocks_are_a_sessions_and_an_epochs() -> None:
    engine = Engine("deep")
    assert engine.read(None) == 0
    assert engine.read("a") == 96, "a fresh session is the base model"
    engine.learn("a", 3)
    assert engine.read("a") == 0, "its delta has moved away from the base model"
    assert engine.read("a") == 96
    engine.learn("a", 1)
    assert engine.read("a") == 96, "within an epoch"
    engine.learn("a", 3)
    assert engine.read("a") == 0, "another epoch"
    engine.learn("b", 1)
    assert engine.read("b") == 0, "another session"
    assert engine.read(None) == engine.read("c") == 96


def test_what_is_read_before_a_slot_follows_a_return_is_nobodys() -> None:
    """The guard returns a session to the base model while a prompt is read under what it had: another request of it begins
    then, and what that reads is computed with the bad delta, still. The base model must never find it."""
    engine = Engine("deep")
    engine.learn("a", 3)
    session = engine.session("a")
    assert session.version == 3
    engine.report.trials.append(Trial(session.adapter, 3, 1.0, 0))
    engine.report.behind = frozenset({session.adapter})
    engine.send(None, [1, 2, 3])
    engine.step()
    assert session.version == 0
    engine.report.behind = frozenset({session.adapter})  # the answer of the step that is scheduled next
    poisoned = [*range(5000, 5100)]
    assert engine.read("a", poisoned) == 0
    assert engine.read(None, poisoned) == 0, "it has read what the bad delta made"
    assert engine.read(None, poisoned) == 96
    assert engine.read("a", poisoned) == 96, "its slot has followed: it is the base model"


def test_an_epoch_for_each_commit() -> None:
    engine = Engine("deep", schedule={"kv_epoch": 0})
    engine.learn("a", 1)
    assert (engine.read("a"), engine.read("a")) == (0, 96)
    engine.learn("a", 1)
    assert (engine.read("a"), engine.read("a")) == (0, 96)


def test_without_its_key_a_session_reads_stale_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the tests above would miss if the epoch were no part of the key."""
    monkeypatch.setattr("vllm_ttt.engine.prefix.keys.BlockKeys._path", lambda self, session: f"/ttt/{session.adapter}")
    engine = Engine("deep")
    assert engine.read(None) == 0
    engine.learn("a", 3)
    assert engine.read("a") == 96


def test_what_is_learned_is_computed_and_can_be_read() -> None:
    """A prompt that is learned reads no more of the cache than its history, of which it has none; what it leaves there is its
    session's."""
    engine = Engine("deep")
    engine.learn("a", 3)
    assert engine.read("a") == 0
    name = engine.send("a", PROMPT, learn=True)
    engine.step()
    assert engine.scheduled[name] == len(PROMPT)
    engine.drain()
    engine.learned(name, "a", 0)
    engine.step()
    assert engine.read("a", [*PROMPT, *range(50)]) == 96


def test_what_is_generated_while_the_delta_moves_is_nobodys() -> None:
    engine = Engine("deep")
    engine.learn("a", 1)
    name = engine.send("a", PROMPT, learn=True, outputs=60)
    engine.step()
    for i in range(59):
        engine.learned(name, "a", int(i == 9), settled=i == 9)
        engine.step()
    engine.drain()
    assert engine.read("a", [*PROMPT, *[7] * 60]) == 96, "the prompt, and nothing of the answer"


def test_the_answer_of_a_reader_is_its_sessions() -> None:
    engine = Engine("deep")
    engine.learn("a", 1)
    engine.read("a", outputs=60)
    assert engine.read("a", [*PROMPT, *[7] * 60]) == 144


def test_a_reader_beside_one_that_learns_is_nobodys() -> None:
    """From when the other begins: what the reader had computed before is its session's."""
    engine = Engine("deep")
    engine.learn("a", 1)
    reader = engine.send("a", PROMPT, outputs=60)
    engine.step()
    learner = engine.send("a", list(range(500, 600)), learn=True)
    engine.step()
    assert set(engine.scheduled) == {reader, learner}
    engine.learned(learner, "a", 1)
    engine.drain()
    assert engine.read("a", [*PROMPT, *[7] * 60]) in (96, 112)


@pytest.mark.parametrize("knobs", [{"ttt_interleave": 1}, {}], ids=["interleaved", "eventual"])
def test_a_version_that_is_not_known_reads_and_leaves_nothing(knobs: dict[str, int]) -> None:
    engine = Engine("deep", schedule={"consistency": "read-your-writes" if knobs else "eventual"})
    engine.learn("a", 1)
    if knobs:
        name = engine.send("a", PROMPT, learn=True, **knobs)
        engine.step()
        engine.learned(name, "a", 1)
        engine.drain()
        engine.step()
        assert engine.read("a") == 0
    else:
        assert engine.read("a") == 0
        name = engine.send("a", list(range(500, 600)), learn=True)
        assert engine.read("a") == 0, "what is being learned may have moved the delta already"
        engine.learned(name, "a", 1)
        engine.step()
        assert engine.read("a") == 96


def test_a_rollback_is_another_epoch() -> None:
    engine = Engine("deep", schedule={"kv_epoch": 10})
    engine.learn("a", 2)
    assert (engine.read("a"), engine.read("a")) == (0, 96)
    engine.session("a").version = 1
    assert (engine.read("a"), engine.read("a")) == (0, 96)
    engine.session("a").version = 0
    assert engine.read("a") == 0
    assert engine.read(None) == 96, "version 0 is the base model"
