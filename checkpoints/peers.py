"""What a rank and its writer ask of other nodes' keepers (checkpoints/keeper.py). No torch."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from crc32c import crc32c

from checkpoints.blocks import Blocks
from checkpoints.channel import PART, Channel, Peer, Refused, connect


class Sender:
    """Sends copies to a neighbour from a thread of its own: neither a commit nor a buffer waits for it.

    While one is under way the newest waits, and those between are not sent.
    """

    def __init__(self) -> None:
        self._next: tuple[Peer, BinaryIO] | None = None
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def offer(self, peer: Peer, path: Path) -> None:
        """Send the file as it is now, though its name may be deleted meanwhile. Raises OSError."""
        stream = path.open("rb")
        with self._changed:
            if self._next is not None:
                _tell_unsent(self._next[1], "the one before it takes too long")
                self._next[1].close()
            self._next = peer, stream
            self._changed.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="copies to a neighbour", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                assert self._next is not None
                (peer, stream), self._next = self._next, None
            with stream:
                try:
                    send(peer, stream)
                except OSError as error:
                    _tell_unsent(stream, f"{peer.host}:{peer.port}: {error.strerror or error}")


def _tell_unsent(stream: BinaryIO, reason: str) -> None:
    sys.stderr.write(f"checkpoints: no copy of {stream.name} on a neighbour: {reason}\n")


def send(peer: Peer, stream: BinaryIO) -> None:
    """Have a keeper keep a file that is named by its writer, in a directory that is named by its attempt.
    Raises OSError, Refused among them."""
    path, size, checksum = Path(stream.name), os.fstat(stream.fileno()).st_size, 0
    with contextlib.closing(connect(peer)) as channel:
        channel.tell(keep=path.parent.name, file=path.name, size=size)
        channel.message()
        channel.allow(size)
        for start in range(0, size, PART):
            part = stream.read(min(PART, size - start))
            checksum = crc32c(part, checksum)
            channel.send(part)
        channel.send(checksum.to_bytes(4, "little"))
        channel.message()


class Caller:
    """Reads from one keeper. After its first failure it is not asked again: each could cost a timeout."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._channel: Channel | None = None
        self._problem: OSError | None = None

    def fill(self, attempt: str, file: str, position: int, view: memoryview) -> int:
        """How many bytes there were. Raises OSError, Refused among them."""
        if self._problem is not None:
            raise self._problem
        try:
            if self._channel is None:
                self._channel = connect(self.peer)
            return self._ask(self._channel, attempt, file, position, view)
        except Refused:
            raise
        except OSError as problem:
            self._problem = problem
            self.close()
            raise

    def _ask(self, channel: Channel, attempt: str, file: str, position: int, view: memoryview) -> int:
        channel.allow(len(view))
        channel.tell(read=attempt, file=file, position=position, size=len(view))
        got = int(channel.message().get("size", -1))
        if not 0 <= got <= len(view):
            raise ConnectionAbortedError(errno.ECONNABORTED, f"{got} bytes instead of {len(view)}")
        channel.fill(view[:got])
        return got

    def close(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


class Served(Blocks):
    """The `files` of one attempt that a neighbour's keeper has."""

    def __init__(self, caller: Caller, attempt: str, files: Collection[str]) -> None:
        super().__init__(Path(f"{caller.peer.host}:{caller.peer.port}") / attempt)
        self._caller, self._attempt, self._files = caller, attempt, files

    def has(self, file: str) -> bool:
        return file in self._files

    def fill(self, file: str, position: int, view: memoryview) -> int:
        return self._caller.fill(self._attempt, file, position, view)
