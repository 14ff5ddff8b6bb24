"""Encryption at rest: what sessions have learned is sealed with the operator's key before it is written. Imports nothing heavy.

AES-256-GCM (cryptography). Each file and each value has a key of its own, derived from the operator's with HKDF-SHA256 and a
salt that is drawn for it; what it is called is associated data: put in another's place, it does not open. A file is sealed in
pieces, whose nonces count them and mark the last, so that none can be left out.
"""

from __future__ import annotations

import base64
import os
import secrets
from pathlib import Path
from typing import Any

from vllm_ttt.errors import ConfigError, TTTError

#: Bytes of the key in a key file.
KEY = 32
_MAGIC, _SALT, _TAG = b"TTT\x01", 16, 16
#: Bytes of one piece: what AES-GCM seals at once has a limit.
_PIECE = 2**26
#: What a seal adds at most to data of a few GiB.
OVERHEAD = 2**16


class SealError(TTTError):
    """What was to be opened is damaged, was sealed with another key, or is in another's place."""


class Vault:
    """``key`` None: whatever is sealed is left as it is."""

    def __init__(self, key: bytes | None = None):
        self.key = key
        self._names: Any = None

    @classmethod
    def of(cls, file: str | Path | None) -> Vault:
        """The vault of a key file; None: none. Raises ConfigError where it cannot be read, or is no key."""
        if file is None:
            return cls()
        try:
            with open(file, "rb") as stream:  # noqa: PTH123
                mode, key = os.fstat(stream.fileno()).st_mode, stream.read(KEY + 1)
        except OSError as error:
            raise ConfigError(f"sessions.key_file {file} cannot be read: {error.strerror or error}") from None
        if mode & 0o077:
            raise ConfigError(f"sessions.key_file {file} can be read by others; chmod 600 it")
        if len(key) != KEY:
            raise ConfigError(f"sessions.key_file {file} must hold {KEY} bytes: head -c {KEY} /dev/urandom makes a key")
        return cls(key)

    @property
    def on(self) -> bool:
        return self.key is not None

    def seal(self, data: bytes, name: str) -> bytes:
        """``data`` as it may be written, where it will be called ``name``."""
        if self.key is None:
            return data
        salt = secrets.token_bytes(_SALT)
        cipher, parts = self._cipher(salt), [_MAGIC, salt]
        for at in range(0, max(len(data), 1), _PIECE):
            piece = data[at : at + _PIECE]
            parts.append(cipher.encrypt(_nonce(at // _PIECE, at + _PIECE >= len(data)), piece, name.encode()))
        return b"".join(parts)

    def open(self, data: bytes, name: str) -> bytes:
        """What `seal` was given. Raises SealError."""
        if self.key is None:
            return data
        from cryptography.exceptions import InvalidTag

        head = len(_MAGIC) + _SALT
        if not data.startswith(_MAGIC) or len(data) < head + _TAG:
            raise SealError("it is not sealed, and this state dir's files are")
        cipher, parts, step = self._cipher(data[len(_MAGIC) : head]), [], _PIECE + _TAG
        try:
            for number, at in enumerate(range(head, len(data), step)):
                parts.append(cipher.decrypt(_nonce(number, at + step >= len(data)), data[at : at + step], name.encode()))
        except InvalidTag:
            raise SealError("it does not open: it is damaged, in another's place, or sealed with another key") from None
        return b"".join(parts)

    def name(self, name: str) -> str:
        """A session's name as the database has it: the same for the same name, so that it can be looked for."""
        if self.key is None:
            return name
        return base64.urlsafe_b64encode(self._siv().encrypt(name.encode(), None)).decode().rstrip("=")

    def plain_name(self, stored: str) -> str:
        """What `name` was given. Raises SealError."""
        if self.key is None:
            return stored
        from cryptography.exceptions import InvalidTag

        try:
            return self._siv().decrypt(base64.urlsafe_b64decode(stored + "=" * (-len(stored) % 4)), None).decode()
        except (InvalidTag, ValueError):
            raise SealError("the name of a session does not open") from None

    def _cipher(self, salt: bytes) -> Any:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(self._derive(b"vllm-ttt data", salt, KEY))

    def _siv(self) -> Any:
        if self._names is None:
            from cryptography.hazmat.primitives.ciphers.aead import AESSIV

            self._names = AESSIV(self._derive(b"vllm-ttt names", b"", 64))
        return self._names

    def _derive(self, what: bytes, salt: bytes, length: int) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF

        assert self.key is not None
        return HKDF(SHA256(), length, salt, what).derive(self.key)


#: Leaves everything as it is.
PLAIN = Vault()


def _nonce(number: int, last: bool) -> bytes:
    return number.to_bytes(8, "big") + int(last).to_bytes(4, "big")
