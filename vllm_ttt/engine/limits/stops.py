"""Stop strings, where an answer is learned: what comes from there on is shown to nobody.

vLLM's API server finds them, and aborts the request; the engine core, which knows token ids alone, looks for itself, with
the same class of vLLM, which decodes each token once.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vllm.v1.engine.detokenizer import FastIncrementalDetokenizer, IncrementalDetokenizer, SlowIncrementalDetokenizer

from vllm_ttt.engine.limits.text import KEPT, MOST, Stream

if TYPE_CHECKING:
    from vllm_ttt.engine.requests import Attached


@dataclass(slots=True)
class AnswerText:
    """The text of an answer as it grows."""

    detokenizer: Any
    #: characters after so many tokens
    ends: list[int] = field(default_factory=lambda: [0])

    def add(self, tokens: list[int], included: bool) -> int | None:
        """The next tokens; how many of the answer's come before a stop string, once one has come.

        ``included`` is `SamplingParams.include_stop_str_in_output`: the stop string's own tokens are among them.
        """
        for token in tokens:
            found = self.detokenizer.update([token], stop_terminated=False)
            if found is not None:
                return len(self.ends) if included else self._before(len(self.detokenizer.output_text))
            self.ends.append(len(self.detokenizer.output_text))
        return None

    def _before(self, stop: int) -> int:
        """Tokens whose text ends by character ``stop``, where vLLM cut it. One that adds no text begins the next letter."""
        tokens = bisect_left(self.ends, stop)
        return tokens if tokens < len(self.ends) and self.ends[tokens] == stop else tokens - 1


class Stops:
    """``model_config`` is vLLM's."""

    def __init__(self, model_config: Any):
        self.model_config = model_config
        self._tokenizer: Any = None

    def look(self, attached: Attached) -> None:
        """New tokens of a request have come: note where a stop string begins, if it ends in them."""
        request, params = attached.request, attached.request.sampling_params
        if params is None or not params.stop or attached.stopped is not None or self.model_config.skip_tokenizer_init:
            return
        if attached.text is None:
            attached.text = AnswerText(self._detokenizer(request))
        tokens = list(request.output_token_ids[len(attached.text.ends) - 1 : attached.outputs])
        attached.stopped = attached.text.add(tokens, params.include_stop_str_in_output)

    def _detokenizer(self, request: Any) -> IncrementalDetokenizer:
        """vLLM's, but that no answer keeps it busy."""
        found = IncrementalDetokenizer.from_new_request(self.tokenizer, request)
        if isinstance(found, SlowIncrementalDetokenizer):
            return BoundedDetokenizer(self.tokenizer, request)
        if isinstance(found, FastIncrementalDetokenizer):
            found.stream = Stream(found.skip_special_tokens, (request.prompt_token_ids or ())[-MOST:])  # type: ignore[assignment]
        return found

    @property
    def tokenizer(self) -> Any:
        """The model's, read when it is first needed."""
        if self._tokenizer is None:
            from vllm.tokenizers import cached_tokenizer_from_config

            self._tokenizer = cached_tokenizer_from_config(self.model_config)
        return self._tokenizer


class BoundedDetokenizer(SlowIncrementalDetokenizer):
    """As `Stream`: vLLM's detokenizer for tokenizers of other libraries is silent as DecodeStream is."""

    text = ""

    def decode_next(self, next_token_id: int) -> str:
        piece, end = super().decode_next(next_token_id), len(self.tokens)
        if piece:
            piece, self.text = self.text + piece, ""
        elif end - self.read_offset >= MOST:
            self.text += self.tokenizer.convert_tokens_to_string(self.tokens[self.read_offset : end - KEPT])
            self.prefix_offset = self.read_offset = end - KEPT
        return piece
