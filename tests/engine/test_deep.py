"""The preset `deep` beside its oracle, and its blocks in the prefix cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from served import Documents, Served, assert_same, logprobs

from vllm_ttt.eval.oracle import Oracle

pytestmark = pytest.mark.engine

#: Of a prompt of 800 tokens: those in whole blocks, of which the CPU backend's have 128.
WHOLE = 768
READ: dict[str, Any] = {"vllm_xargs": {"ttt_learn": 0}}


@pytest.mark.parametrize(
    ("domain", "lengths"),
    [("kjv", [1025, 1025]), ("man_fr", [300, 513, 262]), ("py_dns", [1500]), ("man2", [100, 40]), ("man2", [518])],
)
def test_same_text_same_delta_and_losses(
    deep: Served, deep_oracle: Callable[[], Oracle], documents: Documents, domain: str, lengths: list[int]
) -> None:
    """Chunks with a past and without, whole and short, requests one after another: what is served, lost and learned."""
    reference, name, expected = deep_oracle(), deep.fresh(domain), []
    for i, length in enumerate(lengths):
        prompt = documents[domain][i][:length]
        scores = -torch.tensor(logprobs(deep.complete(prompt, name, prompt_logprobs=0)))
        assert (scores - reference.score(prompt)).abs().max() < 0.01
        expected += reference.learn(prompt)
    assert_same(deep.delta(name), reference)
    session = deep.session(name)
    assert [c["loss"] for c in session["losses"]] == pytest.approx(expected, abs=0.01)
    assert session["rate"] == pytest.approx(reference.rate, rel=1e-3)
    assert session["version"] == reference.version == len(expected)
    assert session["tokens_skipped"] == {k: v for k, v in reference.tokens.items() if v and k != "learned"}
    assert deep.rpc("test_slot_is_master") == {"held": True, "equal": True}


def test_the_guard_tries_what_is_served(deep: Served, deep_oracle: Callable[[], Oracle], documents: Documents) -> None:
    """On its text, piece by piece, each of which sees itself alone."""
    reference, frozen, name = deep_oracle(), deep_oracle(), deep.fresh()
    for text in documents["man_fr"][3:5]:
        deep.complete(text[:1025], name)
        reference.learn(text[:1025])
    session = deep.tried(name)
    assert session["version"] == 4
    losses = [torch.cat([one.score(piece) for piece in deep.probe()]) for one in (reference, frozen)]
    assert [len(x) for x in losses] == [2048, 2048]
    expected = (losses[0].mean() - losses[1].mean()).item()
    assert abs(expected) > 0.002, "the delta does nothing: the comparison would prove nothing"
    assert session["probe_regression"] == pytest.approx(expected, abs=0.0005)


def test_a_reread_history_is_a_past(deep: Served, deep_oracle: Callable[[], Oracle], documents: Documents) -> None:
    """A prompt that goes on from an earlier one: its history is not learned again, and it is what the rest attends to."""
    reference, name, text = deep_oracle(), deep.fresh(), documents["legal_a"][0]
    deep.complete(text[:300], name)
    reference.learn(text[:300])
    deep.complete(text[:700], name)
    reference.learn(text[:700], start=299)
    assert_same(deep.delta(name), reference)
    assert deep.session(name)["tokens_skipped"] == {"history": 299}


def test_several_sessions_at_once(deep: Served, deep_oracle: Callable[[], Oracle], documents: Documents) -> None:
    """Chunks of several sessions in one step, each over its own past."""
    bodies, names = [], [deep.fresh("many") for _ in range(4)]
    texts = [documents[d][0][:n] for d, n in (("kjv", 900), ("man_fr", 260), ("py_dns", 600), ("man2", 1025))]
    for name, text in zip(names, texts, strict=True):
        bodies.append({"model": "demo", "prompt": text, "max_tokens": 4, "temperature": 0, "session_id": name})
    assert [a.status_code for a in deep.together(*bodies)] == [200] * 4
    for name, text in zip(names, texts, strict=True):
        reference = deep_oracle()
        reference.learn(text)
        assert_same(deep.delta(name), reference)


def test_an_answer_is_learned_over_its_prompt(deep: Served, documents: Documents) -> None:
    name = deep.fresh()
    answer = deep.complete(documents["kjv"][0][:300], name, max_tokens=300, ignore_eos=True, vllm_xargs={"ttt_learn_output": 1})
    assert answer["ttt"]["tokens_learned"] == 599
    state = deep.settle()
    assert (deep.session(name)["version"], state["errors"]) == (2, 0)


class Reader:
    """Reads one long prompt without learning it: the distribution of what follows, and how much the cache had of it."""

    def __init__(self, served: Served, prompt: list[int]):
        self.served, self.prompt = served, prompt

    def warm(self, session: str | None) -> tuple[dict[str, float], int]:
        answer = self.served.complete(self.prompt, session, logprobs=5, **READ)
        cached = (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        return answer["choices"][0]["logprobs"]["top_logprobs"][0], cached

    def cold(self, session: str | None) -> dict[str, float]:
        """Prompt log-probabilities are asked for too: vLLM then reads nothing from the cache."""
        answer = self.served.complete(self.prompt, session, logprobs=5, prompt_logprobs=0, **READ)
        return answer["choices"][0]["logprobs"]["top_logprobs"][0]


def apart(one: dict[str, float], other: dict[str, float]) -> float:
    """The largest difference of log-probabilities; infinite where other tokens are likely."""
    return max(abs(one[k] - other[k]) for k in one) if set(one) == set(other) else float("inf")


def test_a_session_never_reads_blocks_of_another_epoch(deep: Served, documents: Documents) -> None:
    """Same prefix, same session, prefix caching on: after the delta has moved, what is answered is what a cold cache gives."""
    name, other = deep.fresh("epoch"), deep.fresh("other")
    reader = Reader(deep, documents["kjv"][5][:800])
    base, cached = reader.warm(None)
    assert cached == 0
    deep.complete(documents["kjv"][0][:1025], name)
    deep.settle()
    first, cached = reader.warm(name)
    assert cached == 0, "the base model's blocks are not the session's"
    assert apart(first, base) > 0.05, "the delta must matter"
    again, cached = reader.warm(name)
    assert cached == WHOLE, "within an epoch the session reads what it wrote"
    assert apart(again, first) < 1e-3
    deep.complete(documents["kjv"][1][:1025], name)
    deep.settle()
    moved, cached = reader.warm(name)
    assert cached == 0, "two chunks more: beyond the epoch"
    assert apart(moved, reader.cold(name)) < 1e-3
    assert apart(moved, first) > 0.05, "stale blocks would have shown"
    # Whom it does not concern.
    again, cached = reader.warm(None)
    assert cached == WHOLE
    assert apart(again, base) < 1e-3, "the base model reads its own blocks, and no other"
    fresh, cached = reader.warm(other)
    assert cached == WHOLE, "a fresh session is the base model"
    assert fresh == again
    deep.complete(documents["kjv"][2][:257], other)
    deep.settle()
    learned, cached = reader.warm(other)
    assert cached == 0, "neither the base model's nor another session's"
    assert apart(learned, reader.cold(other)) < 1e-3


def test_a_small_move_keeps_the_epoch(deep: Served, documents: Documents) -> None:
    """One short chunk moves the delta by less than schedule.kv_epoch: the session reads what is slightly out of date."""
    name, reader = deep.fresh(), Reader(deep, documents["man_fr"][2][:800])
    deep.complete(documents["man_fr"][0][:257], name)
    deep.settle()
    reader.warm(name)
    deep.complete(documents["man_fr"][1][:65], name)
    deep.settle()
    stale, cached = reader.warm(name)
    assert cached == WHOLE
    assert apart(stale, reader.cold(name)) < 0.1


def test_what_was_generated_while_the_delta_moved_is_nobodys(deep: Served, documents: Documents) -> None:
    """The answer of a request that learns is computed under a delta that moves: its blocks are never read."""
    name, prompt = deep.fresh(), documents["man2"][3][:600]
    answer = deep.complete(prompt, name, max_tokens=200, ignore_eos=True, return_token_ids=True)
    deep.settle()
    reader = Reader(deep, prompt + answer["choices"][0]["token_ids"])
    found, cached = reader.warm(name)
    assert cached == 0
    assert apart(found, reader.cold(name)) < 1e-3
