"""An exported adapter on its way to the client: from a file that only this process still holds. While it is on its way its
bytes stay on the disk, or, where they are sealed, in memory: so many of each key, and none that nobody reads."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Any

from fastapi.responses import StreamingResponse

from vllm_ttt.errors import RequestError
from vllm_ttt.types import ADAPTERS_AT_ONCE, ENOUGH_ADAPTERS
from vllm_ttt.vault import Vault

logger = logging.getLogger(__name__)

_PIECE = 2**20
#: Seconds that a client may take for a piece.
PATIENCE = 60.0


class Downloads:
    """Those that this API server is asked for, or sends, by tenant."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @contextmanager
    def take(self, tenant: str) -> Iterator[None]:
        """One of the tenant's, until the end. Raises RequestError (429) where it has all."""
        if self.counts[tenant] >= ADAPTERS_AT_ONCE:
            raise RequestError(ENOUGH_ADAPTERS, 429)
        self.counts[tenant] += 1
        try:
            yield
        finally:
            self.counts[tenant] -= 1
            if not self.counts[tenant]:
                del self.counts[tenant]


class _Unread(Exception):
    """The client takes nothing."""


class Download(StreamingResponse):
    """Ends when all has been sent, when the client is gone, and when it takes nothing for `PATIENCE` seconds."""

    def __init__(self, parts: Iterator[bytes], held: IO[bytes], **rest: Any):
        super().__init__(parts, **rest)
        #: what is given back at the end
        self.held = ExitStack()
        self.held.enter_context(held)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_soon(message: Any) -> None:
            try:
                async with asyncio.timeout(PATIENCE):
                    await send(message)
            except TimeoutError:
                raise _Unread from None

        with self.held:
            try:
                await super().__call__(scope, receive, send_soon)
            except _Unread:  # the server closes a connection whose answer is not whole
                logger.warning("vllm-ttt: a client has taken nothing of an adapter for %g s: its download ends", PATIENCE)


def answer(path: str, session_id: str, format: str, provenance: dict[str, Any], key: str) -> Download:
    """Stream the adapter at ``path``, which the worker has written and nobody else reads, and remove it.

    Args:
        format: "safetensors": the file; "tar": adapter_model.safetensors, adapter_config.json, as peft and vLLM want them
            in one folder, and provenance.json.
        provenance: where it comes from; put into the metadata of the file, too.
        key: what the file is sealed with, hexadecimal; "": it is not.
    """
    stream: IO[bytes] = open(path, "rb")  # noqa: PTH123, SIM115  # closed when it has been sent
    os.unlink(path)  # noqa: PTH108  # whatever becomes of the client, nothing is left behind
    if key:
        with stream:
            sealed = stream.read()
        stream = io.BytesIO(Vault(bytes.fromhex(key)).open(sealed, os.path.basename(path)))  # noqa: PTH119
    size = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    size -= stream.tell()
    metadata = header["__metadata__"]
    metadata["provenance"] = json.dumps(provenance)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    if format == "tar":
        members = {"adapter_config.json": json.loads(metadata["adapter_config"]), "provenance.json": provenance}
        parts, length = _tar(stream, head, size, {k: json.dumps(v, indent=2).encode() for k, v in members.items()})
        kind, name = "application/x-tar", f"{session_id}.tar"
    else:
        parts, length = _pieces(stream, head), len(head) + size
        kind, name = "application/octet-stream", f"{session_id}.safetensors"
    headers = {"Content-Length": str(length), "Content-Disposition": f'attachment; filename="{name}"'}
    return Download(parts, stream, media_type=kind, headers=headers)


def _pieces(stream: IO[bytes], head: bytes) -> Iterator[bytes]:
    yield head
    while piece := stream.read(_PIECE):
        yield piece


def _tar(stream: IO[bytes], head: bytes, size: int, members: dict[str, bytes]) -> tuple[Iterator[bytes], int]:
    """The parts of a tar archive, and its length. Members are padded to blocks; two empty blocks are its end.

    Args:
        head, size: of the adapter, what comes first, and how much of the stream comes then.
    """
    block = tarfile.BLOCKSIZE
    before = b"".join(_member(name, len(text)) + text + bytes(-len(text) % block) for name, text in members.items())
    size += len(head)
    before += _member("adapter_model.safetensors", size)
    end = bytes(-size % block + 2 * block)

    def parts() -> Iterator[bytes]:
        yield before
        yield from _pieces(stream, head)
        yield end

    return parts(), len(before) + size + len(end)


def _member(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)
