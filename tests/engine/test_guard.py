"""A session that is spoiled returns to where it was good; one can be returned by hand; what may be learned at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from served import SCORED, Documents, Served, completion, logprobs

from vllm_ttt.eval.oracle import Oracle

pytestmark = pytest.mark.engine


def test_the_guard_measures_what_the_oracle_does(exact: Served, oracle: Callable[[], Oracle], documents: Documents) -> None:
    name, reference, frozen = exact.fresh(), oracle(), oracle()
    for text in documents["man_fr"][:4]:
        exact.complete(text[:1025], name)
        reference.learn(text[:1025])
    session = exact.tried(name)
    assert session["version"] == 16
    losses = [torch.cat([one.score(piece) for piece in exact.probe()]) for one in (reference, frozen)]
    assert [len(x) for x in losses] == [2048, 2048]
    expected = (losses[0].mean() - losses[1].mean()).item()
    assert expected > 0.01, "French makes English worse, or the comparison would prove nothing"
    assert session["probe_regression"] == pytest.approx(expected, abs=0.002)
    assert not session["frozen"]
    assert 16 in session["versions"], "what was tried and good is kept"


def test_a_spoiled_session_returns_to_its_last_good_version_and_learns_no_more(server: Served, documents: Documents) -> None:
    """It sends texts backwards, which are not improbable enough for the gate."""
    name, bystander, logged = server.fresh("spoiled"), server.fresh("bystander"), len(server.logged())
    server.complete(documents["kjv"][0][:513], bystander)
    before = logprobs(server.complete(documents["kjv"][1][:200], bystander, vllm_xargs={"ttt_learn": 0}, **SCORED))
    backwards = [texts[i][:1025][::-1] for i in range(3) for texts in documents.values()]
    sent, session, prompt = 0, {}, []
    while sent < len(backwards) and not session.get("frozen"):
        prompt = backwards[sent]
        server.complete(prompt, name)
        sent += 1
        server.settle()
        session = server.session(name)
    assert session["frozen"], f"{sent} requests, worse by {session['probe_regression']}"
    assert session["probe_regression"] > 0.15
    assert session["version"] in session["versions"]
    assert session["version"] < 4 * sent
    assert f"at version {session['version']}" in session["frozen_reason"]
    assert "learns no more" in server.logged()[logged:]
    assert server.rpc("test_slot_is_master")["equal"], "what is served is the good version"

    delta = server.delta(name)
    answer = server.complete(prompt, name)
    assert answer["ttt"] == {"session_id": name, "version": session["version"], "tokens_learned": 0}
    assert all(torch.equal(x, delta[key]) for key, x in server.delta(name).items())
    frozen = server.session(name)
    assert frozen["tokens_skipped"]["frozen"] == session["tokens_skipped"].get("frozen", 0) + 1024
    assert frozen["tokens_learned"] + sum(frozen["tokens_skipped"].values()) == frozen["tokens_seen"]

    after = logprobs(server.complete(documents["kjv"][1][:200], bystander, vllm_xargs={"ttt_learn": 0}, **SCORED))
    assert after == before, "another session has not moved by a bit"
    assert server.http.post(f"/v1/ttt/sessions/{name}/unfreeze").json()["frozen_reason"] is None
    server.complete(documents["kjv"][0][:257], name)
    server.settle()
    assert server.session(name)["version"] == session["version"] + 1


def test_what_is_sent_back_to_back_is_not_learned_once_it_is_stopped(server: Served, documents: Documents) -> None:
    """Nobody waits between the requests: each is released as soon as the one before it has been learned, or is not."""
    name = server.fresh("hasty")
    backwards = [texts[i][:1025][::-1] for i in range(3) for texts in documents.values()]
    answers = server.together(*[completion(prompt, name) for prompt in backwards])
    learned = [answer.json()["ttt"]["tokens_learned"] for answer in answers]
    server.settle()
    session = server.session(name)
    assert session["frozen"], f"worse by {session['probe_regression']}"
    good = int(session["frozen_reason"].rpartition("version ")[2])
    assert good in session["versions"]
    assert session["version"] == good, "nothing was learned onto the version that it was returned to"
    assert 0 in learned
    skipped = session["tokens_skipped"]
    assert skipped["frozen"] > 0
    assert skipped["frozen"] + skipped.get("rollback", 0) >= 1024 * learned.count(0)
    assert session["tokens_learned"] + sum(skipped.values()) == session["tokens_seen"] == 1024 * len(backwards)


def test_roll_back(server: Served, documents: Documents) -> None:
    name = server.fresh("rolled")
    for text in documents["kjv"][:4]:
        server.complete(text[:1025], name)
    good = server.delta(name)
    for text in documents["kjv"][4:6]:
        server.complete(text[:1025], name)
    later = server.delta(name)
    assert not torch.equal(good["d"], later["d"])
    assert 16 in server.session(name)["versions"]

    url = f"/v1/ttt/sessions/{name}/rollback"
    session = server.http.post(url, json={"version": 16}).raise_for_status().json()
    assert (session["version"], session["frozen"]) == (16, False)
    assert max(session["versions"]) == 16
    assert all(torch.equal(x, good[key]) for key, x in server.delta(name).items()), "bit for bit"
    server.session(name)
    assert server.rpc("test_slot_is_master")["equal"]
    assert server.complete(documents["kjv"][5][:257], name)["ttt"]["version"] == 16
    server.settle()
    assert server.session(name)["version"] == 17

    server.http.post(url, json={"version": 0}).raise_for_status()
    prompt = documents["kjv"][5][:200]
    mine = logprobs(server.complete(prompt, name, vllm_xargs={"ttt_learn": 0}, **SCORED))
    assert mine == logprobs(server.complete(prompt, **SCORED)), "version 0 is the base model"


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        ({"version": 5}, 409, "kept are: 0"),
        ({"version": -1}, 422, "greater than or equal to 0"),
        ({"version": "1"}, 422, "integer"),
        ({"version": True}, 422, "integer"),
        ({"version": 2**60}, 422, "less than 2147483648"),
        ({}, 422, "required"),
        ({"version": 0, "more": 1}, 422, "not permitted"),
        ([], 422, "dict"),
    ],
)
def test_roll_back_to_what_is_not_there(server: Served, documents: Documents, body: Any, status: int, said: str) -> None:
    name = server.fresh()
    server.complete(documents["kjv"][0][:257], name)
    server.settle()
    answer = server.http.post(f"/v1/ttt/sessions/{name}/rollback", json=body)
    assert answer.status_code == status, answer.text
    assert said in answer.json()["error"]["message"]
    assert server.session(name)["version"] == 1
    assert server.http.post("/v1/ttt/sessions/nobody/rollback", json={"version": 0}).status_code == 404


def test_freeze_and_unfreeze(server: Served, documents: Documents) -> None:
    name = server.fresh()
    server.complete(documents["kjv"][0][:257], name)
    server.settle()
    assert server.http.post(f"/v1/ttt/sessions/{name}/freeze").json()["frozen_reason"] == "asked for"
    delta = server.delta(name)
    answer = server.complete(documents["kjv"][1][:257], name)
    assert (answer["ttt"]["version"], answer["ttt"]["tokens_learned"]) == (1, 0)
    assert all(torch.equal(x, delta[key]) for key, x in server.delta(name).items())
    assert server.http.post(f"/v1/ttt/sessions/{name}/unfreeze").json()["frozen_reason"] is None
    assert server.complete(documents["kjv"][1][:257], name)["ttt"]["tokens_learned"] == 256
    server.settle()
    assert server.session(name)["version"] == 2
    for op in ("freeze", "unfreeze"):
        assert server.http.post(f"/v1/ttt/sessions/nobody/{op}").status_code == 404


def test_one_line_again_and_again_is_not_learned(server: Served, documents: Documents) -> None:
    name, text = server.fresh(), documents["kjv"][0]
    answer = server.complete(text[:513] + (text[:17] * 40)[:512], name)
    server.settle()
    session = server.session(name)
    assert (session["tokens_learned"], session["tokens_skipped"]) == (512, {"repetition": 512})
    assert answer["ttt"]["tokens_learned"] == 512


def test_an_hour_has_so_many_tokens(exact: Served, documents: Documents) -> None:
    """The server allows 8,000: a request beyond is answered and not learned, and a reset does not help."""
    name = exact.fresh()
    accepted = [exact.complete(documents["kjv"][i % 6][: 1025 - i], name)["ttt"]["tokens_learned"] for i in range(9)]
    exact.settle()
    session = exact.session(name)
    assert accepted[-1] == 0
    assert accepted[0] == 1024
    assert session["tokens_skipped"]["limit"] > 0
    assert session["tokens_learned"] <= 8000
    exact.http.post(f"/v1/ttt/sessions/{name}/reset").raise_for_status()
    assert exact.complete(documents["kjv"][0][:1025], name)["ttt"]["tokens_learned"] == 0
    assert exact.complete(documents["kjv"][0][:1025], exact.fresh())["ttt"]["tokens_learned"] == 1024
