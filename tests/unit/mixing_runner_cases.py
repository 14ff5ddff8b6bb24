"""Model runner V2 with caches, of which a stand-in has what we touch (the real one needs CUDA): which rows of a batch are mixed
with what. test_mixing_cuda.py runs this file in Triton's interpreter."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from mixing_cases import V, by_the_host, text, told
from torch import Tensor

from vllm_ttt.config import CacheConfig
from vllm_ttt.types import RequestPlan
from vllm_ttt.worker.deltas.masters import WorkerSession
from vllm_ttt.worker.ngrams.caches import Caches
from vllm_ttt.worker.ngrams.tables import Tables
from vllm_ttt.worker.serve.gpu_cache import MixingRunnerV2

pytestmark = [pytest.mark.unit, pytest.mark.filterwarnings("ignore:.*(invalid value|divide by zero|overflow).*")]

HIDDEN, A, B = 16, 3, 4
#: request: its tokens, how many have been computed, how many of it are in the batch, and how long its prompt is
Batch = dict[str, tuple[list[int], int, int, int]]


class Prompts:
    """Asks for logits as vLLM's worker does: of all rows together, or of those of each request."""

    def __init__(self) -> None:
        self.uses_prompt_logprobs, self.token_id_scores, self.pieces = np.zeros(9, bool), dict[str, Any](), [5, 1000]

    def compute_prompt_logprobs(self, logits_fn: Any, hidden_states: Tensor, input_batch: Any, *_: Any) -> Tensor:
        states = hidden_states[: int(input_batch.query_start_loc_np[-1])]
        return torch.cat([logits_fn(part) for part in states.tensor_split(self.pieces)])

    def compute_prompt_token_id_logprobs(self, logits_fn: Any, hidden_states: Tensor, input_batch: Any, *_: Any) -> Any:
        begins = input_batch.query_start_loc_np
        return {name: logits_fn(hidden_states[begins[i] : begins[i + 1]]) for i, name in enumerate(input_batch.req_ids)}


class Model:
    def __init__(self) -> None:
        self.weight, self.asked = 2 * torch.randn(V, HIDDEN, generator=torch.Generator().manual_seed(0)), 0

    def compute_logits(self, states: Tensor) -> Tensor:
        self.asked += 1
        return states @ self.weight.T


class Runner:
    def __init__(self) -> None:
        self.model, self.prompt_logprobs_worker = Model(), Prompts()
        self.req_states = SimpleNamespace(all_token_ids=SimpleNamespace(gpu=torch.zeros(9, 300, dtype=torch.int32)))

    def sample(self, hidden_states: Tensor, input_batch: Any, grammar_output: Any) -> Tensor:
        return self.model.compute_logits(hidden_states[input_batch.logits_indices])


class Worker:
    """Session A and B have learned texts of their own."""

    def __init__(self) -> None:
        config = CacheConfig.model_construct(orders=6, tokens=4000)
        self.texts = {A: text(10, 500, 8), B: text(11, 500, 8)}
        self.told = {key: told(x, 6, key) for key, x in self.texts.items()}
        self.sessions = {key: WorkerSession(ngrams=x) for key, x in self.told.items()}
        self.caches, self.errors = Caches(config, self.sessions, 2), list[str]()
        self.runner: Any = Runner()
        MixingRunnerV2.adopt(self.runner, self.caches, Tables(2, config, torch.device("cpu")), self.errors.append)

    def begin(self, name: str, key: int, **plan: Any) -> None:
        self.caches.start(name, RequestPlan(key, 10, learn=False, learn_output=False, **{"cache": True, **plan}))

    def batch(self, requests: Batch) -> tuple[Tensor, Any]:
        """Hidden states and the InputBatch; the requests' tokens lie in states in another order."""
        counts = np.array([count for _, _, count, _ in requests.values()])
        begins, states = np.concatenate(([0], np.cumsum(counts))), np.arange(len(requests))[::-1].copy() + 2
        positions = np.concatenate([np.arange(first, first + count) for _, first, count, _ in requests.values()])
        for state, (ids, *_) in zip(states, requests.values(), strict=True):
            self.runner.req_states.all_token_ids.gpu[state, : len(ids)] = torch.tensor(ids)
        computed, prompts = (np.array([x[i] for x in requests.values()]) for i in (1, 3))
        batch = SimpleNamespace(
            req_ids=list(requests), idx_mapping_np=states, num_scheduled_tokens=counts, query_start_loc_np=begins,
            num_computed_prefill_tokens_np=np.minimum(computed, prompts), prefill_len_np=prompts,
            cu_num_logits_np=np.arange(len(requests) + 1), positions=torch.tensor(positions),
            logits_indices=torch.tensor(begins[1:] - 1),
        )  # fmt: skip
        return torch.randn(int(begins[-1]), HIDDEN, generator=torch.Generator().manual_seed(5)), batch


