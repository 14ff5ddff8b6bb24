"""Tenants: one for each API key, and no way back to the key."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_ttt.errors import RequestError
from vllm_ttt.frontend import tenants

pytestmark = pytest.mark.unit


def request(authorization: str | None, keys: list[str] | None) -> Any:
    headers = {} if authorization is None else {"Authorization": authorization}
    app = SimpleNamespace(state=SimpleNamespace(args=SimpleNamespace(api_key=keys)))
    return SimpleNamespace(headers=headers, app=app)


@pytest.fixture(autouse=True)
def _secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setenv(tenants.SECRET_VARIABLE, "s" * 64)


@pytest.mark.parametrize("authorization", [None, "Bearer whatever"])
def test_everybody_is_one_tenant_without_keys(authorization: str | None) -> None:
    assert tenants.tenant_of(request(authorization, None)) == "-"
    assert tenants.tenant_of(None) == "-"


def test_each_key_is_its_own_tenant_and_cannot_be_read_from_it(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ["key-a", "key-ä"]
    found = [tenants.tenant_of(request(f"Bearer {key}", keys)) for key in keys]
    assert found[0] != found[1]
    for key, tenant in zip(keys, found, strict=True):
        assert len(bytes.fromhex(tenant)) == 16
        assert key not in tenant
    assert tenants.tenant_of(request("bearer key-a", ["key-a"])) == found[0]
    monkeypatch.setenv(tenants.SECRET_VARIABLE, "t" * 64)
    assert tenants.tenant_of(request("Bearer key-a", keys)) != found[0]


def test_the_key_of_the_environment_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", "key-a")
    assert tenants.tenant_of(request("Bearer key-a", None)) == tenants.tenant_of(request("Bearer key-a", ["key-a"]))
    with pytest.raises(RequestError):
        tenants.tenant_of(request(None, None))


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Bearer wrong", "Basic key-a", "key-a", "Bearer ä"])
def test_an_unknown_key_has_no_sessions(authorization: str | None) -> None:
    with pytest.raises(RequestError) as caught:
        tenants.tenant_of(request(authorization, ["key-a"]))
    assert caught.value.status == 401
    assert "Authorization: Bearer" in caught.value.message
    assert "key-a" not in caught.value.message
    assert "wrong" not in caught.value.message


def test_the_secret_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(tenants.SECRET_VARIABLE)
    with pytest.raises(RuntimeError, match="ensure_secret"):
        tenants.tenant_of(request("Bearer key-a", ["key-a"]))
    tenants.ensure_secret()
    first = os.environ[tenants.SECRET_VARIABLE]
    tenants.ensure_secret()
    assert os.environ[tenants.SECRET_VARIABLE] == first
    assert len(bytes.fromhex(first)) == 32
    # vLLM would warn of it, or refuse to start.
    assert not tenants.SECRET_VARIABLE.startswith("VLLM_")
