"""`vllm-ttt eval` against vLLM itself: what it reads of an answer, and each arm; on the small model and on the real one."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Stage, running
from recipe_page import recipes
from served import Documents, Served

from vllm_ttt.eval import protocols
from vllm_ttt.eval.client import Client
from vllm_ttt.eval.measures import Reading, gain, summary
from vllm_ttt.eval.texts import Documents as Texts
from vllm_ttt.eval.texts import Sessions, encode, interactions, read_texts


def evaluate(url: str, work: Sessions, arms: tuple[str, ...]) -> protocols.Result:
    async def measure() -> protocols.Result:
        async with Client(url) as client:
            return await protocols.run("p2", client, work, arms)

    return asyncio.run(measure())


def read(url: str, ids: list[int]) -> tuple[Reading, str]:
    """What the client makes of a request, and the text of all tokens but the first."""

    async def measure() -> tuple[Reading, str]:
        async with Client(url) as client:
            answer = await client._call("POST", "/detokenize", {"model": client.model, "tokens": ids[1:]})
            return await client.read(ids), answer["prompt"]

    return asyncio.run(measure())


@pytest.mark.engine
def test_small_model(server: Served, documents: Documents):
    """One forward says what each token is, how likely it was, and what would have been likelier."""
    ids = documents["py_dns"][0][:300]
    found, text = read(server.url, ids)
    assert found.tops is not None
    assert found.top_losses is not None
    assert found.texts is not None
    assert "".join(found.texts) == text
    scores = server.complete(ids, prompt_logprobs=3)["choices"][0]["prompt_logprobs"][1:]
    for i, (token, position) in enumerate(zip(ids[1:], scores, strict=True)):
        likeliest = max(position.values(), key=lambda entry: entry["logprob"])["logprob"]
        assert found.losses[i] == pytest.approx(-position[str(token)]["logprob"], abs=1e-4)
        assert found.top_losses[i] == pytest.approx(-likeliest, abs=1e-4)
        assert position[str(found.tops[i])]["logprob"] == pytest.approx(likeliest, abs=1e-4)

    work = interactions({name: documents[name] for name in ("kjv", "legal_a", "man_fr")}, 1, 3)
    result = evaluate(server.url, work, protocols.ARMS)
    base = result.arms["frozen"]
    for arm in ("retrieval", "context", "ttt"):
        assert result.nats(arm)[0] == pytest.approx(result.frozen[0], abs=0.005), f"{arm} has nothing to go on at first"
        assert result.nats(arm)[1] != pytest.approx(result.frozen[1], abs=0.001)
    assert gain(result.arms["ngrams"], base).mean > 0.01
    assert gain(result.arms["ttt"], base).mean > 0.01
    assert gain(result.arms["ttt_ngrams"], base).mean > gain(result.arms["ngrams"], base).mean
    assert 0.2 < summary(base, base)["accuracy"].mean < 0.8
    assert summary(result.arms["ttt"], base)["characters_gain"].mean > 0


@pytest.fixture(scope="module")
def real_server(stage: Stage, real_model: Path) -> Iterator[Served]:
    stage.stop()
    log = stage.folder / "real.log"
    flags = ["--dtype", "float32", "--max-num-seqs", "4", "--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    with running(log, "vllm_ttt.cli", flags, {}, real_model) as served:
        yield served


@pytest.mark.engine
@pytest.mark.real
def test_real_model(real_server: Served, real_texts: Path):
    """The figures of an implementation without vLLM, over HTTP; what the session's n-grams are worth; a session learns."""

    async def documents() -> Texts:
        async with Client(real_server.url) as client:
            return await encode({"vllm_models": read_texts(real_texts)["vllm_models"]}, client.tokenize)

    docs = asyncio.run(documents())
    work = interactions(docs, 1, 10)
    result = evaluate(real_server.url, Sessions(work.domains, [work.windows[0][:3]]), ("frozen", "ngrams", "ttt", "ttt_ngrams"))
    base = result.arms["frozen"]
    assert [row[0] for row in result.frozen] == pytest.approx([2.394, 1.6625, 1.6433], abs=0.003)
    assert result.ttt[0] == pytest.approx(result.frozen[0], abs=0.003)
    assert gain(result.arms["ngrams"], base).mean > 0.05
    assert gain(result.arms["ttt"], base).mean > 0.05
    assert gain(result.arms["ttt_ngrams"], base).mean > gain(result.arms["ngrams"], base).mean
    found = summary(result.arms["ngrams"], base)
    assert found["accuracy_gain"].mean > 0.003
    assert found["characters_gain"].mean > 0
    assert found["exact_lines"].mean > 0.05


@pytest.mark.engine
@pytest.mark.real
def test_the_recipe_of_a_loop_with_tools(real_server: Served):
    """docs/recipes.md: the model calls the tool as its schema says, and the turns are learned."""
    done = recipes.run(recipes.recipes()["agent"], real_server.url, "demo")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert any(f"count {fruit}" in done.stdout for fruit in ("apples", "pears", "plums"))
    assert recipes.session(real_server.url, "agent")["tokens_learned"] > 30
