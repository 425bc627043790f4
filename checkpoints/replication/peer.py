"""The far end of a transfer: `python -P -m checkpoints.replication.peer`, answers until its input ends.

It holds no secret, opens no port, and outlives neither its link nor a quarter of an hour without a message:
login nodes are shared, and so it is nice. What the operator may read and write there, it may.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from checkpoints.replication.compression import Data, Encoded, Garbled, Wish
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.remote import from_error
from checkpoints.replication.wire import Channel, Lost

IDLE = 900.0  # seconds without a message: the sender is gone, only nobody has told us
_NICE = 10

Answer = tuple[dict[str, Any], Data]


class Server:
    """Carries out the operations of one link: those of a source, or those of a target."""

    def __init__(self) -> None:
        self._source: FlatSource | None = None
        self._target: FlatTarget | None = None
        self._operations: dict[str, Callable[[dict[str, Any], Data], Answer]] = {
            "source": self._open_source,
            "target": self._begin,
            "digest": self._digest,
            "read": self._read,
            "adopt": self._adopt,
            "write": self._write,
            "commit": self._commit,
        }

    def answer(self, asked: dict[str, Any], data: Data) -> Answer:
        """What was asked for, or the error that it raised."""
        try:
            return self._operations[asked["op"]](asked, data)
        except (ValueError, OSError, Garbled) as error:
            return from_error(error), b""

    def close(self) -> None:
        for end in (self._source, self._target):
            if end is not None:
                end.close()

    def _open_source(self, asked: dict[str, Any], _: Data) -> Answer:
        self._source = FlatSource(Path(asked["path"]).expanduser(), asked["name"], asked["largest"])
        return {"name": self._source.name}, self._source.text.encode()

    def _begin(self, asked: dict[str, Any], text: Data) -> Answer:
        if self._target is None:
            self._target = FlatTarget(Path(asked["directory"]).expanduser(), largest=asked["largest"])
        begun = self._target.begin(asked["name"], bytes(text).decode(), asked["anew"])
        return {"promising": sorted(begun.promising), "finished": begun.finished}, b""

    def _digest(self, asked: dict[str, Any], _: Data) -> Answer:
        end = self._source or self._target
        assert end is not None
        return {"name": end.digest(asked["index"])}, b""

    def _read(self, asked: dict[str, Any], _: Data) -> Answer:
        assert self._source is not None
        sent = self._source.read(asked["index"], Wish(asked["mode"], asked["rate"]))
        return {"name": sent.name, "codec": sent.codec, "seconds": sent.seconds}, sent.payload

    def _adopt(self, asked: dict[str, Any], _: Data) -> Answer:
        assert self._target is not None
        return {"name": self._target.adopt(asked["index"])}, b""

    def _write(self, asked: dict[str, Any], data: Data) -> Answer:
        assert self._target is not None
        self._target.write(asked["index"], Encoded(asked["name"], asked["codec"], data))
        return {}, b""

    def _commit(self, _: dict[str, Any], __: Data) -> Answer:
        assert self._target is not None
        return {"where": self._target.commit()}, b""


def main() -> None:
    """Answer what comes in by standard input on standard output."""
    os.nice(_NICE)
    channel = Channel(os.dup(0), os.dup(1), patience=IDLE)
    os.dup2(2, 1)  # whatever prints is no part of a message
    server = Server()
    try:
        channel.greet()
        while True:
            channel.send(*server.answer(*channel.receive()))
    except Lost as error:
        sys.stderr.write(f"eurotrain transfer: {error}\n")
    finally:
        server.close()


if __name__ == "__main__":
    main()
