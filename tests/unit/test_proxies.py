"""Our own clients with a proxy in the environment: a server on this machine is asked directly."""

from __future__ import annotations

import asyncio
import http.server
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vllm_ttt import proxies
from vllm_ttt.errors import TTTError
from vllm_ttt.eval.client import Client, ServerError
from vllm_ttt.sessions.offline import SessionsError
from vllm_ttt.sessions.online import Online

pytestmark = pytest.mark.unit


class Answer(http.server.BaseHTTPRequestHandler):
    """An empty server: nothing is listed, and one model is served."""

    def do_GET(self) -> None:
        body = b'{"sessions": []}' if self.path.startswith("/v1/ttt") else b'{"data": [{"id": "m"}]}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "24")
        self.end_headers()
        self.wfile.write(b'{"max_model_len":  2048}')

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server.server_port
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(params=["http://user:secret@127.0.0.1:9", "socks5://user:secret@127.0.0.1:9", "nonsense://x"])
def proxy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Port 9 answers nobody."""
    for name in ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ALL_PROXY", request.param)
    return request.param


async def connect(url: str) -> int:
    async with Client(url) as client:
        return client.max_model_len


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_this_machine_is_asked_directly(proxy: str, port: int, host: str) -> None:
    url = f"http://{host}:{port}"
    assert Online(url, None).list() == []
    assert asyncio.run(connect(url)) == 2048


def test_another_machine_is_asked_through_it_and_the_message_says_so(proxy: str) -> None:
    url = "http://192.0.2.1:8000"  # of nobody: RFC 5737
    messages = []
    for error, ask in ((SessionsError, lambda: Online(url, None).list()), (ServerError, lambda: asyncio.run(connect(url)))):
        with pytest.raises(error) as caught:
            ask()
        assert isinstance(caught.value, TTTError), "the command prints it, and no traceback"
        messages.append(str(caught.value))
    for message in messages:
        assert url in message
        assert "secret" not in message
        if not proxy.startswith("nonsense"):
            assert "through the proxy of ALL_PROXY" in message


HERE = ("127.0.0.1:8000/v1", "127.8.9.1", "localhost:1", "[::1]:8000", "a.localhost", "0.0.0.0:8000")
ELSEWHERE = ("127.0.0.1.example.com", "localhost.example.com", "10.0.0.1", "[")


def test_what_this_machine_is() -> None:
    assert [host for host in (*HERE, *ELSEWHERE) if proxies.local(f"http://{host}")] == [*HERE]


def test_what_is_no_url_is_no_traceback() -> None:
    with pytest.raises(SessionsError):
        Online("http://[", None).list()
    with pytest.raises(ServerError):
        asyncio.run(connect("http://["))
