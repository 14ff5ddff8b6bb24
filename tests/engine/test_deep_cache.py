"""Learning over vLLM's own KV cache, where it is small: requests are preempted, wait for blocks, and grow turn by turn."""

from __future__ import annotations

import re

import pytest
from served import Documents, Served, completion

pytestmark = pytest.mark.engine


def preemptions(served: Served) -> float:
    found = re.search(r"^vllm:num_preemptions_total\{.*\} (.+)$", served.http.get("/metrics").text, re.MULTILINE)
    assert found is not None
    return float(found[1])


def test_what_is_preempted_is_learned_once(small: Served, documents: Documents) -> None:
    """Four prompts and their answers do not fit: some are computed again, and every token is learned all the same."""
    names = [small.fresh("preempted") for _ in range(4)]
    before, text = preemptions(small), documents["kjv"][0]
    bodies = [
        completion(text[i : i + 250], name, max_tokens=190, ignore_eos=True, vllm_xargs={"ttt_learn_output": 1})
        for i, name in enumerate(names)
    ]
    answers = small.together(*bodies)
    assert [(a.status_code, a.json()["ttt"]["tokens_learned"]) for a in answers] == [(200, 439)] * 4
    assert preemptions(small) > before, "nothing was preempted: the test proves nothing"
    state = small.settle()
    assert state["errors"] == 0
    for name in names:
        session = small.session(name)
        assert (session["tokens_learned"], session["tokens_skipped"]) == (439, {})
        # 249 pairs of the prompt in four chunks, 190 of the answer in three.
        assert (session["version"], sum(chunk["tokens"] for chunk in session["losses"])) == (7, 439)


def test_what_is_kept_for_learning_yields_to_who_is_served(small: Served, documents: Documents) -> None:
    """Prompts come faster than they are learned: their blocks are kept, and given up in time."""
    texts, names = documents["man_fr"], [small.fresh("kept") for _ in range(8)]
    bodies = [completion(texts[0][60 * i : 60 * i + 500], name) for i, name in enumerate(names)]
    bodies += [completion(texts[1][60 * i : 60 * i + 700], None, max_tokens=40, ignore_eos=True) for i in range(8)]
    assert [a.status_code for a in small.together(*bodies)] == [200] * 16
    assert small.settle()["errors"] == 0
    for name in names:
        session = small.session(name)
        assert (session["version"], session["tokens_learned"], session["tokens_skipped"]) == (8, 499, {})
    small.complete(texts[2][:1000], None, max_tokens=20, ignore_eos=True)  # which takes eight of the eleven blocks


def test_samples_that_begin_apart_answer_from_one_version(small: Served, documents: Documents) -> None:
    """Eight samples, blocks for two of them: the last begin when the prompt has long been learned, and know nothing of it."""
    name, prompt = small.fresh("samples"), documents["kjv"][2][:513]
    answer = small.complete(prompt, name, n=8, max_tokens=1, temperature=1, logprobs=5, return_tokens_as_token_ids=True)
    small.settle()
    assert answer["ttt"]["version"] == 0
    assert small.session(name)["version"] == 8
    after = small.complete(prompt, name, max_tokens=1, logprobs=5, return_tokens_as_token_ids=True)["choices"]
    likely = [choice["logprobs"]["top_logprobs"][0] for choice in answer["choices"] + after]
    most = max(likely[0], key=lambda token: likely[0][token])
    *samples, learned = (found.get(most, -10.0) for found in likely)
    assert max(samples) - min(samples) < 1e-3
    assert abs(learned - samples[0]) > 0.02, "what was learned is to be seen, or the test proves nothing"


def test_a_chat_reads_its_history_and_learns_its_turns(small: Served, documents: Documents) -> None:
    """20 turns, each of which goes on from the one before, within an epoch: what was learned is read from the cache."""
    name, text, cached = small.fresh("chat"), documents["legal_a"][0], []
    for turn in range(1, 21):
        answer = small.complete(text[: 40 * turn], name)
        details = answer["usage"]["prompt_tokens_details"]
        cached.append(details["cached_tokens"] if details else 0)
        assert answer["ttt"]["version"] == turn - 1
    # What is read ends before the last pair that was learned; the first turn was computed by the base model, and is no history.
    assert cached == [0, *((40 * turn - 1) // 128 * 128 for turn in range(1, 20))]
    session = small.session(name)
    assert session["tokens_learned"] == 799
    assert session["tokens_skipped"] == {"history": sum(40 * turn - 1 for turn in range(1, 20))}
    assert [chunk["tokens"] for chunk in session["losses"]] == [39] + [40] * 19
