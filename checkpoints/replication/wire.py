"""Messages between the two processes of a transfer, over a pair of pipes: fields as JSON, and bytes behind.

    4 bytes  length of the fields, big-endian         what a login shell prints before the first message
    4 bytes  length of the bytes                      is skipped: each side begins with a greeting
    fields, bytes

Whoever waits longer than its patience without one byte moving takes the link for lost: a cut network ends no
pipe by itself.
"""

from __future__ import annotations

import json
import os
import select
import struct
from dataclasses import dataclass
from typing import Any

from checkpoints.manifest import LARGEST_MANIFEST
from checkpoints.replication.compression import Data
from checkpoints.replication.throttle import SLICE, Throttle, unlimited

GREETING = b"\neurotrain transfer 1\n"
_HEAD = struct.Struct(">II")
_LARGEST_FIELDS = 64 << 20  # bytes: the numbers of ten million chunks
_LARGEST_BYTES = LARGEST_MANIFEST + (16 << 20)  # a manifest is what has most
_LARGEST_CHATTER = 1 << 16


class Lost(ConnectionError):
    """The other process is gone, or does not answer. Another link may succeed."""


@dataclass
class Channel:
    """One end of a link. `throttle` is asked before bytes of a message go out or are taken in."""

    source: int  # descriptor to read from
    sink: int  # descriptor to write to
    patience: float  # seconds
    throttle: Throttle = unlimited

    def __post_init__(self) -> None:
        os.set_blocking(self.source, False)
        os.set_blocking(self.sink, False)

    def send(self, fields: dict[str, Any], data: Data = b"") -> None:
        """Raises Lost."""
        head = json.dumps(fields).encode()
        self._write(memoryview(_HEAD.pack(len(head), len(data)) + head))
        view = memoryview(data)
        for start in range(0, len(view), SLICE):
            part = view[start : start + SLICE]
            self.throttle(len(part))
            self._write(part)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """Raises Lost, also for what is no message."""
        fields_size, size = _HEAD.unpack(self._read(_HEAD.size))
        if fields_size > _LARGEST_FIELDS or size > _LARGEST_BYTES:
            raise Lost("what came is no message")
        try:
            fields = json.loads(self._read(fields_size))
        except ValueError:
            raise Lost("what came is no message") from None
        if not isinstance(fields, dict):
            raise Lost("what came is no message")
        return fields, self._read(size)

    def greet(self) -> None:
        """Let the other side know where messages begin."""
        self._write(memoryview(GREETING))

    def await_greeting(self) -> None:
        """Skip what a shell prints. Raises Lost."""
        seen = bytearray()
        while not seen.endswith(GREETING):
            if len(seen) > _LARGEST_CHATTER:
                raise Lost(f"the other side greets with {bytes(seen[:80])!r}")
            seen += self._read(1)

    def _read(self, size: int) -> bytearray:
        data, got = bytearray(size), 0
        while got < size:
            part = memoryview(data)[got : got + SLICE]
            self.throttle(len(part) if size > SLICE else 0)
            while part:
                self._wait(self.source, select.POLLIN)
                try:
                    count = os.readv(self.source, [part])
                except BlockingIOError:
                    continue
                except OSError as error:
                    raise Lost(f"the link broke: {error.strerror}") from error
                if not count:
                    raise Lost("the other side has ended")
                part, got = part[count:], got + count
        return data

    def _write(self, part: memoryview) -> None:
        while part:
            self._wait(self.sink, select.POLLOUT)
            try:
                part = part[os.write(self.sink, part) :]
            except BlockingIOError:
                continue
            except OSError as error:
                raise Lost(f"the link broke: {error.strerror}") from error

    def _wait(self, descriptor: int, event: int) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        if not poll.poll(1000 * self.patience):
            raise Lost(f"nothing moved for {self.patience:.0f} s")
