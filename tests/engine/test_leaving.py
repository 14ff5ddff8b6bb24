"""Clients that leave, and requests that cannot be served: the session is at a consistent version, and nobody waits for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from served import Documents, Served, assert_same, completion

from vllm_ttt.eval.oracle import Oracle

pytestmark = pytest.mark.engine

Fresh = Callable[[], Oracle]


def leave_after_first_token(served: Served, prompt: list[int], name: str, **body: object) -> None:
    body = completion(prompt, name, max_tokens=1200, ignore_eos=True, stream=True, **body)
    with served.http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        next(answer.iter_lines())


def test_disconnect_mid_answer(exact: Served, oracle: Fresh, documents: Documents) -> None:
    """The prompt had been read, so it is learned; what comes next finds it learned."""
    name, text, reference = exact.fresh(), documents["kjv"][0], oracle()
    for i in range(2):
        prompt = text[700 * i : 700 * i + 600]
        leave_after_first_token(exact, prompt, name)
        answer = exact.complete([5, 6, 7], name)
        reference.learn(prompt)
        assert answer["ttt"]["version"] == reference.version == 3 * (i + 1)
    assert_same(exact.delta(name), reference)
    session = exact.session(name)
    assert session["requests_open"] == 0
    assert session["tokens_learned"] == 2 * 599


def test_disconnect_while_the_answer_is_learned(exact: Served, documents: Documents) -> None:
    """What was generated before may be learned or not; the books balance, and the slot is the master."""
    name = exact.fresh()
    leave_after_first_token(exact, documents["kjv"][0][:300], name, vllm_xargs={"ttt_learn_output": 1})
    answer = exact.complete([5, 6, 7], name)
    exact.settle()
    session = exact.session(name)
    assert exact.rpc("test_slot_is_master") == {"held": True, "equal": True}
    assert answer["ttt"]["version"] == session["version"] == len(session["losses"])
    assert session["version"] >= 2
    short = session["tokens_skipped"].pop("short")
    assert not session["tokens_skipped"]
    assert 299 + 2 <= session["tokens_learned"] + short <= session["tokens_seen"]


def test_held_requests_proceed_when_the_first_leaves(exact: Served, documents: Documents) -> None:
    """With its answer learned, a request keeps its session's next ones waiting for as long as it runs."""
    name = exact.fresh()
    long = completion(
        documents["kjv"][0][:300], name, max_tokens=1500, ignore_eos=True, stream=True, vllm_xargs={"ttt_learn_output": 1}
    )

    async def run() -> list[int]:
        async with httpx.AsyncClient(base_url=exact.url, timeout=60, trust_env=False) as http:
            async with http.stream("POST", "/v1/completions", json=long) as answer:
                lines = answer.aiter_lines()  # the stream is closed when nobody holds this
                await anext(lines)
                held = [
                    asyncio.create_task(http.post("/v1/completions", json=completion(documents["kjv"][1][:100], name)))
                    for _ in range(3)
                ]
                await asyncio.sleep(0.3)
                assert not any(task.done() for task in held), "they must wait: what they would meet is still being learned"
            return [(await task).json()["ttt"]["version"] for task in held]

    versions = asyncio.run(run())
    assert min(versions) >= 2
    assert sorted(versions) == [min(versions) + i for i in range(3)]


def test_a_held_request_that_leaves(exact: Served, oracle: Fresh, documents: Documents) -> None:
    """It never ran: nothing of it is learned, and it blocks nobody."""
    name, text, reference = exact.fresh(), documents["kjv"][0], oracle()

    async def run() -> None:
        async with httpx.AsyncClient(base_url=exact.url, timeout=60, trust_env=False) as http:
            xargs = {"ttt_learn_output": 1}
            # It takes longer than the other one waits for it.
            first = completion(text[:300], name, max_tokens=600, ignore_eos=True, vllm_xargs=xargs)
            running = asyncio.create_task(http.post("/v1/completions", json=first))
            await asyncio.sleep(0.5)
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/completions", json=completion(text[300:600], name), timeout=0.3)
            assert (await running).status_code == 200

    asyncio.run(run())
    exact.complete(text[600:857], name)
    exact.settle()
    assert [chunk["tokens"] for chunk in exact.session(name)["losses"]] == [256, 43, 256, 256, 88, 256]
    reference.learn(text[:300])
    assert exact.session(name)["losses"][1]["version"] == reference.version


