"""Unit tests come first; then the engine tests, sorted by the server that they use."""

from __future__ import annotations

import os
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from vllm_ttt.eval import real

DEMO = Path(__file__).parents[1] / "demo"

# Two cores and a server beside: how long an example takes says nothing.
settings.register_profile("vllm-ttt", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("vllm-ttt")


#: Those that several files use: each is started once, the longest first, and then those of one file or test.
SERVERS = ("server", "exact", "deep", "cached", "small", "half")


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def server(item: pytest.Item) -> str | None:
        return next((name for name in SERVERS if name in getattr(item, "fixturenames", ())), None)

    def rank(item: pytest.Item) -> tuple[bool, int]:
        name = server(item)
        return item.get_closest_marker("unit") is None, SERVERS.index(name) if name else len(SERVERS)

    items.sort(key=rank)  # stable: within a rank the order stays as it was
    for item in items:  # with --dist loadgroup a worker takes all of a group
        if item.get_closest_marker("engine") and isinstance(item, pytest.Function):
            starts_its_own = "stage" in signature(item.function).parameters
            if group := server(item) or ("" if starts_its_own else item.path.stem):
                item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(autouse=True)
def _no_secret_stays() -> Iterator[None]:
    """The code under test leaves the tenants' secret in the environment, for the processes that it starts."""
    before = dict(os.environ)
    yield
    for name in ("TTT_SECRET", "TTT_ADMIN_TENANT"):
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For this test alone: in a process that has multiplied with two threads, vLLM's own products with one are wrong for some
    widths, such as 192 (oneDNN's, seen on a CPU without AVX-512)."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def real_model() -> Path:
    """Folder of SmolLM2-135M-Instruct, which `make real` has written."""
    assert real.MODEL.is_dir(), f"there is no {real.MODEL}: run `make real`"
    return real.MODEL


@pytest.fixture(scope="session")
def real_texts() -> Path:
    """Folder of texts that the real model cannot know."""
    assert real.TEXTS.is_dir(), f"there is no {real.TEXTS}: run `make real`"
    return real.TEXTS


@pytest.fixture(scope="session")
def documents() -> dict[str, list[list[int]]]:
    """Token ids of demo/texts by domain."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model", local_files_only=True)
    read = lambda file: tokenizer(file.read_text(encoding="utf-8"), verbose=False)["input_ids"]  # noqa: E731
    return {d.name: [read(f) for f in sorted(d.glob("*.txt"))] for d in sorted((DEMO / "texts").iterdir())}
