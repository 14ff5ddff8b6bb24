"""Chats that grow, prompts that are shared, and prompts that are read and learned in turns."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from served import Documents, Served, assert_same, completion

from vllm_ttt.eval.oracle import Oracle

pytestmark = pytest.mark.engine

#: vLLM's CPU backend has blocks of so many tokens: the prefix cache holds whole ones.
BLOCK = 128


def cached(answer: dict[str, Any]) -> int:
    return (answer["usage"]["prompt_tokens_details"] or {"cached_tokens": 0})["cached_tokens"]


def test_a_chat_is_learned_once(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    """20 turns that grow to 2,000 tokens: what was sent before is neither learned nor computed again."""
    name, text = exact.fresh("chat"), [t for ids in documents["man_fr"] for t in ids][:1980]
    alone, accepted, answer = oracle(), 0, {}
    for turn in range(1, 21):
        prompt = text[: 99 * turn]
        answer = exact.complete(prompt, name, max_tokens=2)
        accepted += answer["ttt"]["tokens_learned"]
        alone.learn(prompt, max(0, 99 * (turn - 1) - 1))
    exact.settle()
    session = exact.session(name)
    assert session["tokens_learned"] == accepted == alone.tokens["learned"] == len(text) - 1
    assert session["version"] == alone.version == 20
    assert session["tokens_skipped"] == {"history": sum(99 * turn - 1 for turn in range(1, 20))}
    assert cached(answer) > 0.8 * len(text)
    assert_same(exact.delta(name), alone)


def test_the_same_prompt_again_is_learned_again(server: Served, documents: Documents) -> None:
    name, ids = server.fresh(), documents["kjv"][0][:300]
    first, again = (server.complete(ids, name)["ttt"]["tokens_learned"] for _ in range(2))
    assert first == again == 299
    other = server.complete(documents["kjv"][1][:200], name)["ttt"]["tokens_learned"]
    assert other == 199
    longer = server.complete(documents["kjv"][0][:400], name)["ttt"]["tokens_learned"]
    assert longer == 100
    elsewhere = server.complete(documents["kjv"][0][:400], server.fresh())["ttt"]["tokens_learned"]
    assert elsewhere == 399, "another session's history is its own"


@pytest.mark.parametrize("learned", [0, 1])
def test_an_answer_that_was_learned_is_history(server: Served, documents: Documents, learned: int) -> None:
    name, ids, more = server.fresh(), documents["man2"][0][:200], documents["man2"][1][:60]
    knobs = {"ttt_learn_output": learned}
    answer = server.complete(ids, name, max_tokens=40, ignore_eos=True, return_token_ids=True, vllm_xargs=knobs)
    assert answer["ttt"]["tokens_learned"] == 199 + 40 * learned
    said = answer["choices"][0]["token_ids"]
    following = server.complete([*ids, *said, *more], name)
    assert following["ttt"]["tokens_learned"] == 60 + 40 * (1 - learned)


def test_a_chat_whose_template_changes_the_end_of_a_prompt(exact: Served, documents: Documents) -> None:
    """As with Qwen3 and enable_thinking false: each prompt ends in tokens that are gone in the next turn."""
    name, text, think = exact.fresh("chat"), [t for ids in documents["man_fr"] for t in ids][:1760], [5, 6, 7, 8]
    accepted, answer = 0, {}
    for turn in range(1, 9):
        answer = exact.complete([*text[: 220 * turn], *think], name)
        accepted += answer["ttt"]["tokens_learned"]
    exact.settle()
    assert accepted == exact.session(name)["tokens_learned"] == 219 + 4 + 7 * 224
    assert cached(answer) == 220 * 7 // BLOCK * BLOCK


def test_a_request_that_was_given_up_is_learned_once(exact: Served, documents: Documents) -> None:
    name, ids = exact.fresh(), documents["kjv"][0][:300]
    body = completion(ids, name, max_tokens=1000, ignore_eos=True, stream=True)
    with exact.http.stream("POST", "/v1/completions", json=body) as answer:
        next(answer.iter_lines())
    exact.settle()
    assert exact.session(name)["tokens_learned"] == 299
    again = exact.complete(ids, name, max_tokens=4)
    assert again["ttt"]["tokens_learned"] == 0
    exact.settle()
    assert exact.session(name)["tokens_learned"] == 299
    assert exact.complete(ids, name)["ttt"]["tokens_learned"] == 299, "that was answered: sent again, it is sent on purpose"


def test_an_answer_that_a_stop_string_ends(exact: Served, documents: Documents) -> None:
    name, ids, more = exact.fresh(), documents["man2"][0][:200], documents["man2"][1][:60]
    knobs = {"vllm_xargs": {"ttt_learn_output": 1}, "max_tokens": 60, "ignore_eos": True, "temperature": 0}
    whole = exact.complete(ids, max_tokens=60, ignore_eos=True, temperature=0)
    text = whole["choices"][0]["text"]
    at = max(i for i in range(len(text) * 3 // 4) if text.find(text[i : i + 10]) == i)
    answer = exact.complete(ids, name, stop=[text[at : at + 10]], return_token_ids=True, **knobs)
    exact.settle()
    learned = answer["ttt"]["tokens_learned"]
    assert exact.session(name)["tokens_learned"] == learned, "what it says is what was learned"
    shown = learned - 199
    assert 0 < shown < answer["usage"]["completion_tokens"], "the stop string is not"
    said = answer["choices"][0]["token_ids"][:shown]
    following = exact.complete([*ids, *said, *more], name)
    assert following["ttt"]["tokens_learned"] == 60


def test_a_system_prompt_is_computed_once_by_rule(exact: Served, documents: Documents) -> None:
    """`last`: blocks are shared by the base model and all sessions; only what must be learned is computed anew."""
    system = documents["py_dns"][0][:1000]
    whole = len(system) // BLOCK * BLOCK
    ask = lambda i: [*system, *documents["kjv"][2][40 * i : 40 * i + 40]]  # noqa: E731
    first = exact.complete(ask(0), exact.fresh())
    assert cached(first) == 0
    assert first["ttt"]["tokens_learned"] == 1039
    assert cached(exact.complete(ask(1))) == whole, "the base model reads what a session computed"
    frozen = exact.complete(ask(2), exact.fresh(), vllm_xargs={"ttt_learn": 0})
    assert cached(frozen) == whole
    learns = exact.fresh()
    assert cached(exact.complete(ask(3), learns)) == 0, "to be learned, so computed"
    assert cached(exact.complete([*ask(3), *documents["kjv"][3][:30]], learns)) == 1040 // BLOCK * BLOCK - BLOCK * (
        1040 % BLOCK == 0
    )
    assert cached(exact.complete(ask(1), cache_salt="somebody")) == 0
    assert cached(exact.complete(ask(4), cache_salt="somebody")) == whole


def test_interleaved_chunks_are_scored_then_learned(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    name, ids, alone = exact.fresh(), documents["man_fr"][0][:1025], oracle()
    answer = exact.complete(ids, name, prompt_logprobs=0, vllm_xargs={"ttt_interleave": 1})
    nll = -torch.tensor([next(iter(p.values()))["logprob"] for p in answer["choices"][0]["prompt_logprobs"][1:]])
    assert answer["ttt"] == {"session_id": name, "version": 3, "tokens_learned": 1024}
    frozen = alone.score(ids)
    h, a = alone.activations(ids)
    targets, losses = torch.tensor(ids[1:]), []
    for first in range(0, 1024, 256):
        rows = slice(first, first + 256)
        losses.append(alone.score(ids)[rows].mean().item())
        alone.step(h[rows], a[rows], targets[rows], alone.nothing())
    # Each chunk as the plain loop scores it: under all of this request that comes before the chunk, in attention and in delta.
    assert nll.view(4, 256).mean(1).tolist() == pytest.approx(losses, abs=2e-3)
    assert nll.mean() < frozen.mean() - 0.01, "the first request gains already"
    assert nll[:256].tolist() == pytest.approx(frozen[:256].tolist(), abs=1e-3)
    assert_same(exact.delta(name), alone)


def test_an_interleaved_prompt_lets_others_pass(server: Served, documents: Documents) -> None:
    ids = documents["kjv"][0][:1025]
    knobs = {"ttt_interleave": 1}
    bodies = [completion(ids, server.fresh("in"), vllm_xargs=knobs) for _ in range(4)]
    bodies += [completion(documents["man2"][i][:200], max_tokens=20) for i in range(3)]
    answers = server.together(*bodies)
    assert [answer.status_code for answer in answers] == [200] * 7
    assert {answer.json()["ttt"]["version"] for answer in answers[:4]} == {3}


def test_a_slot_is_not_kept_from_those_who_wait(exact: Served, documents: Documents) -> None:
    """Four sessions that always have another request under way fill the four slots; a fifth is served before they end."""
    flood = [exact.fresh("flood") for _ in range(4)]
    body = lambda name: completion(documents["man2"][0][:20], name, max_tokens=60, ignore_eos=True)  # noqa: E731
    bodies = [{**body(name), "vllm_xargs": {"ttt_learn": 0}} for _ in range(8) for name in flood]
    served: list[str] = []

    def send(some: list[dict[str, Any]]) -> None:
        for one in some:
            exact.complete(one["prompt"], one["session_id"], max_tokens=60, ignore_eos=True, vllm_xargs={"ttt_learn": 0})
            served.append(one["session_id"])

    # Two clients of each session, so that one of its requests is always running.
    threads = [threading.Thread(target=send, args=(bodies[i::8],)) for i in range(8)]
    for thread in threads:
        thread.start()
    fifth = exact.fresh("fifth")
    exact.complete(documents["kjv"][0][:100], fifth)
    before = len(served)
    for thread in threads:
        thread.join()
    assert before < len(served) - 4, "it waited for the flood to end"


def test_a_grammar_and_a_session_go_together(server: Served, documents: Documents) -> None:
    name, ids = server.fresh(), documents["kjv"][0][:200]
    knobs = {"ttt_learn_output": 1}
    answer = server.complete(ids, name, max_tokens=12, structured_outputs={"regex": "[0-9]{12}"}, vllm_xargs=knobs)
    assert answer["choices"][0]["text"].isdigit()
    server.settle()
    assert answer["ttt"]["tokens_learned"] == 199 + answer["usage"]["completion_tokens"]
    session = server.session(name)
    # What a grammar forces may be so unlikely that it is not learned: then it is counted as that.
    assert session["tokens_learned"] + session["tokens_skipped"].get("loss", 0) == answer["ttt"]["tokens_learned"]
