"""Prompts out of the demo's texts, as token ids: a client that knows them knows what will be learned of them."""

from __future__ import annotations

import random
from pathlib import Path

import requests

from vllm_ttt.eval.texts import read_texts

TEXTS = Path(__file__).resolve().parents[2] / "demo" / "texts"


class Texts:
    """``documents``: text and ids of each. Every prompt is drawn with a generator of its own: two runs send the same."""

    def __init__(self, url: str, model: str, headers: dict[str, str], per_domain: int = 3):
        texts = [text for domain in read_texts(TEXTS).values() for text in domain[:per_domain]]
        encode = lambda text: requests.post(  # noqa: E731
            f"{url}/tokenize", json={"model": model, "prompt": text}, headers=headers, timeout=60
        ).json()["tokens"]
        self.documents: list[tuple[str, list[int]]] = [(text, encode(text)) for text in texts]

    def window(self, rng: random.Random, tokens: int) -> list[int]:
        """So many consecutive tokens of some document; fewer where none has as many."""
        long = [ids for _, ids in self.documents if len(ids) > tokens] or [max((i for _, i in self.documents), key=len)]
        ids = rng.choice(long)
        start = rng.randrange(max(1, len(ids) - tokens))
        return ids[start : start + tokens]

    def passage(self, rng: random.Random, characters: int) -> str:
        """Text for a chat's message."""
        text = rng.choice(self.documents)[0]
        start = rng.randrange(max(1, len(text) - characters))
        return text[start : start + characters]
