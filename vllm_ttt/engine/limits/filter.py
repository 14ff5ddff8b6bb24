"""What of a prompt is not learned because an operator's pattern matches its text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vllm_ttt.automaton import Automaton
from vllm_ttt.engine.limits.text import Stream
from vllm_ttt.errors import ConfigError


class Filter:
    """``model_config`` is vLLM's. Raises ConfigError where there are patterns and no tokenizer."""

    def __init__(self, patterns: Sequence[str], model_config: Any):
        self.model_config, self._tokenizer = model_config, None
        self.automaton = Automaton(patterns) if patterns else None
        if patterns and model_config.skip_tokenizer_init:
            raise ConfigError("learn.filter matches text, and --skip-tokenizer-init leaves none; serve with the tokenizer")

    def pairs(self, ids: Sequence[int]) -> list[tuple[int, int]]:
        """Ranges (first, end) of a prompt's pairs whose next token has a character of a match."""
        if self.automaton is None or len(ids) < 2:
            return []
        text, ends = self._text(ids)
        found: list[tuple[int, int]] = []
        token = 0
        for first, end in self.automaton.covered(text):
            while ends[token] <= first:
                token += 1
            start = token
            while ends[token] < end:
                token += 1
            # Tokens that are no text by themselves end where the one that completes them does: they belong to it.
            while token + 1 < len(ids) and ends[token + 1] == ends[token]:
                token += 1
            pair = max(start - 1, 0), token
            if found and pair[0] <= found[-1][1]:
                pair, _ = (found[-1][0], max(pair[1], found[-1][1])), found.pop()
            if pair[0] < pair[1]:
                found.append(pair)
        return found

    def _text(self, ids: Sequence[int]) -> tuple[str, list[int]]:
        """The text of some tokens, and where each ends in it. One that is a part of a character has the whole of it."""
        parts, ends, length, waiting = [], [], 0, 0
        for piece in self._pieces(ids):
            waiting += 1
            if piece:
                parts.append(piece)
                length += len(piece)
                ends += [length] * waiting
                waiting = 0
        return "".join(parts), ends + [length] * waiting

    def _pieces(self, ids: Sequence[int]) -> list[str | None]:
        """What each token adds to the text; None: nothing yet."""
        if self._tokenizer is None:
            from vllm.tokenizers import cached_tokenizer_from_config

            self._tokenizer = cached_tokenizer_from_config(self.model_config)
        tokenizer: Any = self._tokenizer
        if (fast := getattr(tokenizer, "_tokenizer", None)) is None:
            return [tokenizer.decode([token], skip_special_tokens=False) for token in ids]
        stream = Stream(skip_special_tokens=False)
        return [stream.step(fast, token) for token in ids]
