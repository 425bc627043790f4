"""Sources and targets in another process, most often at another site, where peer.py answers.

What starts it (`ssh host python -P -m checkpoints.replication.peer`) is the caller's affair: this room
knows no sites.
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from checkpoints.manifest import Damaged
from checkpoints.replication.chunks import LARGEST
from checkpoints.replication.compression import Data, Encoded, Garbled, Wish
from checkpoints.replication.ends import Begun
from checkpoints.replication.throttle import Throttle, unlimited
from checkpoints.replication.wire import Channel, Lost

MODULE = "checkpoints.replication.peer"
_PATIENCE = 300.0  # seconds in which some byte must move: a busy file system may need minutes for an fsync
_START = 90.0  # until the other side greets: Python on a busy login node, its modules on a cold file system
_END = 10.0  # for it to end by itself when its input does
_LINK_FAILED = 255  # how ssh ends when it was not the command that failed

Start = Callable[[], Sequence[str]]  # a command line; may raise ConnectionError


class Peer:
    """A process of checkpoints/replication/peer.py and the link to it."""

    def __init__(self, start: Start, throttle: Throttle = unlimited) -> None:
        words = list(start())
        # a file, not a pipe: a shared ssh session that this one opens would hold a pipe for hours
        self._told = tempfile.TemporaryFile()  # noqa: SIM115 - closed in close
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            words, stdin=pipe, stdout=pipe, stderr=self._told, start_new_session=True, bufsize=0
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = self._process.stdin, self._process.stdout
        self._channel = Channel(self._pipes[1].fileno(), self._pipes[0].fileno(), _START, throttle)
        self._greeted = False
        try:
            self._channel.await_greeting()
        except Lost as error:
            raise self._failure(error) from None
        self._greeted, self._channel.patience = True, _PATIENCE

    def ask(self, operation: str, data: Data = b"", **fields: Any) -> tuple[dict[str, Any], bytearray]:
        """Raises what the operation raised there; Lost where the link is."""
        try:
            self._channel.send({"op": operation, **fields}, data)
            told, answer = self._channel.receive()
        except Lost as error:
            raise self._failure(error) from None
        if "raised" in told:
            raise as_error(told)
        return told, answer

    def close(self) -> None:
        """The other side ends when its input does."""
        if not self._told.closed:
            self._end()
            self._told.close()

    def _end(self) -> int:
        for pipe in self._pipes:
            pipe.close()
        try:
            return self._process.wait(_END)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()

    def _failure(self, error: Lost) -> OSError:
        """Why there is no answer: what the other side said last tells more than a broken pipe."""
        code = self._end()
        self._told.seek(0)
        lines = self._told.read().decode(errors="replace").strip().splitlines()
        self.close()
        told = f"{error}: {lines[-1][:300]}" if lines else str(error)
        hopeless = not self._greeted and 0 < code != _LINK_FAILED  # no such interpreter, no such module
        return OSError(told) if hopeless else Lost(told)


class RemoteSource:
    """A committed checkpoint at the other end. Raises as FlatSource does, and Lost."""

    def __init__(
        self, start: Start, path: str, name: str = "", throttle: Throttle = unlimited, largest: int = LARGEST
    ) -> None:
        self._peer = Peer(start, throttle)
        with closing_on_error(self._peer):
            told, text = self._peer.ask("source", path=path, name=name, largest=largest)
        self.name, self.text = str(told["name"]), text.decode()

    def digest(self, index: int) -> str:
        return str(self._peer.ask("digest", index=index)[0]["name"])

    def read(self, index: int, wish: Wish) -> Encoded:
        told, payload = self._peer.ask("read", index=index, mode=wish.mode, rate=wish.rate)
        return Encoded(told["name"], told["codec"], payload, told["seconds"])

    def close(self) -> None:
        self._peer.close()


class RemoteTarget:
    """A directory at the other end. Raises as FlatTarget does, and Lost."""

    def __init__(
        self, start: Start, directory: str, throttle: Throttle = unlimited, largest: int = LARGEST
    ) -> None:
        self._peer = Peer(start, throttle)
        self._fields = {"directory": directory, "largest": largest}

    def begin(self, name: str, text: str, anew: bool = False) -> Begun:
        told, _ = self._peer.ask("target", text.encode(), name=name, anew=anew, **self._fields)
        return Begun(frozenset(told["promising"]), told["finished"])

    def digest(self, index: int) -> str | None:
        return self._name("digest", index)

    def adopt(self, index: int) -> str | None:
        return self._name("adopt", index)

    def write(self, index: int, sent: Encoded) -> None:
        self._peer.ask("write", sent.payload, index=index, name=sent.name, codec=sent.codec)

    def commit(self) -> str:
        return str(self._peer.ask("commit")[0]["where"])

    def close(self) -> None:
        self._peer.close()

    def _name(self, operation: str, index: int) -> str | None:
        name = self._peer.ask(operation, index=index)[0]["name"]
        return None if name is None else str(name)


@contextlib.contextmanager
def closing_on_error(peer: Peer) -> Iterator[None]:
    try:
        yield
    except BaseException:
        peer.close()
        raise


def from_error(error: Exception) -> dict[str, Any]:
    """An error as it travels."""
    if isinstance(error, Damaged):
        return {"raised": "damaged", "path": str(error.path), "text": error.reason}
    if isinstance(error, OSError):
        return {
            "raised": "system",
            "errno": error.errno,
            "text": error.strerror or str(error),
            "path": error.filename,
        }
    kind = "garbled" if isinstance(error, Garbled) else "input"
    return {"raised": kind, "text": str(error)}


def as_error(told: dict[str, Any]) -> Exception:
    """The error again, as if it had been raised here."""
    kind, text = told["raised"], str(told["text"])
    if kind == "damaged":
        return Damaged(Path(str(told["path"])), text)
    if kind == "system":
        # not by its number alone: a broken pipe over there is no broken link here
        error = OSError(f"{told['path']}: {text}" if told["path"] else text)
        error.errno = told["errno"]
        return error
    return Garbled(text) if kind == "garbled" else ValueError(text)
