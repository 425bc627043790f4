"""A connection to another node's keeper (checkpoints/keeper.py): who may make one, and how long it may take.

After the greeting each message has its length (4 bytes, little-endian) before it, and is JSON:

    <- 32 random bytes
    -> 32 random bytes, and HMAC-SHA256(token, "caller" + both)
    <- HMAC-SHA256(token, "keeper" + both)

The token keeps strangers out. It does not hide what is sent, nor vouch for it: what is read is verified
against the manifest on the site's file system, as any copy is. No torch.
"""

from __future__ import annotations

import errno
import hmac
import json
import os
import secrets
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SILENCE_SECONDS = 20.0  # for any request, and
SLOWEST = 20e6  # bytes per second beyond that: a fifth of what a link of 1 Gbit/s moves
PART = 4 << 20  # bytes of a file that are sent at a time
_NONCE = 32
_LONGEST = 1 << 16  # bytes of a message


@dataclass(frozen=True)
class Peer:
    """Where a node's keeper listens, and the file of the token that it wants to see proof of."""

    host: str
    port: int
    token: str


class Refused(OSError):
    """The keeper answers, and says no."""


class Channel:
    """A connection of which either end may hang, or lie: every wait ends."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._deadline = connection, 0.0
        self.allow(0)

    def allow(self, count: int, seconds: float | None = None) -> None:
        """From now on, the time that moving so many bytes may take."""
        self._deadline = time.monotonic() + (seconds or SILENCE_SECONDS) + count / SLOWEST

    def send(self, data: bytes | memoryview) -> None:
        self._socket.settimeout(self._left())
        self._socket.sendall(data)

    def fill(self, view: memoryview) -> None:
        """Raises ConnectionError when the other end closes before."""
        while view:
            self._socket.settimeout(self._left())
            if not (got := self._socket.recv_into(view)):
                raise ConnectionResetError(errno.ECONNRESET, "the connection was closed")
            view = view[got:]

    def bytes(self, count: int) -> bytes:
        data = bytearray(count)
        self.fill(memoryview(data))
        return bytes(data)

    def tell(self, **message: Any) -> None:
        data = json.dumps(message).encode()
        self.send(len(data).to_bytes(4, "little") + data)

    def message(self) -> dict[str, Any]:
        """Raises Refused, or ConnectionError for what is no message."""
        size = int.from_bytes(self.bytes(4), "little")
        try:
            message = json.loads(self.bytes(size)) if size <= _LONGEST else None
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise ConnectionAbortedError(errno.ECONNABORTED, "not a message of this protocol")
        if "refused" in message:
            raise Refused(errno.EIO, str(message["refused"]))
        return message

    def close(self) -> None:
        self._socket.close()

    def _left(self) -> float:
        if (left := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError(errno.ETIMEDOUT, "it took too long")
        return left


def make_token(path: Path) -> None:
    """A file that its user alone can read. Raises OSError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(secrets.token_hex(32))


def connect(peer: Peer) -> Channel:
    """To a keeper that has the same token. Raises OSError."""
    token = Path(peer.token).read_bytes()
    channel = Channel(socket.create_connection((peer.host, peer.port), SILENCE_SECONDS))
    try:
        nonces = channel.bytes(_NONCE) + (own := secrets.token_bytes(_NONCE))
        channel.send(own + _proof(token, b"caller", nonces))
        if not hmac.compare_digest(channel.bytes(_NONCE), _proof(token, b"keeper", nonces)):
            raise PermissionError(errno.EACCES, "it does not have the segment's token")
    except BaseException:
        channel.close()
        raise
    return channel


def admit(channel: Channel, token: bytes) -> None:
    """What `connect` is answered by. Raises OSError."""
    nonces = secrets.token_bytes(_NONCE)
    channel.send(nonces)
    nonces += channel.bytes(_NONCE)
    if not hmac.compare_digest(channel.bytes(_NONCE), _proof(token, b"caller", nonces)):
        raise PermissionError(errno.EACCES, "a caller does not have the segment's token")
    channel.send(_proof(token, b"keeper", nonces))


def _proof(token: bytes, who: bytes, nonces: bytes) -> bytes:
    if len(token) < _NONCE:
        raise PermissionError(errno.EACCES, "the segment's token is cut short")
    return hmac.digest(token, who + nonces, "sha256")