def near(found: Tensor, expected: Tensor) -> None:
    assert torch.allclose(found, expected, rtol=1e-5, atol=5e-5)


def test_each_row_is_mixed_with_the_cache_of_its_session_alone() -> None:
    worker = Worker()
    a, b = worker.texts[A], worker.texts[B]
    for name, key, plan in (("a", A, {}), ("b", B, {}), ("part", A, {}), ("off", A, {"cache": False})):
        worker.begin(name, key, **plan)
    requests: Batch = {
        "a": (a[20:50], 29, 1, 12), "base": (a[20:50], 29, 1, 12), "part": (a[:40], 10, 20, 40), "b": (b[60:90], 25, 5, 30),
        "off": (a[20:50], 29, 1, 12), "also a": (b[60:90], 29, 1, 12),
    }  # fmt: skip
    worker.begin("also a", A)
    states, batch = worker.batch(requests)
    plain = states[batch.logits_indices] @ worker.runner.model.weight.T
    found = worker.runner.sample(states, batch, None)
    befores = [a[20:50], a[20:50], a[:30], b[60:90], a[20:50], b[60:90]]
    sessions = [worker.told[A], worker.told[B]]
    expected = by_the_host(plain, [0, -1, -1, 1, -1, 0], befores, sessions)
    near(found, expected)
    for row in (1, 2, 4):
        assert torch.equal(found[row], plain[row]), "a row without a cache keeps its bits"
    assert not torch.equal(found[0], plain[0])
    assert not torch.equal(found[3], found[5]), "two sessions after the same tokens"
    assert not worker.errors


def test_what_is_sampled_later_is_read_where_it_lies() -> None:
    """The host does not say what was sampled: the next step finds it in the states of requests."""
    worker = Worker()
    worker.begin("a", A)
    ids = worker.texts[A][100:140]
    states, batch = worker.batch({"a": (ids[:30], 29, 1, 12)})
    worker.runner.sample(states, batch, None)
    worker.runner.req_states.all_token_ids.gpu[2, 30] = ids[30]
    states, batch = worker.batch({"a": (ids[:30], 30, 1, 12)})
    plain = states @ worker.runner.model.weight.T
    near(worker.runner.sample(states, batch, None), by_the_host(plain, [0], [ids[:31]], [worker.told[A]]))


def test_a_batch_that_goes_on_is_brought_once_and_anew_when_a_cache_has_moved() -> None:
    worker = Worker()
    for name, key in (("a", A), ("b", B)):
        worker.begin(name, key)
    ids = worker.texts[B][100:140]
    states, batch = worker.batch({"a": (ids[:30], 29, 1, 12), "b": (ids[:30], 29, 1, 12)})
    plain, tables = states @ worker.runner.model.weight.T, worker.runner.ttt_tables

    def mixed(*sessions: Any) -> None:
        known = [x for x in sessions if x is not None]
        rows = [-1 if x is None else known.index(x) for x in sessions]
        near(worker.runner.sample(states, batch, None), by_the_host(plain, rows, [ids[:30]] * 2, known))

    mixed(worker.told[A], worker.told[B])
    first = tables.last[1]
    mixed(worker.told[A], worker.told[B])
    assert tables.last[1] is first
    worker.sessions[A].ngrams = moved = told(worker.texts[B], 6, A)
    mixed(moved, worker.told[B])
    batch.idx_mapping_np = batch.idx_mapping_np[::-1].copy()  # other states of the same requests, which hold other tokens
    worker.runner.req_states.all_token_ids.gpu[batch.idx_mapping_np[0], :30] = torch.tensor(worker.texts[A][5:35])
    found = worker.runner.sample(states, batch, None)
    near(found, by_the_host(plain, [0, 1], [worker.texts[A][5:35], ids[:30]], [moved, worker.told[B]]))
    worker.caches.drop(B)
    del worker.sessions[B]
    assert tables.last is None, "nothing of a session that is gone is kept"
    assert torch.equal(worker.runner.sample(states, batch, None)[1], plain[1])
    assert not worker.errors


