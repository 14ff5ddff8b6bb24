"""Who has no session gets stock vLLM's bits: alone, beside sessions that learn, and in a fresh session."""

from __future__ import annotations

from typing import Any

import pytest
from served import SCORED, Documents, Served, answers_beside, logprobs

pytestmark = pytest.mark.engine

Reference = dict[tuple[int, ...], list[float]]
SESSIONS = 5
#: Who shares a batch with whom is up to the scheduler: the prompts are sent again until each has met a session, one all five.
ROUNDS = 8


def test_alone(server: Served, reference: Reference) -> None:
    """200-token prompts and longer ones, prompt and answer."""
    for prompt, expected in reference.items():
        assert logprobs(server.complete(list(prompt), **SCORED)) == expected


def test_fresh_session(server: Served, reference: Reference) -> None:
    for prompt, expected in reference.items():
        answer = server.complete(list(prompt), server.fresh(), vllm_xargs={"ttt_learn": 0}, **SCORED)
        assert logprobs(answer) == expected
        assert answer["ttt"]["version"] == 0
    prompt = next(iter(reference))
    answer = server.complete(list(prompt), server.fresh(), **SCORED)
    # The prompt and the first token: then the prompt has been read, and the slot may follow what was learned of it.
    whole = len(prompt)
    assert logprobs(answer)[:whole] == reference[prompt][:whole], "the first request of a session that learns, too"


def test_reset_session(server: Served, reference: Reference, documents: Documents) -> None:
    name, prompt = server.fresh(), next(iter(reference))
    server.complete(documents["kjv"][0][:1025], name)
    server.settle()
    learned = server.complete(list(prompt), name, vllm_xargs={"ttt_learn": 0}, **SCORED)
    assert learned["ttt"]["version"] == 4
    assert logprobs(learned) != reference[prompt]
    assert server.http.post(f"/v1/ttt/sessions/{name}/reset").json()["version"] == 0
    again = server.complete(list(prompt), name, vllm_xargs={"ttt_learn": 0}, **SCORED)
    assert (logprobs(again), again["ttt"]["version"]) == (reference[prompt], 0)


def test_beside_five_sessions_that_learn(
    server: Served, reference: Reference, steady: int, base_prompts: list[list[int]], documents: Documents
) -> None:
    met, learned, most = [False] * len(base_prompts), [0] * SESSIONS, 0
    for _ in range(ROUNDS):
        answers, beside, updates = mixed(server, base_prompts, documents)
        for prompt, answer in zip(base_prompts, answers, strict=True):
            assert logprobs(answer)[:steady] == reference[tuple(prompt)][:steady]
        learned = [before + now for before, now in zip(learned, updates.values(), strict=True)]
        met = [before or bool(sessions) for before, sessions in zip(met, beside, strict=True)]
        most = max(most, *(len(sessions) for sessions in beside))
        if most == SESSIONS and all(met) and min(learned) >= 3:
            return
    assert most == SESSIONS, "no base request shared a batch with all five"
    assert all(met), "a base request met no session: nothing was proven for it"
    assert min(learned) >= 3, f"not every session learned meanwhile: {learned}"


def test_vllms_own_lora_fails_the_same_test(
    server: Served, reference: Reference, steady: int, base_prompts: list[list[int]], documents: Documents
) -> None:
    """Taken out, vLLM's LoRA on the CPU serves base requests with somebody's delta: the test above would see that."""
    prompts = base_prompts[:4]  # it is slow, too
    server.rpc("test_cpu_lora", "stock")
    try:
        answers, _, _ = mixed(server, prompts, documents)
    finally:
        server.settle()
        server.rpc("test_cpu_lora", "grouped")
    found = zip(prompts, answers, strict=True)
    assert [p for p, a in found if logprobs(a)[:steady] != reference[tuple(p)][:steady]]
    assert logprobs(server.complete(prompts[0], **SCORED)) == reference[tuple(prompts[0])]


def mixed(
    server: Served, prompts: list[list[int]], documents: Documents
) -> tuple[list[dict[str, Any]], list[set[str]], dict[str, int]]:
    """Send ``prompts`` without a session while five sessions send text after text.

    Returns:
        the answers; for each, the sessions whose rows were in a batch with its prompt; updates of each session meanwhile.
    """
    names = [server.fresh("beside") for _ in range(SESSIONS)]
    for name, domain in zip(names, documents, strict=False):
        server.complete(documents[domain][1][:513], name)  # so that a leak has something to leak
    server.settle()
    server.rpc("test_recorded")
    texts = list(documents.values())
    answers = answers_beside(server, prompts, {name: (name, texts[i][2]) for i, name in enumerate(names)})
    server.settle()
    updates = {name: server.session(name)["version"] - 2 for name in names}
    batches: list[dict[str, int]] = server.rpc("test_recorded")["batches"]
    beside = []
    for i, prompt in enumerate(prompts):
        mine = [b for b in batches if any(f"base-{i}." in request for request in b)]
        read = [b for b in mine if any(f"base-{i}." in r and n == len(prompt) for r, n in b.items())]
        assert len(read) == 1, "the prompt was split, or read twice: stock vLLM is not batch-invariant then"
        beside.append({name for name in names if any(f"{name}-" in request for request in read[0])})
    return answers, beside, updates
