"""The session's own cache as it is served: what the plain loop says, and everything that comes after keeps its meaning."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Stage, config_of, running_ttt
from served import SCORED, Documents, Served, logprobs
from torch import nn

from vllm_ttt.config import parse_config
from vllm_ttt.eval.head_oracle import HeadOracle
from vllm_ttt.eval.oracle import KV, Matrices, Oracle, before, chunks, stack_logits
from vllm_ttt.eval.session_cache import SessionCache

pytestmark = pytest.mark.engine

#: Uses the session, and leaves it as it is.
LOOK: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0}}
WITHOUT: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0, "ttt_cache": 0}}


@pytest.fixture
def told(cached: Served, documents: Documents) -> tuple[str, list[int]]:
    """A session that was sent a text, and the text."""
    name, text = cached.fresh(), documents["py_dns"][0][:400]
    cached.complete(text, name)
    cached.settle()
    return name, text


def served_losses(served: Served, prompt: list[int], name: str | None, **body: Any) -> list[float]:
    return [-x for x in logprobs(served.complete(prompt, name, prompt_logprobs=0, **body))]


def read(oracle: Oracle, B: Matrices, ids: list[int], rows: slice, past: list[KV]) -> tuple[list[float], list[float]]:
    """Losses of some pairs of a request under a delta, and of the model's first choices; 0 for the pairs before them."""
    h, a = oracle.activations(ids)
    x = stack_logits(oracle.stack, oracle.A, B, h[rows], a[rows], past)[0].log_softmax(-1)
    losses = -x.gather(1, torch.tensor(ids[1:])[rows, None])[:, 0]
    nothing = [0.0] * rows.start
    return nothing + losses.tolist(), nothing + (-x.amax(-1)).tolist()


def readings(served: Served, prompt: list[int], name: str) -> tuple[list[float], list[float]]:
    """Losses without the cache, and those of the first choices."""
    answer = served.complete(prompt, name, prompt_logprobs=1, **WITHOUT)
    positions = answer["choices"][0]["prompt_logprobs"][1:]
    tops = [-max(entry["logprob"] for entry in position.values()) for position in positions]
    return [-position[str(token)]["logprob"] for token, position in zip(prompt[1:], positions, strict=True)], tops


def learn(oracle: Oracle, cache: SessionCache, ids: list[int]) -> list[tuple[float, float]]:
    """Both plain loops, chunk by chunk: the cache learns its weights from each chunk under the delta of the chunks before."""
    h, a = oracle.activations(ids)
    _, kv = oracle.served(ids)
    targets, told = torch.tensor(ids[1:]), []
    found, _ = chunks(oracle.config.learn, 0, len(targets))
    for rows in found:
        past = before(kv, rows.start)
        told.append(cache.commit(ids, *read(oracle, oracle.B, ids, rows, past), rows.start, rows.stop))
        oracle.step(h[rows], a[rows], targets[rows], past)
    return told


def test_what_is_reported_is_what_the_oracle_says(
    cached: Served, models: dict[torch.dtype, nn.Module], documents: Documents
) -> None:
    """Requests of one session, each scored under delta and cache of those before; the third shares a passage with the first."""
    config = config_of("cached")
    oracle, cache, name = Oracle(models[torch.float32], config), SessionCache(config), cached.fresh()
    first, second = documents["legal_a"][0][:700], documents["legal_a"][1][:520]
    gained = 0.0
    for prompt in (first, second, documents["legal_a"][2][:200] + first[100:400]):
        losses, tops = read(oracle, oracle.slot(), prompt, slice(0, len(prompt) - 1), oracle.nothing())
        bare = readings(cached, prompt, name)
        found = served_losses(cached, prompt, name)
        assert found == pytest.approx(cache.read(prompt, *bare), abs=0.02), "token by token, over the engine's own delta"
        expected = cache.read(prompt, losses, tops)
        assert sum(found) / len(found) == pytest.approx(sum(expected) / len(expected), abs=0.005)
        gained = (sum(losses) - sum(found)) / len(found)
        cached.settle()
        known = learn(oracle, cache, prompt)
        told = cached.session(name)["losses"][-len(known) :]
        assert [c["cache_loss"] for c in told] == pytest.approx([loss for loss, _ in known], abs=0.01)
        assert [c["cache_share"] for c in told] == pytest.approx([share for _, share in known], abs=0.01)
    assert gained > 0.1, "the cache hardly did anything: the comparison would prove nothing"