def test_a_batch_without_a_cache_goes_straight_through() -> None:
    worker = Worker()
    states, batch = worker.batch({"base": (worker.texts[A][:30], 29, 1, 12), "empty": (worker.texts[A][:30], 29, 1, 12)})
    worker.begin("empty", 77)
    worker.begin("elsewhere", A)
    before = worker.runner.model.compute_logits
    plain = states @ worker.runner.model.weight.T
    assert torch.equal(worker.runner.sample(states, batch, None), plain)
    assert not worker.runner.ttt_tables.table, "nothing was brought to the device"
    assert worker.runner.model.compute_logits == before


def test_a_commit_is_served_from_the_next_step_on_and_a_reset_forgets() -> None:
    worker = Worker()
    worker.begin("a", A)
    ids = worker.texts[B][:30]
    states, batch = worker.batch({"a": (ids, 29, 1, 12)})
    plain = states @ worker.runner.model.weight.T
    for key in (A, B):
        worker.sessions[A].ngrams = worker.told[key]
        near(worker.runner.sample(states, batch, None), by_the_host(plain, [0], [ids], [worker.told[key]]))
    worker.caches.drop(A)
    worker.sessions[A].ngrams = None
    assert not worker.runner.ttt_tables.keys.any(), "something of it stayed behind"
    assert torch.equal(worker.runner.sample(states, batch, None), plain)


def test_prompts_are_told_what_is_served() -> None:
    """Of requests that asked, in pieces that begin and end anywhere; what nobody asks for is not mixed."""
    worker = Worker()
    a, prompts = worker.texts[A], worker.runner.prompt_logprobs_worker
    for name in ("a", "silent"):
        worker.begin(name, A)
    requests: Batch = {"base": (a[:9], 0, 9, 9), "a": (a[40:80], 20, 15, 40), "silent": (a[:7], 0, 7, 7)}
    states, batch = worker.batch(requests)
    plain = torch.cat([part @ worker.runner.model.weight.T for part in states.tensor_split(prompts.pieces)])
    befores = [a[: i + 1] for i in range(9)] + [a[40 : 61 + i] for i in range(15)] + [a[: i + 1] for i in range(7)]
    prompts.uses_prompt_logprobs[batch.idx_mapping_np[:2]] = True
    expected = by_the_host(plain, [-1] * 9 + [0] * 15 + [-1] * 7, befores, [worker.told[A]])
    found = prompts.compute_prompt_logprobs(worker.runner.model.compute_logits, states, batch)
    near(found, expected)
    assert torch.equal(found[:9], plain[:9])
    assert torch.equal(found[24:], plain[24:])
    assert not torch.equal(found[9:24], plain[9:24])
    prompts.uses_prompt_logprobs[:] = False
    prompts.token_id_scores["silent"] = True
    scored = prompts.compute_prompt_token_id_logprobs(worker.runner.model.compute_logits, states, batch)
    near(scored["silent"], by_the_host(plain[24:], [0] * 7, befores[24:], [worker.told[A]]))
    near(scored["a"], plain[9:24])
    assert not worker.errors


def test_what_fails_is_counted_and_the_model_answers() -> None:
    worker = Worker()
    worker.begin("a", A)
    states, batch = worker.batch({"a": (worker.texts[A][:30], 29, 1, 12)})
    worker.runner.req_states = None
    assert torch.equal(worker.runner.sample(states, batch, None), states @ worker.runner.model.weight.T)
    assert worker.errors == ["the caches of a batch could not be mixed in"]