@pytest.mark.parametrize("seconds", [0.02, 0.1, 0.2, 0.4, 0.8])
def test_leaving_at_any_time(exact: Served, oracle: Fresh, documents: Documents, seconds: float) -> None:
    """While other prompts compete for the token budget, so that this one is read in parts: it stops at a whole chunk."""
    name, text, reference = exact.fresh(), documents["man_fr"][0], oracle()
    exact.complete(text[:257], name)
    reference.learn(text[:257])
    prompt = documents["py_dns"][0][:1300]

    async def run() -> None:
        async with httpx.AsyncClient(base_url=exact.url, timeout=60, trust_env=False) as http:
            others = [
                asyncio.create_task(http.post("/v1/completions", json=completion(documents["kjv"][i][:1500]))) for i in range(2)
            ]
            body = completion(prompt, name, max_tokens=600, ignore_eos=True)
            with pytest.raises(httpx.ReadTimeout):
                await http.post("/v1/completions", json=body, timeout=httpx.Timeout(60, read=seconds))
            assert [(await other).status_code for other in others] == [200, 200]

    asyncio.run(run())
    exact.settle()
    version = exact.session(name)["version"]
    assert version in range(1, 8)
    if version > 1:
        reference.learn(prompt[: min(256 * (version - 1) + 1, 1300)])
    assert reference.version == version
    assert_same(exact.delta(name), reference)
    assert exact.session(name)["requests_open"] == 0
    assert exact.complete([5, 6, 7], name)["ttt"]["version"] == version


def test_longer_than_the_context(exact: Served, oracle: Fresh, documents: Documents) -> None:
    """Refused where the prompt alone is too long; an answer that meets the end of the context is cut, and all is learned."""
    name, text, reference = exact.fresh(), documents["kjv"][0], oracle()
    exact.complete(text[:257], name)
    reference.learn(text[:257])
    refused = exact.http.post("/v1/completions", json=completion([5] * 2049, name))
    assert refused.status_code == 400
    assert "2048" in refused.json()["error"]["message"]
    assert_same(exact.delta(name), reference)
    assert exact.session(name)["version"] == 1

    full = (documents["kjv"][1] + documents["kjv"][2])[:2047]
    assert exact.complete(full, name)["ttt"] == {"session_id": name, "version": 1, "tokens_learned": 2046}
    reference.learn(full)
    assert_same(exact.delta(name), reference)


def test_a_pause_that_keeps_a_prompt_half_read(exact: Served, oracle: Fresh, documents: Documents) -> None:
    """It is answered, wherever the prompt is; what was kept goes on as if nothing had been."""
    text, reference = documents["man_fr"][1][:1281], oracle()
    reference.learn(text)
    body = {"max_tokens": 4, "vllm_xargs": {"ttt_interleave": 1}}
    for _ in range(3):
        name = exact.fresh()
        with ThreadPoolExecutor() as pool:
            sent = pool.submit(exact.complete, text, name, **body)
            while exact.http.get(f"/v1/ttt/sessions/{name}").json().get("version", 0) < 1:
                assert not sent.done(), "it was read before anybody could pause"
            try:
                assert exact.http.post("/pause", params={"mode": "keep"}, timeout=30).status_code == 200
                assert not sent.done(), "the pause kept nothing"
            finally:
                exact.http.post("/resume")
            assert sent.result()["ttt"]["tokens_learned"] == 1280
        assert_same(exact.delta(name), reference)
