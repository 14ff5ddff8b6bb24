"""More sessions than slots, in random order: each ends with the delta that it would have alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable

import httpx
import pytest
import torch
from served import Documents, Served, assert_same, completion

from vllm_ttt.eval.oracle import Oracle

pytestmark = pytest.mark.engine

SESSIONS, AT_ONCE = 40, 12


def test_forty_sessions_on_four_slots(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    assert exact.http.get("/v1/ttt/config").json()["sessions"]["resident"] == 4
    texts = [ids for domain in documents.values() for ids in domain]
    work = {
        exact.fresh("forty"): [texts[i % len(texts)][:257], texts[(7 * i + 3) % len(texts)][300 + 2 * i : 430 + 3 * i]]
        for i in range(SESSIONS)
    }
    order = [name for name in work for _ in range(2)]
    random.Random(11).shuffle(order)
    evictions = exact.settle()["evictions"]

    async def run() -> None:
        places, turns = asyncio.Semaphore(AT_ONCE), {name: asyncio.Lock() for name in work}
        left = {name: list(texts) for name, texts in work.items()}

        async def send(name: str) -> None:
            async with turns[name], places:
                answer = await http.post("/v1/completions", json=completion(left[name].pop(0), name, max_tokens=2))
                assert answer.status_code == 200, answer.text

        async with httpx.AsyncClient(base_url=exact.url, timeout=120, trust_env=False) as http, asyncio.TaskGroup() as group:
            for name in order:
                group.create_task(send(name))

    asyncio.run(run())
    assert exact.settle()["evictions"] > evictions + SESSIONS - 4, "there was no need to evict anybody"
    alone = {}
    for name, prompts in work.items():
        alone[name] = oracle()
        for prompt in prompts:
            alone[name].learn(prompt)
        assert alone[name].version == 2
        assert_same(exact.delta(name), alone[name])
        assert exact.session(name)["version"] == 2

    # Back in a slot: served with its own delta, and with nobody else's.
    probe = documents["rst_networking"][0][:120]
    for name in random.Random(12).sample(list(work), 6):
        answer = exact.complete(probe, name, prompt_logprobs=0, vllm_xargs={"ttt_learn": 0})
        served = -torch.tensor([next(iter(p.values()))["logprob"] for p in answer["choices"][0]["prompt_logprobs"][1:]])
        assert (served - alone[name].score(probe)).abs().max() < 0.01
        exact.session(name)
        assert exact.rpc("test_slot_is_master") == {"held": True, "equal": True}
