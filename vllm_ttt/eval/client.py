"""A client of a running server, which may be any vLLM: it scores token ids, in a session or without one."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Self

import httpx

from vllm_ttt import proxies
from vllm_ttt.errors import TTTError
from vllm_ttt.eval.measures import Reading

#: Requests in flight; the published figures have 16 sessions side by side.
PARALLEL = 16


class ServerError(TTTError):
    """The server cannot be reached, or does not answer as a vLLM with the plugin does."""


class Client:
    """Use as an async context manager.

    Args:
        base_url: as in http://127.0.0.1:8000, with or without /v1.
        model: the served model's name; None: the first that is not an adapter.
        api_key: the server's ``--api-key``.
        timeout: seconds for one answer; a held request waits for its session's earlier ones.
        transport: how httpx connects, for tests.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        timeout: float = 300,
        transport: httpx.AsyncBaseTransport | None = None,
    ):
        self.url = base_url.rstrip("/").removesuffix("/v1")
        self.model = model or ""
        #: tokens that a request may hold, known after ``connect``
        self.max_model_len = 0
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        # vLLM closes an idle connection after 5 s: this side must be the first to think of it as over
        limits = httpx.Limits(max_connections=PARALLEL, keepalive_expiry=2)
        options: dict[str, Any] = {"headers": headers, "timeout": timeout, "limits": limits, "transport": transport}
        self._http = proxies.connect(httpx.AsyncClient, self.url, ServerError, **options)
        self._turn = asyncio.Semaphore(PARALLEL)

    async def __aenter__(self) -> Self:
        try:
            return await self.connect()
        except BaseException:
            await self._http.aclose()
            raise

    async def __aexit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._http.aclose()

    async def connect(self) -> Self:
        """Find the model's name and its context. Raises ServerError."""
        models = (await self._call("GET", "/v1/models"))["data"]
        names = [m["id"] for m in models if not m.get("parent")]
        if self.model and self.model not in [m["id"] for m in models]:
            raise ServerError(f"{self.url} does not serve {self.model!r}; it serves {', '.join(names)}")
        self.model = self.model or names[0]
        answer = await self._call("POST", "/tokenize", {"model": self.model, "prompt": "a"})
        self.max_model_len = answer["max_model_len"]
        return self

    async def preset(self) -> str:
        """Which preset is served; "last" where that is not known."""
        settings = await self._call("GET", "/v1/ttt/config", missing_ok=True)
        return settings["adapt"]["preset"] if settings else "last"

    async def tokenize(self, text: str) -> list[int]:
        """Token ids of ``text``, as the server would read it in a prompt."""
        return (await self._call("POST", "/tokenize", {"model": self.model, "prompt": text}))["tokens"]

    async def score(self, ids: list[int], session: str | None = None) -> list[float]:
        """Negative log-likelihood in nats of every token but the first; with ``session``, it is learned afterwards."""
        return list((await self.read(ids, session)).losses)

    async def read(self, ids: list[int], session: str | None = None, knobs: dict[str, int] | None = None) -> Reading:
        """What the model makes of every token but the first; with ``session``, they are learned afterwards, unless ``knobs``
        (as ``{"ttt_cache": 0}``) say otherwise.

        Raises ServerError: the request was refused, or a session was named and the answer has no ``ttt`` object.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ids,
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,  # the token that is there, and the most likely one
        }
        if session is not None:
            body |= {"session_id": session, "vllm_xargs": {"ttt_learn": 1, **(knobs or {})}}
        async with self._turn:
            answer = await self._call("POST", "/v1/completions", body)
        if session is not None and "ttt" not in answer:
            raise ServerError(f"{self.url} answers but does not learn: start it with `vllm serve MODEL --plugin ttt`")
        # position i: {id: {"logprob", "rank", "decoded_token"}}, the token there and the likeliest; nothing precedes the first
        positions = answer["choices"][0]["prompt_logprobs"][1:]
        there = [position[str(token)] for token, position in zip(ids[1:], positions, strict=True)]
        tops = [min(position.items(), key=lambda entry: entry[1]["rank"]) for position in positions]
        texts = [entry["decoded_token"] for entry in there]
        return Reading(
            [-entry["logprob"] for entry in there],
            [int(token) for token, _ in tops],
            [-entry["logprob"] for _, entry in tops],
            texts if None not in texts else None,
        )

    async def go_on(self, ids: list[int], tokens: int, session: str | None = None) -> str:
        """What the model makes of the next ``tokens`` tokens, the likeliest each time. Nothing is learned."""
        answer = await self._call("POST", "/v1/completions", self._answer({"prompt": ids}, tokens, session))
        return answer["choices"][0]["text"]

    async def ask(self, question: str, tokens: int, session: str | None = None) -> str | None:
        """The answer to a chat's only message; None: the model has no chat template. Nothing is learned."""
        body = self._answer({"messages": [{"role": "user", "content": question}]}, tokens, session)
        try:
            answer = await self._call("POST", "/v1/chat/completions", body)
        except ServerError as error:
            if "chat template" in str(error):
                return None
            raise
        return answer["choices"][0]["message"]["content"]

    def _answer(self, prompt: dict[str, Any], tokens: int, session: str | None) -> dict[str, Any]:
        body = {"model": self.model, "max_tokens": tokens, "temperature": 0, **prompt}
        return body if session is None else body | {"session_id": session, "vllm_xargs": {"ttt_learn": 0}}

    async def forget(self, session: str) -> None:
        """Delete a session. One that does not exist is no error."""
        await self._call("DELETE", f"/v1/ttt/sessions/{session}", missing_ok=True)

    async def _call(self, method: str, path: str, body: dict[str, Any] | None = None, missing_ok: bool = False) -> Any:
        try:
            answer = await self._http.request(method, self.url + path, json=body)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            how = proxies.through(self.url)
            raise ServerError(f"{method} {self.url}{path}{how}: {error or type(error).__name__}") from error
        if answer.is_success:
            return answer.json() if answer.content else None
        if missing_ok and answer.status_code in (404, 405):
            return None
        hint = " (--api-key)" if answer.status_code == 401 else ""
        raise ServerError(f"{method} {self.url}{path}: {answer.status_code}{hint} {answer.text[:500]}")