def test_tokens_are_sampled_from_what_is_reported(cached: Served, told: tuple[str, list[int]]) -> None:
    """Log-probabilities of an answer's tokens are those of the same tokens in a prompt; a greedy one goes on as the text."""
    name, text = told
    answer = cached.complete(text[:200], name, max_tokens=40, ignore_eos=True, logprobs=1, return_token_ids=True, **LOOK)
    choice = answer["choices"][0]
    ids = text[:200] + choice["token_ids"]
    as_prompt = [-x for x in served_losses(cached, ids, name, **LOOK)][-40:]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(as_prompt, abs=0.01)
    bare = cached.complete(text[:200], name, max_tokens=40, ignore_eos=True, return_token_ids=True, **WITHOUT)
    right = [sum(a == b for a, b in zip(x["choices"][0]["token_ids"], text[200:240], strict=True)) for x in (answer, bare)]
    assert right[0] >= right[1]


def test_a_request_may_leave_it_out(cached: Served, told: tuple[str, list[int]]) -> None:
    """Neither is it served with the cache, nor does what it sends join it."""
    name, text = told
    before = cached.session(name)
    with_it, bare = (sum(served_losses(cached, text, name, **x)) for x in (LOOK, WITHOUT))
    assert with_it < bare - 10
    assert before["cache_tokens"] == len(text) - 1
    cached.complete(text, name, vllm_xargs={"ttt_cache": 0})
    cached.settle()
    after = cached.session(name)
    assert after["version"] > before["version"]
    assert after["cache_tokens"] == before["cache_tokens"]
    assert after["losses"][-1]["cache_loss"] is None


def test_a_server_as_it_comes_has_caches(server: Served, documents: Documents) -> None:
    """With no word of caches in its settings: a document that comes back is known better than by the delta."""
    name, text = server.fresh(), documents["legal_a"][0][:513]
    assert server.http.get("/v1/ttt/config").json()["cache"]["orders"] == 6
    server.complete(text, name)
    server.settle()
    frozen = sum(served_losses(server, text, None))
    with_it, bare = (sum(served_losses(server, text, name, **x)) for x in (LOOK, WITHOUT))
    assert with_it < bare - 25 < frozen - 50
    session = server.session(name)
    assert (session["cache_tokens"], session["losses"][0]["cache_loss"] is None) == (512, False)


def likeliest(served: Served, text: list[int], name: str | None, **body: Any) -> list[int]:
    """The first choice after each token of the text but the last."""
    answer = served.complete(text, name, prompt_logprobs=1, **body)
    positions = answer["choices"][0]["prompt_logprobs"][1:]
    return [int(next(token for token, entry in position.items() if entry["rank"] == 1)) for position in positions]


def test_what_comes_after_the_logits_keeps_its_meaning(cached: Served, documents: Documents) -> None:
    """Where the cache alone makes the text's next token the first choice."""
    name, text = cached.fresh(), documents["legal_a"][3][:400]
    for _ in range(3):
        cached.complete(text, name)
        cached.settle()
    with_it, bare = (likeliest(cached, text, name, **x) for x in (LOOK, WITHOUT))
    found = [t for t in range(20, 399) if with_it[t - 1] == text[t] != bare[t - 1]]
    assert found, "the cache decides nowhere: nothing could be proven"
    prompt, token = text[: found[0]], text[found[0]]

    def first(**body: Any) -> int:
        return cached.complete(prompt, name, **{"return_token_ids": True, **LOOK, **body})["choices"][0]["token_ids"][0]

    assert first(logit_bias={str(token): -100}) != token
    assert first(allowed_token_ids=[5, 6]) in (5, 6)
    assert first(temperature=1, top_k=1, seed=1) == token
    assert first(temperature=1, top_p=0.01, seed=1) == token
    assert first(vllm_xargs={"ttt_learn": 0, "ttt_cache": 0}) != token
    assert first() == token
    answer = cached.complete(prompt, name, structured_outputs={"choice": ["yes", "no"]}, max_tokens=8, **LOOK)
    assert answer["choices"][0]["text"] in ("yes", "no")


