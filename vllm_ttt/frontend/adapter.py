"""An exported adapter on its way to the client: from a file that only this process still holds."""

from __future__ import annotations

import json
import os
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from fastapi.responses import StreamingResponse

_PIECE = 2**20


def answer(path: str, session_id: str, format: str) -> StreamingResponse:
    """Stream the adapter at ``path``, which the worker has written and nobody else reads, and remove it.

    Args:
        format: "safetensors": the file; "tar": adapter_model.safetensors and adapter_config.json, as peft and vLLM want them
            in one folder.
    """
    stream = open(path, "rb")  # noqa: PTH123, SIM115  # closed when it has been sent
    os.unlink(path)  # noqa: PTH108  # whatever becomes of the client, nothing is left behind
    size = os.fstat(stream.fileno()).st_size
    if format == "tar":
        config = adapter_config(stream)
        parts, length = _tar(stream, size, config)
        kind, name = "application/x-tar", f"{session_id}.tar"
    else:
        parts, length = _pieces(stream), size
        kind, name = "application/octet-stream", f"{session_id}.safetensors"
    headers = {"Content-Length": str(length), "Content-Disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(parts, media_type=kind, headers=headers)


def adapter_config(stream: IO[bytes]) -> bytes:
    """The text of adapter_config.json, from the metadata of the file. Leaves the stream at its beginning."""
    header: dict[str, Any] = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    stream.seek(0)
    return json.dumps(json.loads(header["__metadata__"]["adapter_config"]), indent=2).encode()


def _pieces(stream: IO[bytes]) -> Iterator[bytes]:
    with stream:
        while piece := stream.read(_PIECE):
            yield piece


def _tar(stream: IO[bytes], size: int, config: bytes) -> tuple[Iterator[bytes], int]:
    """The parts of a tar archive, and its length. Members are padded to blocks; two empty blocks are its end."""
    block = tarfile.BLOCKSIZE
    head = _member("adapter_config.json", len(config)) + config + bytes(-len(config) % block)
    head += _member("adapter_model.safetensors", size)
    end = bytes(-size % block + 2 * block)

    def parts() -> Iterator[bytes]:
        yield head
        yield from _pieces(stream)
        yield end

    return parts(), len(head) + size + len(end)


def _member(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.USTAR_FORMAT)
