"""Speculative decoding: what is served, learned and kept where several tokens of an answer come out of one step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import Stage, at_rest, running, running_ttt
from served import SCORED, Documents, Served, assert_same, logprobs
from torch import nn

from vllm_ttt.config import parse_config
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.oracle import Oracle, before

pytestmark = pytest.mark.engine

NGRAM = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
FLAGS = ["--dtype", "float32", "--speculative-config"]
SHARED: dict[str, Any] = {"sessions": {"resident": 2}, "guard": {"every": 0}}
HEAD: dict[str, Any] = {"adapt": {"preset": "head"}, "learn": {"chunk": 64}, **SHARED}
READ: dict[str, Any] = {"ttt_learn": 0, "ttt_cache": 0}
LEARN_ALL: dict[str, Any] = {"ttt_learn_output": 1, "ttt_cache": 0}
#: Nats per token, float32 on either side.
TOLERANCE = 0.002


def answered(
    served: Served, prompt: list[int], session: str | None, tokens: int, **xargs: Any
) -> tuple[list[int], list[float]]:
    """A greedy answer: all ids of the conversation, and the log-probabilities of the answer's."""
    body: dict[str, Any] = {"max_tokens": tokens, "ignore_eos": True, "return_token_ids": True, "logprobs": 1}
    (choice,) = served.complete(prompt, session, vllm_xargs=xargs, **body)["choices"]
    assert len(choice["token_ids"]) == tokens
    return prompt + choice["token_ids"], choice["logprobs"]["token_logprobs"]


def accepted(served: Served) -> float:
    """Drafts that have been accepted since the start."""
    found = re.search(r"^vllm:spec_decode_num_accepted_tokens_total\{.*\} (\S+)$", served.http.get("/metrics").text, re.M)
    return float(found[1]) if found else 0.0


def pairs_of(prompt: int, tokens: int, chunk: int) -> list[slice]:
    """What is learned of a prompt and its answer, in chunks of their own."""
    found = []
    for first, end in ((0, prompt - 1), (prompt - 1, prompt - 1 + tokens)):
        found += [slice(start, min(start + chunk, end)) for start in range(first, end, chunk)]
    return [rows for rows in found if rows.stop - rows.start >= 8]


@pytest.fixture(scope="module")
def prompts(documents: Documents) -> list[list[int]]:
    return [documents[domain][0][:150] for domain in ("kjv", "py_dns", "man_fr")]


@pytest.fixture(scope="module")
def stocks(prompts: list[list[int]], stage: Stage) -> list[list[float]]:
    """What stock vLLM answers with the same drafts: log-probabilities, each prompt alone."""
    stage.stop()
    flags = [*FLAGS, json.dumps(NGRAM)]
    with running(stage.folder / "stock-drafts.log", "vllm.entrypoints.cli.main", flags, {"VLLM_PLUGINS": ""}) as served:
        return [logprobs(served.complete(prompt, **{**SCORED, "max_tokens": 60})) for prompt in prompts]


@pytest.fixture(scope="module")
def drafting(stocks: Any, stage: Stage) -> Iterator[Served]:
    stage.stop()
    stage.name = "drafts"
    yield stage.running.enter_context(running_ttt(stage.folder / "drafts", HEAD, [*FLAGS, json.dumps(NGRAM)]))
    stage.stop()


@pytest.fixture
def head(drafting: Served) -> Iterator[Served]:
    yield from at_rest(drafting)


@pytest.fixture
def loop(models: dict[torch.dtype, nn.Module]) -> Callable[[], HeadOracle]:
    return lambda: HeadOracle(models[torch.float32], parse_config(HEAD))


def test_base_requests_are_stocks(head: Served, stocks: list[list[float]], prompts: list[list[int]]) -> None:
    """Bit for bit, drafts included: before and after a session has learned."""
    count = accepted(head)
    for _ in range(2):
        assert [logprobs(head.complete(prompt, **{**SCORED, "max_tokens": 60})) for prompt in prompts] == stocks
        name = head.fresh()
        answered(head, prompts[0], name, 40, **LEARN_ALL)
        head.settle()
        assert head.session(name)["version"] == 4
    assert accepted(head) > count + 10, "no draft was accepted: nothing was proven"


@pytest.mark.parametrize("tokens", [9, 63, 64, 65, 67, 150])
def test_an_answer_is_learned_up_to_its_last_token(
    head: Served, loop: Callable[[], HeadOracle], prompts: list[list[int]], tokens: int
) -> None:
    """Its rows are those of accepted tokens: neither a rejected draft nor one accepted beyond the end is learned, wherever in a
    chunk the end comes."""
    name, prompt, reference, count = head.fresh(), prompts[1], loop(), accepted(head)
    ids, _ = answered(head, prompt, name, tokens, **LEARN_ALL)
    y, targets = reference.states(ids), torch.tensor(ids[1:])
    learned = pairs_of(len(prompt), tokens, 64)
    losses = [reference.step(y[rows], targets[rows]) for rows in learned]
    assert_same(head.delta(name), reference)
    session = head.session(name)
    assert [chunk["loss"] for chunk in session["losses"]] == pytest.approx(losses, abs=0.005)
    assert session["tokens_learned"] == sum(rows.stop - rows.start for rows in learned)
    assert session["tokens_seen"] == len(ids) - 1
    if tokens == 150:
        assert accepted(head) > count, "no draft was accepted: nothing was proven"