def test_another_session_and_the_base_model_know_nothing_of_it(
    cached: Served, told: tuple[str, list[int]], documents: Documents
) -> None:
    """To the bit: alone, and in a batch with a request that is served with the cache."""
    name, text = told
    probe, other = text[:200], cached.fresh("other")
    base = served_losses(cached, probe, None)
    assert served_losses(cached, probe, other, **LOOK) == base
    body = {"model": "demo", "prompt": probe, "temperature": 0, **SCORED}
    mine = {**body, "session_id": name, **LOOK}
    answers = [x.json() for x in cached.together(mine, body, {**body, "session_id": other, **LOOK}, mine)]
    losses = [[-x for x in logprobs(answer)] for answer in answers]
    assert losses[1][:200] == losses[2][:200]
    assert losses[1][: len(base) - 1] == base[:-1] or losses[1][:199] == pytest.approx(base[:199], abs=1e-3)
    assert sum(losses[0][:199]) < sum(base[:199]) - 10
    assert "cache" not in json.dumps(cached.http.get(f"/v1/ttt/sessions/{other}x").json()["error"]["message"])


def test_it_goes_where_the_delta_goes(cached: Served, told: tuple[str, list[int]], documents: Documents) -> None:
    """Fork, reset and rollback: what is served is what the session was then."""
    name, text = told
    known = served_losses(cached, text, name, **LOOK)
    fork = cached.fresh("fork")
    cached.http.post(f"/v1/ttt/sessions/{name}/fork", json={"to": fork}).raise_for_status()
    assert served_losses(cached, text, fork, **LOOK) == known
    cached.complete(documents["kjv"][0][:300], fork)
    cached.settle()
    assert served_losses(cached, text, name, **LOOK) == known, "what a fork learns is its own"
    version = cached.session(name)["version"]
    cached.complete(documents["man_fr"][0][:300], name)  # two chunks: three versions are kept
    cached.settle()
    assert cached.session(name)["cache_tokens"] > len(text)
    back = cached.http.post(f"/v1/ttt/sessions/{name}/rollback", json={"version": version})
    back.raise_for_status()
    assert back.json()["cache_tokens"] == len(text) - 1
    assert served_losses(cached, text, name, **LOOK) == known
    cached.http.post(f"/v1/ttt/sessions/{name}/reset").raise_for_status()
    assert cached.session(name)["cache_tokens"] == 0
    assert served_losses(cached, text, name, **LOOK) == served_losses(cached, text, None)


def test_an_answer_that_is_learned_joins_it(cached: Served, documents: Documents, oracle: Callable[[], Oracle]) -> None:
    name, prompt = cached.fresh(), documents["man_fr"][0][:100]
    answer = cached.complete(
        prompt, name, max_tokens=60, ignore_eos=True, return_token_ids=True, vllm_xargs={"ttt_learn_output": 1}
    )
    cached.settle()
    assert cached.session(name)["cache_tokens"] == 99 + 60
    ids = prompt[-20:] + answer["choices"][0]["token_ids"]
    losses = [sum(served_losses(cached, ids, name, **x)[20:]) for x in (LOOK, WITHOUT)]
    assert losses[0] < losses[1] - 1


def test_it_goes_with_a_delta_on_the_last_hidden_state(
    models: dict[torch.dtype, nn.Module], documents: Documents, stage: Stage, tmp_path: Path
) -> None:
    """The preset `head`: the cache is mixed into what the model says with that delta."""
    settings: dict[str, Any] = {"adapt": {"preset": "head"}, "learn": {"chunk": 128}}
    config, told, probe = parse_config(settings), documents["man_fr"][0][:257], documents["man_fr"][0][100:300]
    oracle, cache = HeadOracle(models[torch.float32], config), SessionCache(config)
    stage.stop()
    with running_ttt(tmp_path / "served", settings, ["--dtype", "float32"]) as served:
        cache.learn(told, *readings(served, told, "s"))
        served.complete(told, "s")
        oracle.learn(told)
        served.settle()
        bare, found = readings(served, probe, "s"), served_losses(served, probe, "s", **LOOK)
    frozen = HeadOracle(models[torch.float32], config).score(probe)
    assert bare[0] == pytest.approx(oracle.score(probe).tolist(), abs=0.01)
    assert sum(bare[0]) < frozen.sum() - 10, "the delta does nothing: the comparison would prove nothing"
    assert found == pytest.approx(cache.read(probe, *bare), abs=0.05)
    assert sum(found) < sum(bare[0]) - 10
