"""Random schedules on a real engine, in this process, step by step; run by test_schedules.py.

    python schedules.py MODEL PRESET EXAMPLES

Hypothesis draws arrivals, chat turns, repeats, aborts, n, and how many tokens an iteration may have; the KV cache is so small
that requests are preempted. `Expected` says in the plainest way what each session should have learned; the oracle learns it.

With `deep`, what a chunk attends to was served under the deltas of the time. The oracle knows that of a prompt that was read
under one delta and was not computed again under another; deltas are compared where a session has sent nothing else. Where a
request that was preempted is aborted, what of it waits to be computed again is lost.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from vllm_ttt.config import parse_config
from vllm_ttt.engine.prefix.history import BLOCK
from vllm_ttt.eval.oracle import Oracle, load_model
from vllm_ttt.types import SessionKey

# The oracle has no guard, and one text again and again is what the guard rolls back.
CONFIG = {
    "sessions": {"resident": 3},
    "learn": {"chunk": 32, "max_loss": 2.0},
    "schedule": {"tokens_per_step": 48},
    "guard": {"every": 0, "min_ratio": 0},
}
CONTEXT = 320
#: what the schedules brought about, to show that they are not tame
seen: Counter[str] = Counter()


@dataclass
class Turn:
    """One request as it is drawn; ``kind``: of the session's last request, or a new text."""

    #: None: a request of the base model, which takes up room
    session: int | None
    kind: str
    length: int
    offset: int
    answer: int
    n: int
    learn: bool
    learn_output: bool
    interleave: bool
    #: steps of the engine before it arrives, and after which it is aborted; None: never
    wait: int
    abort: int | None


turns = st.builds(
    Turn,
    session=st.sampled_from([0, 1, 2, 3, 4, None]),
    kind=st.sampled_from(["new", "new", "grow", "grow", "grow", "repeat"]),
    length=st.one_of(st.integers(60, 200), st.integers(2, 200)),
    offset=st.integers(0, 4000),
    answer=st.one_of(st.integers(1, 12), st.integers(1, 12), st.just(70)),
    n=st.sampled_from([1, 1, 1, 2]),
    learn=st.sampled_from([True, True, True, False]),
    learn_output=st.booleans(),
    interleave=st.sampled_from([False, False, True]),
    wait=st.sampled_from([0, 0, 0, 1, 3, 8]),
    abort=st.one_of(st.none(), st.none(), st.integers(0, 20)),
).map(lambda turn: replace(turn, interleave=turn.interleave and turn.n == 1))  # n samples answer from one version


@dataclass
class Sent:
    """A request that the engine was given, and what is known of it."""

    turn: Turn
    session: str | None
    prompt: list[int]
    answer: list[int] = field(default_factory=list)
    finished: bool = False
    aborted: bool = False
    left: int = 0
    #: positions that have been computed, at most
    computed: int = 0
    preempted: bool = False


@dataclass
class Expected:
    """One session, told of its requests in the order in which it sent them."""

    oracle: Oracle
    #: whether the oracle knows what every chunk attended to
    exact: bool = True
    #: (tokens, pairs learned of them) of prefixes that later prompts may go on from
    prefixes: list[tuple[list[int], int]] = field(default_factory=list)

    def learn(self, sent: Sent) -> None:
        if not sent.turn.learn or not sent.computed:
            return
        prompt, chunk, least = sent.prompt, self.oracle.config.learn.chunk, self.oracle.config.learn.min_chunk
        known = [learned for tokens, learned in self.prefixes if len(tokens) < len(prompt) and prompt[: len(tokens)] == tokens]
        start, pairs = max(known, default=0), len(prompt) - 1
        if sent.computed < len(prompt):  # aborted: chunks that were complete are learned
            pairs = start + max(sent.computed - start, 0) // chunk * chunk
        several = len(self.oracle.B) > 1
        self.exact &= not (several and (sent.preempted or (sent.turn.interleave and pairs - start > chunk)))
        self.oracle.learn(prompt[: pairs + 1], start)
        rest = (pairs - start) % chunk
        learned = pairs - rest if rest < least else pairs
        self.prefixes.append((prompt, learned))
        if sent.turn.learn_output and sent.answer and pairs == len(prompt) - 1:
            whole = prompt + sent.answer
            self.exact &= not several
            self.oracle.learn(whole, len(prompt) - 1)
            rest = len(sent.answer) % chunk
            if rest == 0 or rest >= least or len(sent.answer) > rest:
                learned = len(whole) - 1 - (rest if rest < least else 0)
            self.prefixes[-1] = (prompt, min(learned, len(prompt) - 1))
            ends = [*range(len(prompt) + BLOCK, len(whole), BLOCK), len(whole)]
            self.prefixes += [(whole[:end], min(learned, end - 1)) for end in ends]


