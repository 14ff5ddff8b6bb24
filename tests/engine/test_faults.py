"""What breaks in the step costs its chunks and nothing else: the server serves, and the session keeps its last good version."""

from __future__ import annotations

import pytest
import torch
from served import SCORED, Documents, Served, logprobs

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(
    ("fault", "reason", "said"),
    [
        ("step", "error", "a micro-step failed"),
        ("commit", "error", "a micro-step failed"),
        ("take", "error", "_take failed"),
        ("after_take", "error", "_take failed"),
        ("nan", "nonfinite", "not finite"),
        ("nan_loss", "nonfinite", "not finite"),
    ],
)
def test_a_broken_chunk_is_skipped(server: Served, documents: Documents, fault: str, reason: str, said: str) -> None:
    name, text = server.fresh(fault), documents["kjv"][0]
    server.complete(text[:257], name)
    good = server.delta(name)
    logged = len(server.logged())

    server.rpc("test_plant", fault)
    answer = server.complete(text[300:557], name, **SCORED)
    assert answer["ttt"]["version"] == 1
    assert len(logprobs(answer)) == 256 + 8, "the request in which it happened is answered"

    after = server.delta(name)
    assert all(torch.equal(after[key], good[key]) for key in good), "the last good delta stays, bit for bit"
    session = server.session(name)
    assert (session["version"], session["tokens_learned"]) == (1, 256)
    assert session["tokens_skipped"] == {reason: 256}
    assert said in server.logged()[logged:]

    answer = server.complete(text[600:857], name)
    assert answer["ttt"]["version"] == 1
    learned = server.delta(name)
    assert server.session(name)["version"] == 2, "and it learns again"
    assert not torch.equal(learned["d"], good["d"])


def test_other_sessions_of_the_batch_are_not_harmed_by_nan(server: Served, documents: Documents) -> None:
    """Two sessions are learned in one step, and one has rows that are not finite."""
    names, text = [server.fresh("nan-of"), server.fresh("beside")], documents["kjv"][0]
    server.rpc("test_plant", "nan_row")
    bodies = [{"model": "demo", "prompt": text[:200], "max_tokens": 1, "session_id": name} for name in names]
    versions = [answer.json()["ttt"]["version"] for answer in server.together(*bodies)]
    assert versions == [0, 0]
    deltas = [server.delta(name) for name in names]
    skipped = [server.session(name)["tokens_skipped"] for name in names]
    assert sorted(map(len, skipped)) == [0, 1], "one was skipped, the other learned"
    for delta, reasons in zip(deltas, skipped, strict=True):
        assert all(part.isfinite().all() for part in delta.values())
        assert any(part.any() for part in delta.values()) == (not reasons)
        assert reasons in ({}, {"nonfinite": 199})


def test_a_slot_that_cannot_be_written(server: Served, documents: Documents) -> None:
    name, text = server.fresh(), documents["kjv"][0]
    errors, logged = server.settle()["errors"], len(server.logged())
    server.rpc("test_plant", "slot")
    server.complete(text[:257], name)
    assert server.settle()["errors"] == errors + 1
    assert "a slot could not be written" in server.logged()[logged:]
    session = server.session(name)
    assert (session["version"], session["tier"]) == (1, "memory"), "it was learned; the slot is given back"
    answer = server.complete(text[:257], name, vllm_xargs={"ttt_learn": 0}, **SCORED)
    assert answer["ttt"]["version"] == 1
    server.session(name)
    assert server.rpc("test_slot_is_master") == {"held": True, "equal": True}, "another was filled from the master"


def test_a_hook_that_fails_leaves_nobody_waiting(server: Served, documents: Documents) -> None:
    name = server.fresh()
    for i in range(3):
        server.rpc("test_plant", "sync")
        server.complete(documents["kjv"][0][300 * i : 300 * i + 257], name)
    server.settle()
    session = server.session(name)
    assert session["tokens_learned"] + session["tokens_skipped"].get("error", 0) == 3 * 256
    assert server.complete(documents["kjv"][0][:257], name)["ttt"]["version"] == session["version"]


def test_faults_among_many_requests(server: Served, documents: Documents) -> None:
    """Everybody is answered, and what was learned and what was not add up."""
    names = [server.fresh("many") for _ in range(5)]
    texts = list(documents.values())
    bodies = [
        {"model": "demo", "prompt": texts[i][0][200 * j : 200 * j + 257], "max_tokens": 3, "session_id": name}
        for j in range(3)
        for i, name in enumerate(names)
    ]
    for fault in ("nan", "commit", "take", "slot"):
        server.rpc("test_plant", fault)
    assert [answer.status_code for answer in server.together(*bodies)] == [200] * 15
    server.settle()
    sessions = [server.session(name) for name in names]
    assert all(s["tokens_learned"] + sum(s["tokens_skipped"].values()) == 3 * 256 for s in sessions)
    assert all(s["version"] * 256 == s["tokens_learned"] for s in sessions)
    reasons = {reason for s in sessions for reason in s["tokens_skipped"]}
    assert "error" in reasons
    assert reasons <= {"error", "nonfinite"}
