"""The protocols, end to end over HTTP against a server that the oracle answers for; and what stands around them."""

from __future__ import annotations

import asyncio
import io
import json
import math
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from vllm_ttt.config import TTTConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.eval import plots, report, runner
from vllm_ttt.eval.client import Client, ServerError
from vllm_ttt.eval.curves import OracleScorer
from vllm_ttt.eval.protocols import ARMS, Result, plan, requests, run
from vllm_ttt.eval.retrieval import recent, retrieve
from vllm_ttt.eval.texts import interactions, read_texts, repeats
from vllm_ttt.eval.tiny import tiny_model

pytestmark = [pytest.mark.unit, pytest.mark.usefixtures("one_thread")]


#: Loss of a token up to which it is the first choice.
SURE = 2.0


class OracleServer:
    """The part of vLLM's HTTP interface that ``Client`` uses, in front of an oracle; ``plugin`` False: a stock vLLM."""

    def __init__(self, scorer: OracleScorer, plugin: bool = True, context: int = 2048):
        self.scorer, self.plugin, self.context, self.deleted = scorer, plugin, context, list[str]()
        self.app = Starlette(
            routes=[
                Route("/v1/models", self.models),
                Route("/tokenize", self.tokenize, methods=["POST"]),
                Route("/v1/completions", self.complete, methods=["POST"]),
                Route("/v1/ttt/sessions/{name}", self.delete, methods=["DELETE"]),
            ]
        )

    def client(self, **options: Any) -> Client:
        return Client("http://oracle/v1/", transport=httpx.ASGITransport(app=self.app), **options)

    async def models(self, request: Request) -> JSONResponse:
        if request.headers.get("authorization") != "Bearer k":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return JSONResponse({"data": [{"id": "adapter", "parent": "tiny"}, {"id": "tiny", "parent": None}]})

    async def tokenize(self, request: Request) -> JSONResponse:
        return JSONResponse(
            {"tokens": list((await request.json())["prompt"].encode()), "max_model_len": self.context, "count": 0}
        )

    async def complete(self, request: Request) -> JSONResponse:
        body = await request.json()
        ids, session = body["prompt"], body.get("session_id") if self.plugin else None
        assert len(ids) + body["max_tokens"] <= self.context
        losses = await self.scorer.score(ids, session)
        shown = [None, *(self.position(t, x) for t, x in zip(ids[1:], losses, strict=True))]
        answer: dict[str, Any] = {"choices": [{"prompt_logprobs": shown}]}
        return JSONResponse(answer | ({"ttt": {"session_id": session}} if session else {}))

    @staticmethod
    def position(token: int, loss: float) -> dict[str, dict[str, Any]]:
        """As vLLM shows it, of a model whose first choice is right where it is sure, and else the next letter."""
        first = loss < SURE
        shown = {str(token): {"logprob": -loss, "rank": 1 if first else 3, "decoded_token": chr(token)}}
        other = {} if first else {str(token + 1): {"logprob": -SURE, "rank": 1, "decoded_token": chr(token + 1)}}
        return shown | other

    async def delete(self, request: Request) -> JSONResponse:
        self.deleted.append(request.path_params["name"])
        await self.scorer.forget(request.path_params["name"])
        return JSONResponse({})


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> OracleScorer:
    folder = tiny_model("llama", tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048)
    return OracleScorer(folder, TTTConfig.model_validate({"adapt": {"rank": 16}, "learn": {"max_loss": 2}}))


def write_texts(root: Path, documents: int = 3, domains: tuple[str, ...] = ("birds", "fish")) -> Path:
    for domain in domains:
        (root / domain).mkdir(parents=True)
        for i in range(documents):
            text = "\n".join(f"{domain} {n * (i + 3) % 97}" for n in range(200))
            (root / domain / f"{i}.txt").write_text(text)
    return root