class Driver:
    def __init__(self, model: str, preset: str):
        from vllm import LLM

        import vllm_ttt

        options: dict[str, Any] = {"block_size": 32, "num_gpu_blocks_override": 13, "max_num_seqs": 6, "dtype": "float32"}
        options |= {"kv_cache_memory_bytes": 2**26, "enforce_eager": True, "max_num_batched_tokens": 128}
        self.llm = LLM(model, max_model_len=CONTEXT, **options, **vllm_ttt.engine_args(preset, CONFIG))
        self.config = parse_config(CONFIG, preset)
        self.engine: Any = self.llm.llm_engine
        self.core: Any = self.engine.engine_core.engine_core
        self.model = load_model(model, torch.float32)
        torch.set_num_threads(1)
        self.text = torch.randint(20, 4000, (6000,), generator=torch.Generator().manual_seed(1)).tolist()
        self.runs = self.names = 0
        self.preempted: set[str] = set()
        preempt = self.core.scheduler._preempt_request
        self.core.scheduler._preempt_request = lambda r, *a, **k: (self.preempted.add(r.request_id), preempt(r, *a, **k))[1]

    def run(self, plan: list[Turn], budget: int) -> None:
        """Serve a schedule, then compare every session with what is expected of it."""
        try:
            self.serve(plan, budget)
        except BaseException:  # hypothesis goes on with a smaller schedule
            self.engine.abort_request(list(self.engine.output_processor.external_req_ids))
            self.drain()
            raise

    def drain(self) -> None:
        while self.core.scheduler.has_requests():
            self.core.step()

    def serve(self, plan: list[Turn], budget: int) -> None:
        from vllm import SamplingParams

        self.runs += 1
        torch.manual_seed(0)  # what is sampled from; a seed of its own kills vLLM's CPU worker in a chunked prefill
        self.core.scheduler.max_num_scheduled_tokens = budget
        requests: dict[str, Sent] = {}
        for turn in plan:
            for _ in range(turn.wait):
                self.step(requests)
            name = None if turn.session is None else f"r{self.runs}-s{turn.session}"
            sent = Sent(turn, name, self.prompt(turn, name, requests), left=turn.abort if turn.abort is not None else -1)
            knobs = {"ttt_learn": turn.learn, "ttt_learn_output": turn.learn_output, "ttt_interleave": turn.interleave}
            extra = {"session_id": name, **{key: int(value) for key, value in knobs.items()}} if name else None
            params = SamplingParams(
                n=turn.n, max_tokens=turn.answer, temperature=0.8, ignore_eos=True, detokenize=False, extra_args=extra
            )
            self.names += 1
            requests[f"q{self.names}"] = sent
            self.engine.add_request(f"q{self.names}", {"prompt_token_ids": sent.prompt}, params)
            note(f"q{self.names}: {name} {turn.kind}, {len(sent.prompt)} tokens, {turn}")
        while self.engine.has_unfinished_requests():
            self.step(requests)
        self.drain()
        seen.update({"preempted": len(self.preempted)})
        self.preempted.clear()
        self.compare(requests)

    def prompt(self, turn: Turn, name: str | None, requests: dict[str, Sent]) -> list[int]:
        earlier = [sent for sent in requests.values() if sent.session == name]
        fresh = self.text[turn.offset : turn.offset + turn.length]
        if not earlier or turn.kind == "new":
            return fresh
        last = earlier[-1]
        seen.update([turn.kind])
        if turn.kind == "repeat":
            return last.prompt
        grown = last.prompt + (last.answer if last.finished or last.aborted else []) + fresh
        return grown if len(grown) < CONTEXT - 16 else fresh

    def step(self, requests: dict[str, Sent]) -> None:
        """One iteration; then the aborts that are due."""
        if not self.engine.has_unfinished_requests():
            return
        for output in self.engine.step():
            sent = requests[output.request_id]
            first = next((o for o in output.outputs if o.index == 0), None)
            if first is not None:
                sent.answer = list(first.token_ids)
            sent.finished = output.finished
        for request_id, sent in requests.items():
            sent.preempted |= any(self.belongs(key, request_id) for key in self.preempted)
            live = [r for key, r in self.core.scheduler.requests.items() if self.belongs(key, request_id)]
            for request in live:
                sent.computed = max(sent.computed, request.num_computed_tokens)
            if sent.finished:
                sent.computed = max(sent.computed, len(sent.prompt))
            elif sent.left == 0:
                seen.update(["aborted"])
                sent.aborted = True
                self.engine.abort_request([request_id])
            sent.left -= 1

    @staticmethod
    def belongs(key: str, request_id: str) -> bool:
        """Whether the engine's request is the one that learns: of n samples the first."""
        return key.startswith((f"{request_id}-", f"0_{request_id}-")) or key in (request_id, f"0_{request_id}")

    def compare(self, requests: dict[str, Sent]) -> None:
        scheduler, worker = self.core.scheduler, self.core.model_executor.driver_worker.worker
        sessions, deltas = {sent.session for sent in requests.values() if sent.session}, worker.trainer.deltas
        for name in sorted(sessions):
            expected = Expected(Oracle(self.model, self.config, torch.float32))
            for sent in requests.values():
                if sent.session == name:
                    expected.learn(sent)
            session = scheduler.ttt_ledger.find(SessionKey("-", name))
            assert session is not None
            learned = expected.oracle.tokens["learned"]
            lost = session.tokens_skipped["full"]
            assert not lost or any(s.preempted and s.aborted for s in requests.values() if s.session == name)
            assert session.tokens_learned == learned or 0 <= learned - session.tokens_learned <= lost, (
                name, session.summary(), expected.oracle.tokens,
            )  # fmt: skip
            assert session.version == expected.oracle.version or lost
            assert not session.open
            seen.update({"sessions": 1, "chunks": session.version, "history": session.tokens_skipped["history"] > 0})
            assert len(deltas.rows) + len(deltas.free) == deltas.spare, "rows have leaked"
            if not expected.exact or lost:
                continue
            seen.update({"compared": session.version})
            wanted = [(i, key, b) for i, layer in enumerate(expected.oracle.B) for key, b in layer.items()]
            for (_, b), (i, key, want) in zip(deltas.read(session.adapter).delta.parts(), wanted, strict=True):
                assert (b[0] - want).norm() <= 0.02 * want.norm() + 1e-9, (name, i, key)
            assert abs(deltas.session(session.adapter).rate / expected.oracle.rate - 1) < 0.01, name
        assert worker.backlog.room == worker.backlog.t_PC.shape[0], "pages have leaked"


