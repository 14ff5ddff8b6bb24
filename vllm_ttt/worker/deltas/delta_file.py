"""The file of one version of a session: safetensors, B of each adapted module in float32, its last update in bfloat16 under the
same name with UPDATE behind it, what its cache remembers, and what it is in the metadata.

Whatever is read is checked first: its size, its header, and every name, shape and type. Nothing pickled is ever read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as parse
from safetensors.torch import save as serialise
from torch import Tensor

from vllm_ttt.errors import TTTError
from vllm_ttt.geometry import Geometry
from vllm_ttt.vault import OVERHEAD, PLAIN, SealError, Vault

#: Behind the name of a tensor: the last update of that module.
UPDATE = ".update"
#: What the session's cache remembers (worker/ngrams/stream.py), int32; where it remembers nothing, the file has none.
CACHE = "cache.tokens"
#: Bytes of that, at most.
MAX_CACHE = 10 * 2**22
#: A header holds the tensors' names and the metadata, of which the ledger's history is the largest part.
MAX_HEADER = 2**22


class FileError(TTTError):
    """A file is not what it should be; the message says how."""


def encode(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
    return serialise(tensors, metadata)


def digest(tensors: dict[str, Tensor]) -> str:
    """Of a delta, whatever file it is in: the SHA-256 of B of its modules, float32, in the order of ``tensors``."""
    found = hashlib.sha256()
    for tensor in tensors.values():
        found.update(tensor.float().contiguous().numpy().tobytes())
    return found.hexdigest()


def decode(data: bytes, shapes: dict[str, tuple[int, ...]], dtypes: tuple[torch.dtype, ...]) -> dict[str, Tensor]:
    """The tensors of a file. Raises FileError unless they are exactly those of ``shapes``, of one of ``dtypes``, and finite."""
    header = read_header(data)
    names = set(header) - {"__metadata__"}
    if names != set(shapes):
        raise FileError(f"it holds the tensors {_few(names)}; expected are {_few(set(shapes))}")
    try:
        tensors = parse(data)
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, OverflowError) as error:
        raise FileError(f"it is not a valid safetensors file: {error}") from None
    for name, shape in shapes.items():
        if tuple(tensors[name].shape) != shape:
            raise FileError(f"{name} has the shape {tuple(tensors[name].shape)}; expected is {shape}")
        allowed = (torch.int32,) if name == CACHE else dtypes
        if tensors[name].dtype not in allowed:
            raise FileError(f"{name} is {tensors[name].dtype}; expected is {' or '.join(map(str, allowed))}")
        if not tensors[name].isfinite().all():
            raise FileError(f"{name} has values that are not finite")
    return tensors


def read_header(data: bytes) -> dict[str, Any]:
    """The JSON header of a safetensors file. Raises FileError; never reads beyond what is there."""
    if len(data) < 8:
        raise FileError(f"it has {len(data)} bytes, too few for a safetensors file")
    length = int.from_bytes(data[:8], "little")
    if length > MAX_HEADER or length > len(data) - 8:
        raise FileError("it does not begin as a safetensors file does, or its header is longer than such a file may have")
    try:
        header = json.loads(data[8 : 8 + length])
    except (ValueError, RecursionError):
        raise FileError("its header is not JSON, as that of a safetensors file is") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise FileError("its header is not that of a safetensors file")
    return header


def read(path: Path, limit: int) -> bytes:
    """The content of a plain file of at most ``limit`` bytes. Raises FileError for another, OSError where it cannot be read."""
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(handle, "rb") as stream:  # noqa: PTH123
        size = os.fstat(handle).st_size
        if not os.path.isfile(path):  # noqa: PTH113
            raise FileError("it is not a plain file")
        if size > limit:
            raise FileError(f"it has {size} bytes; a session's file has at most {limit}")
        return stream.read(limit + 1)


def write(path: Path, data: bytes) -> str:
    """Put ``data`` there whole or not at all, and on the disk when this returns. Returns its sha256. Raises OSError."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(handle, view) :]
            os.fsync(handle)
        finally:
            os.close(handle)
        draft.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
    return hashlib.sha256(data).hexdigest()


def load(path: Path, checksum: str, geometry: Geometry, vault: Vault = PLAIN) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A session's file: its tensors and metadata. Raises FileError where it is not the one with that sha256."""
    data = read(path, geometry.bytes + MAX_HEADER + MAX_CACHE + OVERHEAD)
    if hashlib.sha256(data).hexdigest() != checksum:
        raise FileError("its checksum is not the one that was recorded")
    try:
        data = vault.open(data, path.name)
    except SealError as error:
        raise FileError(str(error)) from None
    shapes: dict[str, tuple[int, ...]] = {name + end: shape for end in ("", UPDATE) for name, shape in geometry.shapes.items()}
    if (cache := read_header(data).get(CACHE)) is not None:
        shapes[CACHE] = _length(cache)
    tensors = decode(data, shapes, (torch.float32, torch.bfloat16))
    return tensors, read_header(data).get("__metadata__", {})


def _length(entry: Any) -> tuple[int]:
    """The shape of the cache in a header; what it is worth `decode` sees."""
    shape = entry.get("shape") if isinstance(entry, dict) else None
    if not (isinstance(shape, list) and len(shape) == 1 and isinstance(shape[0], int) and 0 <= 4 * shape[0] <= MAX_CACHE):
        raise FileError(f"{CACHE} has the shape {str(shape)[:60]}; expected is one dimension, of at most {MAX_CACHE} bytes")
    return (shape[0],)


def _few(names: set[str]) -> str:
    shown = sorted(str(n)[:60] for n in names)
    return ", ".join(shown[:6]) + (f" and {len(shown) - 6} more" if len(shown) > 6 else "") if shown else "none"
