"""A node's keeper: has copies of another node's files, which outlive that node, and serves them. No torch.

    python -P -m checkpoints.keeper PARENT TIER TOKEN ADDRESS       tells {"port": p}, ends with its parent

Each node has one. The writers of the node before it in the ring send it the copies that they have made on
their own node (checkpoints/fast.py); it puts them beside its own node's, under the same names and rules.
Whoever restores asks it for blocks. What is said after the greeting (checkpoints/channel.py):

    -> {"keep": attempt, "file": name, "size": n}                       <- {"ready": true}
       -> n bytes, then their crc32c (4 bytes, little-endian)           <- {"kept": true}
    -> {"read": attempt, "file": name, "position": p, "size": n}        <- {"size": m}, then m <= n bytes
    or <- {"refused": reason} instead of any of the keeper's answers
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import socketserver
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO

from crc32c import crc32c

from checkpoints import fast
from checkpoints.beside import stay_beside
from checkpoints.channel import PART, Channel, admit
from checkpoints.lines import tell
from checkpoints.manifest import BLOCK

IDLE_SECONDS = 600.0  # that a keeper waits for a caller's next request
_ATTEMPT, _FILE = re.compile(r"[A-Za-z0-9][\w.-]*"), re.compile(r"writer-\d{5}\.bin")


class Keeper(socketserver.ThreadingTCPServer):
    """Serves one node's tier."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tier: Path, token: bytes, host: str) -> None:
        """Raises OSError. `server_address` has the port."""
        self.tier, self.token = tier, token
        for part in tier.glob("*/.*.part"):  # of a keeper that was killed
            fast.remove(part)
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        self.address_family = found[0]
        super().__init__(found[4], socketserver.BaseRequestHandler)  # type: ignore[arg-type]

    def finish_request(self, request: Any, client_address: Any) -> None:
        """One caller, until it leaves."""
        channel = Channel(request)
        try:
            admit(channel, self.token)
            while True:
                channel.allow(0, IDLE_SECONDS)
                message = channel.message()
                channel.allow(0)
                self._answer(channel, message)
        except ConnectionResetError:
            return  # it has left
        except OSError as error:
            sys.stderr.write(f"checkpoints: {client_address[0]}: {error.strerror or error}\n")

    def _answer(self, channel: Channel, message: dict[str, Any]) -> None:
        """Raises OSError when the connection is of no use any more."""
        try:
            (attempt, file), size = _names(message), int(message["size"])
            if size < 0:
                raise ValueError(f"a file has no {size} bytes")
            if "keep" in message:
                self._keep(channel, attempt, file, size)
                return
            data = _block(self.tier / attempt / file, int(message["position"]), size)
        except (ValueError, KeyError, TypeError, FileNotFoundError) as problem:
            channel.tell(refused=f"{type(problem).__name__}: {problem}")
            return
        channel.tell(size=len(data))
        channel.allow(len(data))
        channel.send(data)

    def _keep(self, channel: Channel, attempt: str, file: str, size: int) -> None:
        place = self.tier / attempt / file
        if place.exists():  # two nodes that share one directory, or a writer that took over
            raise ValueError("it is here already")
        if size > (free := shutil.disk_usage(self.tier).free):
            raise ValueError(f"{free} bytes are free in {self.tier}, not {size}")
        place.parent.mkdir(exist_ok=True)
        descriptor, part = tempfile.mkstemp(suffix=".part", prefix=f".{file}.", dir=place.parent)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                channel.tell(ready=True)
                channel.allow(size)
                _receive(channel, stream, size)
            Path(part).rename(place)
        except BaseException:
            fast.remove(Path(part))
            raise
        fast.retain(self.tier, file)
        channel.tell(kept=True)


def _receive(channel: Channel, stream: BinaryIO, size: int) -> None:
    memory, checksum = memoryview(bytearray(min(PART, size))), 0
    for start in range(0, size, PART):
        view = memory[: min(PART, size - start)]
        channel.fill(view)
        checksum = crc32c(view, checksum)
        stream.write(view)
    if int.from_bytes(channel.bytes(4), "little") != checksum:
        raise ValueError("what arrived is not what was sent")


def _names(message: dict[str, Any]) -> tuple[str, str]:
    attempt, file = str(message.get("keep") or message["read"]), str(message["file"])
    if not _ATTEMPT.fullmatch(attempt) or not _FILE.fullmatch(file):
        raise ValueError("not a file of an attempt")
    return attempt, file


def _block(path: Path, position: int, size: int) -> bytes:
    if not 0 <= size <= BLOCK or position < 0:
        raise ValueError(f"a block has at most {BLOCK} bytes")
    with path.open("rb") as stream:
        stream.seek(position)
        return stream.read(size)


def serve(parent: int, tier: Path, token: Path, host: str) -> None:
    if not stay_beside(parent):
        return
    with Keeper(tier, token.read_bytes(), host) as keeper:
        tell(port=keeper.server_address[1])
        keeper.serve_forever()


if __name__ == "__main__":
    serve(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4])