def refusal_without_chunks(driver: Driver) -> dict[str, Any]:
    """What the engine answers to ttt_interleave where a prompt cannot be read in chunks."""
    from vllm import SamplingParams

    config = driver.core.scheduler.scheduler_config
    config.enable_chunked_prefill = False
    try:
        params = SamplingParams(max_tokens=1, extra_args={"session_id": "refused", "ttt_interleave": 1})
        driver.engine.add_request("refused", {"prompt_token_ids": driver.text[:80]}, params)
        (output,) = [output for _ in range(3) for output in driver.engine.step()]
        assert output.finished
        assert driver.core.scheduler.ttt_ledger.find(SessionKey("-", "refused")) is None
        return output.kv_transfer_params["ttt"]
    finally:
        config.enable_chunked_prefill = True


def main() -> None:
    model, preset, examples = sys.argv[1], sys.argv[2], int(sys.argv[3])
    driver = Driver(model, preset)

    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]

    @settings(max_examples=examples, deadline=None, derandomize=True, suppress_health_check=slow, database=None)
    @given(st.lists(turns, min_size=4, max_size=12), st.integers(9, 128))
    def schedules(plan: list[Turn], budget: int) -> None:
        driver.run(plan, budget)

    schedules()
    refusal = refusal_without_chunks(driver)
    assert refusal["status"] == 400, refusal
    assert "--no-enable-chunked-prefill" in refusal["message"]
    print("SEEN " + json.dumps(seen), flush=True)


if __name__ == "__main__":
    main()
