"""What clients see: the ``ttt`` object in every kind of answer, the knobs, and the routes under /v1/ttt."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from openai import OpenAI
from served import Documents, Served, completion

pytestmark = pytest.mark.engine

#: Some 200 tokens that do not repeat themselves.
VARIED = " ".join(f"In the year {year} there were {year * year % 97} of them." for year in range(1801, 1815))
CHAT = {"model": "demo", "messages": [{"role": "user", "content": VARIED}], "max_tokens": 2}


def stream(server: Served, path: str, body: dict[str, Any], headers: dict[str, str] | None = None) -> list[dict[str, Any]]:
    with server.http.stream("POST", path, json={**body, "stream": True}, headers=headers) as answer:
        assert answer.status_code == 200
        lines = [line.removeprefix("data: ") for line in answer.iter_lines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("route", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("named_by", ["body", "header"])
def test_answers_say_version_and_tokens(server: Served, documents: Documents, route: str, named_by: str) -> None:
    prompt, name = documents["kjv"][0][:257], server.fresh()
    plain = CHAT if "chat" in route else completion(prompt)
    body = {**plain, "session_id": name} if named_by == "body" else plain
    headers = {"X-Session-ID": name} if named_by == "header" else {}
    answers = []
    for _ in range(2):
        answers.append(server.http.post(route, json=body, headers=headers).json())
        *earlier, last = stream(server, route, body, headers)
        assert not any("ttt" in event for event in earlier)
        answers.append(last)
    server.settle()
    learned = answers[0]["usage"]["prompt_tokens"] - 1
    each = -(-learned // 256)
    expected = [{"session_id": name, "version": each * i, "tokens_learned": learned} for i in range(4)]
    assert [answer["ttt"] for answer in answers] == expected
    assert server.session(name)["version"] == 4 * each
    assert "ttt" not in server.http.post(route, json=plain).json(), "no session, no object"


def test_responses_route(server: Served) -> None:
    name = server.fresh()
    body = {"model": "demo", "input": VARIED, "max_output_tokens": 2, "session_id": name}
    answer = server.http.post("/v1/responses", json=body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["ttt"]["session_id"] == name
    server.settle()
    assert server.session(name)["tokens_learned"] == answer.json()["ttt"]["tokens_learned"] > 100


def test_openai_client(server: Served, documents: Documents) -> None:
    client, name = OpenAI(base_url=server.url + "/v1", api_key="none"), server.fresh()
    ids = documents["kjv"][0][:257]
    first = client.completions.create(model="demo", prompt=ids, max_tokens=1, extra_body={"session_id": name})
    chunks = list(
        client.chat.completions.create(**CHAT, stream=True, extra_headers={"X-Session-ID": name})  # type: ignore[arg-type]
    )
    assert first.model_dump()["ttt"] == {"session_id": name, "version": 0, "tokens_learned": 256}
    assert chunks[-1].model_dump()["ttt"]["version"] == 1
    client.close()


def test_short_remainder_is_not_accepted(server: Served, documents: Documents) -> None:
    for length, accepted in ((262, 256), (264, 256), (265, 264), (8, 0), (1, 0)):
        name = server.fresh()
        answer = server.complete(documents["kjv"][0][:length], name)
        assert answer["ttt"]["tokens_learned"] == accepted
        server.settle()
        session = server.session(name)
        assert session["tokens_learned"] == accepted
        assert session["tokens_skipped"] == ({"short": length - 1 - accepted} if length - 1 > accepted else {})


def test_learn_0_changes_nothing(server: Served, documents: Documents) -> None:
    name, text = server.fresh(), documents["man_fr"][0]
    server.complete(text[:513], name)
    before = server.delta(name)
    xargs = {"ttt_learn": 0, "ttt_learn_output": 1}
    for start in (0, 300, 600):
        answer = server.complete(text[start : start + 300], name, max_tokens=20, ignore_eos=True, vllm_xargs=xargs)
        assert answer["ttt"] == {"session_id": name, "version": 2, "tokens_learned": 0}
    after = server.delta(name)
    assert all(bool((after[key] == before[key]).all()) for key in before)
    session = server.session(name)
    assert (session["version"], session["tokens_seen"], session["tokens_learned"]) == (2, 512, 512)


def test_several_samples_learn_the_prompt_once(server: Served, documents: Documents) -> None:
    name, prompt = server.fresh(), documents["kjv"][0][:257]
    answer = server.complete(prompt, name, n=2, max_tokens=4, temperature=1, seed=1)
    assert len(answer["choices"]) == 2
    assert answer["ttt"] == {"session_id": name, "version": 0, "tokens_learned": 256}
    server.settle()
    assert server.session(name)["version"] == 1
    assert server.session(name)["tokens_seen"] == 256
    assert server.complete(prompt, name)["ttt"]["version"] == 1, "the session's next request was not left waiting"


def test_several_samples_say_what_was_learned(server: Served, documents: Documents) -> None:
    """In a later turn, with a learned answer, and streamed: the answer's count is the session's."""
    name, text, learned = server.fresh(), documents["man2"][0], 0
    for end, options in ((257, {}), (357, {}), (457, {"max_tokens": 40, "vllm_xargs": {"ttt_learn_output": 1}})):
        answer = server.complete(text[:end], name, n=2, temperature=1, ignore_eos=True, **options)
        server.settle()
        learned, before = server.session(name)["tokens_learned"], learned
        assert (
            answer["ttt"]["tokens_learned"] == learned - before == (256 if end == 257 else 100 + options.get("max_tokens", 0))
        )


@pytest.mark.parametrize("request_id", ["20261124_run7", "1_x", "0_x"])
def test_a_request_may_have_any_name(server: Served, documents: Documents, request_id: str) -> None:
    name = server.fresh()
    text = server.http.post("/detokenize", json={"model": "demo", "tokens": documents["kjv"][0][:300]}).json()["prompt"]
    body = {"model": "demo", "input": text, "session_id": name, "request_id": request_id, "max_output_tokens": 4}
    said = server.http.post("/v1/responses", json=body).json()["ttt"]["tokens_learned"]
    server.settle()
    assert said == server.session(name)["tokens_learned"] > 256


def test_a_list_of_prompts_is_learned_prompt_by_prompt(server: Served, documents: Documents) -> None:
    name, prompts = server.fresh(), [documents["kjv"][0][:257], documents["kjv"][1][:257]]
    answer = server.complete(prompts, name)
    assert answer["ttt"]["tokens_learned"] == 512
    server.settle()
    assert server.session(name)["version"] == 2


def test_a_text_of_nonsense_is_skipped(server: Served) -> None:
    """Random ids cost more than 0.7 ln(vocabulary): the chunk is not learned, and the session says so."""
    name, draw = server.fresh(), random.Random(3)
    ids = [draw.randrange(10, 8192) for _ in range(257)]
    assert server.complete(ids, name)["ttt"]["version"] == 0
    server.settle()
    session = server.session(name)
    assert (session["version"], session["tokens_learned"], session["tokens_skipped"]) == (0, 0, {"loss": 256})
    assert not any(part.any() for part in server.delta(name).values())


def test_list_get_reset_delete_config(server: Served, documents: Documents) -> None:
    http, name = server.http, server.fresh()
    route = f"/v1/ttt/sessions/{name}"
    for method in (http.get, http.delete):
        assert method(route).status_code == 404
    assert http.post(route + "/reset").status_code == 404

    server.complete(documents["kjv"][0][:513], name)
    server.settle()
    got = http.get(route).json()
    assert (got["version"], got["tokens_seen"], got["requests_open"], got["tier"]) == (2, 512, 0, "slot")
    assert set(got["norm"]) == {"o", "d"}
    assert all(0.01 < norm < 0.1 for norm in got["norm"].values())
    cache = 4 * (1 + 513)  # a cut, and the tokens
    assert got["bytes"] == 8 * (384 + 384) * 64 * (4 + 2) + 4 + cache
    assert [chunk["tokens"] for chunk in got["losses"]] == [256, 256]
    assert [chunk["version"] for chunk in got["losses"]] == [1, 2]
    first, last = got["losses"]
    assert first["frozen_loss"] == pytest.approx(first["loss"], abs=1e-4), "a fresh session is the base model"
    assert last["frozen_loss"] is None, "every fourth chunk is measured"
    assert (first["rate"], last["rate"]) == (0.012, pytest.approx(got["rate"], abs=1e-7))
    assert got["rate"] != 0.012
    assert got["created"] <= got["last_used"]

    listed = http.get("/v1/ttt/sessions").json()["sessions"]
    detail = ("losses", "versions")
    assert listed[0] == {k: v for k, v in got.items() if k not in detail}, "the last one used comes first"

    reset = http.post(route + "/reset").json()
    assert (reset["version"], reset["tokens_learned"], reset["losses"], reset["rate"]) == (0, 0, [], 0.012)
    assert not any(part.any() for part in server.delta(name).values())
    assert server.complete(documents["kjv"][0][:257], name)["ttt"]["version"] == 0
    server.settle()
    receipt = http.delete(route).json()
    assert (receipt["session_id"], receipt["deleted"], receipt["files"]) == (name, True, []), "there is no state dir"
    assert (receipt["version"], receipt["tokens_learned"], len(receipt["digest"])) == (1, 256, 64)
    assert http.get(route).status_code == 404
    assert name not in [s["session_id"] for s in http.get("/v1/ttt/sessions").json()["sessions"]]
    assert server.complete(documents["kjv"][0][:257], name)["ttt"]["version"] == 0, "the name is free again"

    config = http.get("/v1/ttt/config").json()
    assert config["sessions"]["resident"] == 6
    assert (config["adapt"]["rank"], config["adapt"]["layers"]) == (64, "all")
    assert config["learn"]["rate"] == 0.012


def test_reset_while_a_request_runs_is_a_conflict(server: Served, documents: Documents) -> None:
    name = server.fresh()
    body = completion(documents["kjv"][0][:257], name, max_tokens=400, ignore_eos=True)
    with server.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = answer.iter_lines()
        next(lines)
        refused = server.http.post(f"/v1/ttt/sessions/{name}/reset")
        assert refused.status_code == 409
        assert "wait for them" in refused.json()["error"]["message"]
        for _ in lines:
            pass
    server.settle()
    assert server.http.post(f"/v1/ttt/sessions/{name}/reset").status_code == 200