def test_protocols_over_http(scorer: OracleScorer, tmp_path: Path):
    """Sessions gain, gains are those of the oracle itself, sessions are deleted; table, JSON and plot tell the same."""
    server, texts = OracleServer(scorer), read_texts(write_texts(tmp_path / "texts"))

    async def measure() -> dict[str, Result]:
        async with server.client(api_key="k") as client:
            assert client.model == "tiny"
            docs = {domain: [await client.tokenize(text) for text in found] for domain, found in texts.items()}
            return await runner.run(client, docs, {"p2": 3, "p3": 2, "long": 3}, 1, Console(quiet=True), ARMS)

    results = asyncio.run(measure())
    p2, p3 = results["p2"], results["p3"]
    assert p2.domains == p3.domains == ["birds", "fish"]
    assert p2.ttt[0] == pytest.approx(p2.frozen[0], abs=1e-6), "a fresh session is the frozen model"
    assert all(t < f - 0.1 for t, f in zip(p2.ttt[2], p2.frozen[2], strict=True))
    assert p2.retrieval[0] == p2.frozen[0]
    assert p2.retrieval[1] != p2.frozen[1]
    assert p3.frozen[0] == p3.frozen[1]
    assert all(t < f - 0.1 for t, f in zip(p3.ttt[1], p3.frozen[1], strict=True))
    assert len(server.deleted) == 6
    assert not scorer.sessions

    assert set(p3.arms) == {"frozen", "ngrams", "ttt", "ttt_ngrams"}, "a search would find the document itself"
    assert all(n < f - 0.1 for n, f in zip(p2.nats("ngrams")[1], p2.frozen[1], strict=True)), "the texts repeat themselves"
    assert all(n < t for n, t in zip(p2.nats("ttt_ngrams")[2], p2.ttt[2], strict=True))
    assert p2.nats("context")[0] == p2.frozen[0]
    assert results["long"].frozen == p2.frozen

    docs = {"birds": [list(t.encode()) for t in texts["birds"]]}
    windows = interactions(docs, 1, 3).windows[0]
    before = scorer.frozen.score(recent(windows[:2], 7, 2047 - 1025) + windows[2])[-768:].mean().item()
    assert p2.nats("context")[2][0] == pytest.approx(before, abs=1e-5)
    losses = scorer.frozen.score(windows[1])
    measured, text = p2.arms["frozen"][1][0], "".join(map(chr, windows[1][-768:]))
    assert measured.tokens == 768
    assert measured.right == int((losses[-768:] < SURE).sum())
    assert measured.characters == measured.right, "a token is a letter"
    assert measured.lines == text.count("\n") - 1 > 10

    window = interactions({"birds": [list(t.encode()) for t in texts["birds"]]}, 1, 3).windows[0][0]
    assert p2.frozen[0][0] == pytest.approx(scorer.frozen.score(window)[-768:].mean().item(), abs=1e-5)
    assert p3.frozen[0][0] != pytest.approx(p2.frozen[0][0], abs=1e-5), "p3 scores all tokens, p2 the last 768"

    runner.write_json(tmp_path / "out" / "r.json", results, {"command": "x"})
    read = json.loads((tmp_path / "out" / "r.json").read_text())
    gain = sum(f - t for f, t in zip(p2.frozen[2], p2.ttt[2], strict=True)) / 2
    assert read["last"]["p2"][2] == pytest.approx(gain, abs=1e-4)
    assert set(report.compare(report.curves(results), read).values()) == {0.0}
    console = Console(record=True, width=160, file=io.StringIO())
    console.print(report.table(results))
    assert f"{math.exp(sum(p3.ttt[1]) / 2):.2f}" in console.export_text(clear=False)
    for name, result in results.items():
        console.print(report.measures(name, result))
    found = console.export_text()
    assert f"{read['measures']['p2']['ttt']['gain']['mean']:+.3f} ±" in found
    said = read["measures"]["long"]["ngrams"]
    assert f"{said['accuracy']['mean']:.1%} ({said['accuracy_gain']['mean']:+.1%} ±" in found
    plots.plot(results, tmp_path / "r.png", "birds and fish")
    assert (tmp_path / "r.png").read_bytes().startswith(b"\x89PNG")


def test_number_of_requests_is_what_progress_expects(scorer: OracleScorer, tmp_path: Path):
    texts = read_texts(write_texts(tmp_path))
    docs = {domain: [list(text.encode()) for text in found] for domain, found in texts.items()}
    for protocol, count in (("p2", 3), ("p3", 2)):
        work, ticks = plan(protocol, docs, 1, count), []
        asyncio.run(run(protocol, scorer, work, ARMS, lambda ticks=ticks: ticks.append(1)))
        assert len(ticks) == requests(protocol, work, ARMS)


@pytest.mark.parametrize(
    ("options", "server_options", "message"),
    [
        ({}, {}, "401.*--api-key"),
        ({"api_key": "k", "model": "other"}, {}, "does not serve 'other'; it serves tiny"),
        ({"api_key": "k"}, {"plugin": False}, "does not learn: start it with `vllm serve MODEL --plugin ttt`"),
        ({"api_key": "k"}, {"context": 1024}, "needs at least 1026"),
    ],
)
def test_trouble_is_told(
    scorer: OracleScorer, tmp_path: Path, options: dict[str, Any], server_options: dict[str, Any], message: str
):
    docs = {d: [list(t.encode()) for t in found] for d, found in read_texts(write_texts(tmp_path)).items()}

    async def measure() -> None:
        async with OracleServer(scorer, **server_options).client(**options) as client:
            await run("p3", client, plan("p3", docs, 1, 2))

    with pytest.raises((ServerError, ConfigError), match=message):
        asyncio.run(measure())


def test_no_server_is_told():
    async def connect() -> None:
        async with Client("http://127.0.0.1:9"):
            pass

    with pytest.raises(ServerError, match=r"GET http://127\.0\.0\.1:9/v1/models"):
        asyncio.run(connect())


def test_windows_of_few_and_of_too_few_documents():
    """Documents first, then further segments of them, then the last window again."""
    docs = {"d": [list(range(2500)), list(range(3000, 4100)), [1] * 1025]}
    work = interactions(docs, 1, 4)
    assert work.domains == ["d"]
    windows = work.windows[0]
    assert all(len(w) == 1025 for w in windows)
    assert sorted(w[0] for w in windows[:3]) == [0, 1024, 3000]
    assert windows[3] == windows[2]
    again = repeats(docs, 1, 4).windows[0]
    assert again == [again[0]] * 4
    with pytest.raises(ConfigError, match="'d' has 0 documents"):
        interactions({"d": [[1] * 1025]}, 1, 1)


@pytest.mark.parametrize("make", [lambda p: p / "absent", lambda p: p, lambda p: (p / "empty").mkdir() or p])
def test_folders_without_texts_are_refused(tmp_path: Path, make: Any):
    with pytest.raises(ConfigError, match="domain"):
        read_texts(make(tmp_path))


def test_retrieval_finds_the_chunk_that_shares_rare_tokens():
    earlier = [list(range(1000, 2024)), list(range(5000, 6024))]
    request = list(range(5130, 5180)) + [7] * 975
    found = retrieve(earlier, request, room=10_000)
    assert len(found) == 8 * 128
    assert set(range(5128, 5256)) <= set(found)
    assert retrieve(earlier, request, room=100) == found[-100:]
    assert retrieve([], request, room=100) == []
    scored = [7] * 256 + list(range(5128, 5256))
    assert retrieve(earlier, scored, 10_000) == retrieve(earlier, [7] * 256, 10_000), "what is scored must not be searched"
