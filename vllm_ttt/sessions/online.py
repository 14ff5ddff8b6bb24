"""Sessions of a server that runs, over its routes under /v1/ttt."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import httpx

from vllm_ttt import proxies
from vllm_ttt.sessions.offline import SessionsError
from vllm_ttt.types import check_session_id


class Online:
    """``url``: where the server is, with or without /v1."""

    def __init__(self, url: str, api_key: str | None):
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self.url = url.rstrip("/").removesuffix("/v1")
        self.http = proxies.connect(httpx.Client, self.url, SessionsError, base_url=self.url, headers=headers, timeout=120)

    def list(self, all_keys: bool = False) -> list[dict[str, Any]]:
        params: dict[str, str] = {"all": "true"} if all_keys else {}
        found: list[dict[str, Any]] = []
        while True:
            page = self._ask("GET", "/v1/ttt/sessions", params=params).json()
            found += page["sessions"]
            if page.get("next") is None:
                return found
            params["after"] = page["next"]

    def show(self, name: str) -> dict[str, Any]:
        return self._ask("GET", self._path(name)).json()

    def remove(self, name: str) -> dict[str, Any]:
        return self._ask("DELETE", self._path(name)).json()

    def export(self, name: str, out: Path) -> dict[str, Any]:
        """Write the adapter's two files into the folder ``out``."""
        answer = self._ask("GET", self._path(name) + "/adapter", params={"format": "tar"})
        out.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
            for wanted in ("adapter_config.json", "adapter_model.safetensors", "provenance.json"):
                member = tar.extractfile(wanted)
                if member is None:
                    raise SessionsError(f"the server's answer has no {wanted}")
                (out / wanted).write_bytes(member.read())
        return {"session_id": name, "bytes": len(answer.content), "folder": str(out)}

    @staticmethod
    def _path(name: str) -> str:
        return f"/v1/ttt/sessions/{check_session_id(name)}"

    def _ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            answer = self.http.request(method, path, **options)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise SessionsError(f"{self.url} does not answer{proxies.through(self.url)}: {error}") from None
        if answer.is_success:
            return answer
        try:
            message = answer.json()["error"]["message"]
        except (ValueError, KeyError, TypeError):
            message = answer.text[:200] or answer.reason_phrase
        if answer.status_code == 401:
            message += "; give the server's key with --api-key or VLLM_API_KEY"
        raise SessionsError(f"{self.url}: {message} ({answer.status_code})")
