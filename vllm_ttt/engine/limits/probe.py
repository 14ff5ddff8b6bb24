"""Reads the guard's text through the model, once: as requests of nobody, scheduled beside the first session's.

Where they are aborted (a pause that aborts, an abort of everything), the text is read again beside the next session's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm.config import VllmConfig
from vllm.lora.request import LoRARequest
from vllm.sampling_params import SamplingParams
from vllm.v1.request import Request

from vllm_ttt.config import GuardConfig
from vllm_ttt.errors import ConfigError
from vllm_ttt.log import logger_of
from vllm_ttt.types import ADAPTER_PATH, RequestPlan, SessionKey, StepPlan

logger = logger_of(__name__)

#: Tokens of a piece of the text: its context.
PIECE = 512
#: Tokens that the text must have.
LEAST = 64
#: Ids of its requests; those of clients begin with other words.
PREFIX = "ttt-probe-"
#: Under which they are held for a slot; no session is called so.
KEY = SessionKey("", "")
#: In the installed package, and in a checkout.
SHIPPED = (Path(__file__).parents[2] / "configs" / "probe.txt", Path(__file__).parents[3] / "configs" / "probe.txt")


def read_text(guard: GuardConfig) -> str:
    """The guard's text. Raises ConfigError where it cannot be read."""
    path = Path(guard.probe) if guard.probe else next((p for p in SHIPPED if p.is_file()), SHIPPED[0])
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"guard.probe {path} cannot be read as text: {error}; name another file, or set guard.every to 0"
        ) from None


def pieces(guard: GuardConfig, vllm_config: VllmConfig) -> list[list[int]]:
    """Token ids of the text, a list for each request; none where the guard is off or the server has no tokenizer.

    Raises ConfigError: the text cannot be read, or is shorter than LEAST.
    """
    if not guard.every:
        return []
    text, model = read_text(guard), vllm_config.model_config
    if model.skip_tokenizer_init:
        logger.warning("vllm-ttt: without a tokenizer the guard has no text to try deltas on, and is off")
        return []
    from vllm.tokenizers import cached_tokenizer_from_config

    tokenizer: Any = cached_tokenizer_from_config(model)
    ids = tokenizer.encode(text, add_special_tokens=False)
    size = min(PIECE, model.max_model_len - 1)
    found, wanted = [], guard.probe_tokens
    for start in range(0, len(ids) - 1, size - 1):  # the last token of a piece is predicted in it, and begins the next
        piece = ids[start : start + min(size, wanted + 1)]
        if len(piece) < 2 or wanted <= 0:
            break
        found.append(piece)
        wanted -= len(piece) - 1
    if (tokens := guard.probe_tokens - max(wanted, 0)) < LEAST:
        raise ConfigError(
            f"guard.probe has {tokens} tokens to predict, and says nothing with fewer than {LEAST}; name a longer text"
        )
    if wanted > 0:
        logger.info("vllm-ttt: the guard's text has %d tokens, fewer than guard.probe_tokens; it is tried whole", tokens)
    return found


class ProbeReading:
    """The requests that read the text, which begin with the first session's."""

    def __init__(self, pieces: list[list[int]], adapter: int, in_slots: bool = True):
        """``adapter``: an id that is no session's. Its delta is all zero; with it, a batch counts as one with session rows.
        ``in_slots``: whether sessions are served from vLLM's LoRA slots."""
        self.text, self.adapter, self.in_slots = pieces, adapter, in_slots
        #: what is still to be read; requests that have been made for it so far
        self.pieces, self.number = pieces, 0
        #: requests that have not ended yet, and whether the worker knows them
        self.open: dict[str, bool] = {}

    def begin(self, like: Request) -> list[Request]:
        """The requests, where they have not been made yet; ``like`` is any, for what the engine core gives them all."""
        lora = LoRARequest(f"ttt:{self.adapter}", self.adapter, f"{ADAPTER_PATH}{self.adapter}") if self.in_slots else None
        made = []
        for piece in self.pieces:
            self.number += 1
            request = Request(
                f"{PREFIX}{self.number}",
                piece,
                SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True, detokenize=False),
                None,
                client_index=like.client_index,
                lora_request=lora,
                block_hasher=like._block_hasher,
            )
            request.skip_reading_prefix_cache = True
            self.open[request.request_id] = False
            made.append(request)
        self.pieces = []
        return made

    def plan(self, request: Any, step: StepPlan) -> None:
        """The step schedules ``request``, one of these."""
        step.sessions = True
        if not self.open[request.request_id]:
            self.open[request.request_id] = True
            tokens, whole = request.num_prompt_tokens, sum(len(piece) - 1 for piece in self.text)
            step.started[request.request_id] = RequestPlan(self.adapter, tokens, False, False, probe=whole)

    def lost(self, request_id: str) -> None:
        """A request has left the engine before its end. Where it was one of these, all of the text is to be read again."""
        if self.open.pop(request_id, None) is not None and not self.pieces:
            self.pieces = self.text
            logger.warning("vllm-ttt: the guard's text was aborted; it is read again beside the next request of a session")
