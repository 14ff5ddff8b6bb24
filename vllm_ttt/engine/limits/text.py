"""The text of tokens, one after the other, in time that grows with their number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tokenizers import decoders

#: So many tokens in a row that are no text yet are decoded, all but the last: a character that they begin has 4 bytes at most.
MOST, KEPT = 16, 3


class Stream:
    """As `tokenizers.decoders.DecodeStream`, which is silent while the text ends in U+FFFD, since the rest of a character may
    follow, and decodes at each token all since it last said something: of 30,000 bytes that are no text, for minutes."""

    def __init__(self, skip_special_tokens: bool, before: Sequence[int] = ()):
        """``before``: tokens that the text goes on from."""
        self.skip = skip_special_tokens
        self.stream = decoders.DecodeStream(list(before), skip_special_tokens)
        #: tokens that have come since it last said something, and the text of those before them, which is yet to be said
        self.waiting: list[int] = []
        self.text = ""

    def step(self, tokenizer: Any, token: int) -> str | None:
        """What one more token adds to the text; None: nothing yet."""
        self.waiting.append(token)
        try:
            piece = self.stream.step(tokenizer, token)
        except Exception:  # bytes that are no text: it begins anew, as vLLM's own does (v1/engine/detokenizer.py)
            self.stream, self.waiting = decoders.DecodeStream([], self.skip), [token]
            piece = self.stream.step(tokenizer, token)
        if piece:
            piece, self.text = self.text + piece, ""
            self.waiting.clear()
        elif len(self.waiting) == MOST:
            self.text += tokenizer.decode(self.waiting[:-KEPT], skip_special_tokens=self.skip)
            del self.waiting[:-KEPT]
            self.stream = decoders.DecodeStream(self.waiting, self.skip)
        return piece
