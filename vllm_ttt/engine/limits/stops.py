"""Stop strings, where an answer is learned: what comes from there on is shown to nobody.

vLLM's API server finds them, and aborts the request; the engine core, which knows token ids alone, looks for itself.
"""

from __future__ import annotations

from typing import Any

from vllm_ttt.engine.requests import Attached

#: A letter takes up to so many tokens; and so many tokens more may have come since a stop string ended.
_OF_A_LETTER, _MORE = 4, 8


class Stops:
    """``model_config`` is vLLM's."""

    def __init__(self, model_config: Any):
        self.model_config = model_config
        self._tokenizer: Any = None

    def look(self, attached: Attached) -> None:
        """New tokens of a request have come: note where a stop string begins, if it ends in them."""
        params, outputs = attached.request.sampling_params, attached.outputs
        if params is None or not params.stop or attached.stopped is not None or outputs <= params.min_tokens:
            return
        if self.model_config.skip_tokenizer_init:
            return
        stops = [params.stop] if isinstance(params.stop, str) else params.stop
        room = _OF_A_LETTER * max(map(len, stops)) + _MORE
        first = max(0, outputs - room)
        tokens = list(attached.request.output_token_ids[first:outputs])
        text = self._text(tokens, params)
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if not found:
            return
        attached.stopped = outputs
        if not params.include_stop_str_in_output:
            # The last of the tokens whose text ends before it.
            kept = next((n for n in range(len(tokens), 0, -1) if len(self._text(tokens[:n], params)) <= min(found)), 0)
            attached.stopped = first + kept

    def _text(self, tokens: list[int], params: Any) -> str:
        if self._tokenizer is None:
            from vllm.tokenizers import cached_tokenizer_from_config

            self._tokenizer = cached_tokenizer_from_config(self.model_config)
        return self._tokenizer.decode(tokens, skip_special_tokens=params.skip_special_tokens)
