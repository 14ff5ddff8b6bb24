"""Which blocks of the prefix cache a session's request may read and write.

With `last` no key or value depends on a delta: everybody shares blocks. With `deep` they do, and vLLM's cache must know whose
they are: the path of a session's adapter, a part of a block's key, says under which *epoch* of its delta it was computed. A new
epoch begins when the delta has moved by more than `schedule.kv_epoch`. What was computed while the delta may have moved, in a
way that the engine core does not know of yet, gets a key that nobody asks for.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm_ttt.config import TTTConfig
from vllm_ttt.types import ADAPTER_PATH, ChunkReport

if TYPE_CHECKING:
    from vllm_ttt.engine.ledger import Session
    from vllm_ttt.engine.requests import Attached


@dataclass(slots=True)
class Epoch:
    """Of one session. ``moved`` bounds how far the delta is from where it was when the epoch began, relative to its weights."""

    number: int = 0
    #: the version that has been counted in
    version: int = 0
    moved: float = 0.0

    def begin(self, version: int) -> None:
        self.number, self.version, self.moved = self.number + 1, version, 0.0


class BlockKeys:
    """One per scheduler. Without `deep` every method does nothing."""

    def __init__(self, config: TTTConfig):
        self.on = config.adapt.preset == "deep" and config.adapt.layers != 1
        self.config = config
        self.private = itertools.count()

    def learned(self, session: Session, chunk: ChunkReport) -> None:
        """Before the session takes over what the chunk did to its version."""
        if not self.on:
            return
        epoch, learn = session.epoch, self.config.learn
        self._catch_up(session)
        if chunk.version != session.version:
            # A step has the length rate, the decay shortens the delta, and so does the trust region: no path is longer.
            norm = learn.max_norm if chunk.norm is None else chunk.norm
            epoch.moved += (chunk.rate + learn.decay * norm) * min(1.0, chunk.tokens / learn.chunk)
            epoch.version = chunk.version
        if epoch.moved > self.config.schedule.kv_epoch:
            epoch.begin(chunk.version)

    def moves(self, attached: Attached, others: Iterable[Attached]) -> None:
        """A request runs of which something is still to be learned: the delta moves under the ``others`` of its session, and
        under itself once it is read."""
        if not self.on:
            return
        for other in others:
            if other.started:
                self.leave(other.request, attached.session)
        if attached.request.num_computed_tokens >= attached.prompt:
            self.leave(attached.request, attached.session)

    def enter(self, request: Any, session: Session, exact: bool) -> None:
        """The request is about to be given blocks: give it the keys that are right for what serves it.

        Args:
            exact: whether the version that will serve its prompt is known to be the session's, to the end of the prompt.
        """
        if not self.on:
            return
        path = self._path(session) if exact else self._nobodys(session)
        if request.lora_request.lora_path != path:
            self._set(request, path)
            request.block_hashes.clear()
            request.update_block_hashes()

    def leave(self, request: Any, session: Session) -> None:
        """From the next block on, the version that serves the request is not known any more."""
        if self.on and self.shared(request):
            self._set(request, self._nobodys(session))

    @staticmethod
    def shared(request: Any) -> bool:
        """Whether other requests may read the blocks that it writes."""
        return not request.lora_request.lora_path.endswith("p")

    def _path(self, session: Session) -> str:
        self._catch_up(session)
        base = f"{ADAPTER_PATH}{session.adapter}"
        return base if self._is_base(session) else f"{base}/{session.epoch.number}"

    @staticmethod
    def _is_base(session: Session) -> bool:
        """Version 0 is the base model, bit for bit, and shares its blocks."""
        return session.version == 0 and session.saved is None

    def _nobodys(self, session: Session) -> str:
        return f"{ADAPTER_PATH}{session.adapter}/{next(self.private)}p"

    def _catch_up(self, session: Session) -> None:
        """Whatever changed the version but a chunk (a rollback, a fork, a file) began an epoch."""
        if session.epoch.version != session.version:
            session.epoch.begin(session.version)

    @staticmethod
    def _set(request: Any, path: str) -> None:
        lora = request.lora_request
        request.lora_request = type(lora)(lora.lora_name, lora.lora_int_id, path)