def test_every_row_of_a_draft_has_its_sessions_delta(
    head: Served, loop: Callable[[], HeadOracle], prompts: list[list[int]], documents: Documents
) -> None:
    """Two sessions and a base request, alone and in one batch: what is reported of each token is what the plain loop says of
    it under that session's delta."""
    loops, probe = {name: loop() for name in (head.fresh("a"), head.fresh("b"))}, documents["man_fr"][1][:120]
    for interleaved, (prompt, (name, reference)) in enumerate(zip(prompts[1:], loops.items(), strict=True)):
        head.complete(prompt, name, max_tokens=20, ignore_eos=True, vllm_xargs={"ttt_interleave": interleaved})
        reference.learn(prompt)
        assert_same(head.delta(name), reference)
    everybody: dict[str | None, HeadOracle] = {None: loop(), **loops}
    count = accepted(head)
    for name, reference in everybody.items():
        ids, scores = answered(head, probe, name, 80, **READ)
        expected = reference.score(ids)[len(probe) - 1 :]
        assert (expected + torch.tensor(scores)).abs().max() < TOLERANCE
        others = [one.score(ids)[len(probe) - 1 :] for one in everybody.values() if one is not reference]
        assert min((other - expected).abs().max() for other in others) > 0.02, "the deltas say the same: nothing was proven"
    assert accepted(head) > count + 10, "no draft was accepted: nothing was proven"
    body: dict[str, Any] = {"model": "demo", "prompt": probe, "max_tokens": 80, "ignore_eos": True, "temperature": 0}
    body |= {"logprobs": 1, "return_token_ids": True, "vllm_xargs": READ}
    together = head.together(*(body | ({} if name is None else {"session_id": name}) for name in everybody))
    for answer, reference in zip(together, everybody.values(), strict=True):
        (choice,) = answer.json()["choices"]
        expected = reference.score(probe + choice["token_ids"])[len(probe) - 1 :]
        assert (expected + torch.tensor(choice["logprobs"]["token_logprobs"])).abs().max() < TOLERANCE
    assert head.settle()["errors"] == 0


def test_every_row_of_a_draft_has_its_sessions_cache(head: Served, prompts: list[list[int]]) -> None:
    """The tokens before a row are those that were drafted: what is reported is what the same tokens score as a prompt."""
    name, prompt = head.fresh(), prompts[2]
    head.complete(prompt, name)
    head.settle()
    count = accepted(head)
    ids, scores = answered(head, prompt[:40], name, 100, ttt_learn=0)
    assert accepted(head) > count + 10, "no draft was accepted: nothing was proven"
    found = {
        cache: logprobs(head.complete(ids, name, prompt_logprobs=0, vllm_xargs={"ttt_learn": 0, "ttt_cache": cache}))[39:]
        for cache in (0, 1)
    }
    assert scores == pytest.approx(found[1], abs=TOLERANCE)
    assert max(abs(a - b) for a, b in zip(scores, found[0], strict=True)) > 0.1, "the cache says nothing: nothing was proven"


def test_a_prompt_of_which_one_token_is_new(head: Served, prompts: list[list[int]], loop: Callable[[], HeadOracle]) -> None:
    """vLLM puts drafts that do not exist behind it, to have batches of one shape."""
    name, prompt, reference = head.fresh(), prompts[0][:129], loop()
    head.complete(prompt)
    head.complete(prompts[2], name)
    reference.learn(prompts[2])
    head.settle()
    for session, expected in ((None, loop()), (name, reference)):
        ids, scores = answered(head, prompt, session, 20, **READ)
        assert (expected.score(ids)[128:] + torch.tensor(scores)).abs().max() < TOLERANCE
    assert head.settle()["errors"] == 0


def test_deep_learns_and_answers_beside_drafts(
    models: dict[torch.dtype, nn.Module], prompts: list[list[int]], stage: Stage
) -> None:
    """The step reads the keys and values of accepted tokens from vLLM's cache. What the session knows then is served, in a
    batch with the base model."""
    stage.stop()
    config, prompt = {"learn": {"chunk": 256}, **SHARED}, prompts[1]
    reference = Oracle(models[torch.float32], parse_config(config))
    with running_ttt(stage.folder / "deep-drafts", config, [*FLAGS, json.dumps(NGRAM)]) as served:
        # A prompt that is too short to be learned: one version serves the whole answer.
        ids, scores = answered(served, prompt[:8], "s", 120, **LEARN_ALL)
        count = accepted(served)
        assert count > 10, "no draft was accepted: nothing was proven"
        nll, kv = reference.served(ids)
        assert (nll[7:] + torch.tensor(scores)).abs().max() < TOLERANCE
        h, a = reference.activations(ids)
        reference.step(h[7:-1], a[7:-1], torch.tensor(ids[8:]), before(kv, 7))
        assert_same(served.delta("s"), reference)
        served.complete(prompts[0], "s")
        reference.learn(prompts[0])
        assert_same(served.delta("s"), reference)
        body: dict[str, Any] = {"model": "demo", "prompt": prompt[:100], "max_tokens": 80, "ignore_eos": True, "temperature": 0}
        body |= {"logprobs": 1, "return_token_ids": True, "vllm_xargs": READ}
        fresh = Oracle(models[torch.float32], parse_config(config))
        for answer, loop in zip(served.together({**body, "session_id": "s"}, body), (reference, fresh), strict=True):
            (choice,) = answer.json()["choices"]
            expected = loop.score(prompt[:100] + choice["token_ids"])[99:]
            assert (expected + torch.tensor(choice["logprobs"]["token_logprobs"])).abs().max() < TOLERANCE
        assert accepted(served) > count, "no draft was accepted: nothing was proven"
        assert served.settle()["errors"] == 0
