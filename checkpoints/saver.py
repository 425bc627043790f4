"""Saving without waiting: a rank copies its state into memory of its own, a process beside it writes that.

    saver = Saver(writer=rank)
    saver.save(attempt, shards, commit)     returns when everything has been copied
    for outcome in saver.watch(): ...       looks, and waits for nothing
    for outcome in saver.finish(): ...      waits for what is under way

There are two buffers: while both are being written, a third save waits. A writer that dies, or gives no
sign for `patience` seconds, costs the save that it was at: the outcome says so, and the next one gets a new
writer. Nothing here talks to other ranks; writers learn of each other by the files in the attempt.

A thread listens to the writer. If the rank itself did, between its steps, a dead writer could stop all: its
rank waits in a collective for the leader, the leader for a buffer, the leader's writer for the dead one.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.buffers import Buffer, Pin, places_of
from checkpoints.channel import Peer
from checkpoints.image import Place, room_for
from checkpoints.reader import Shard
from checkpoints.writer import Commit, leave_note

PATIENCE = 300.0  # seconds: a busy parallel file system may take a minute for one request
_BUFFERS = 2
_FACTS_ROOM = 1 << 20  # bytes of a buffer for what an order says beside its places
_LISTENING_SECONDS = 0.5  # between two looks whether a silent writer has lost its time
_DYING_SECONDS = 1.0  # a writer killed within a request of a hung file system dies when that is answered


@dataclass(frozen=True)
class Outcome:
    """How a save ended: for the leader whether there is a checkpoint, for others whether their part is."""

    attempt: Path
    problem: str | None  # why not; None for success
    stall_seconds: float  # that the rank spent in `save`
    seconds: float  # from the beginning of `save` until this was heard
    bytes: int = 0  # of the whole checkpoint; here and below the leader's
    facts: Mapping[str, Any] = field(default_factory=dict)
    kept: Sequence[Mapping[str, Any]] = ()  # facts of all checkpoints that are there now, newest first


@dataclass
class _Flight:
    attempt: Path
    began: float
    buffer: int
    order: tuple[int, int]  # where in the buffer it lies: position and length
    stall: float = 0.0
    lost: str | None = None  # how the writer that was at it ended


class Saver:
    """One rank's buffers, and its writer process."""

    def __init__(
        self,
        writer: int,
        save: str = "",
        patience: float = PATIENCE,
        pin: Pin | None = None,
        synchronize: Callable[[], None] = lambda: None,
        fast: Path | None = None,
        neighbour: Peer | None = None,
    ) -> None:
        """`save` tells this incarnation's saves from those of others. `pin` prepares memory (uint8 [N]) for
        copies from the device whose tensors are saved, `synchronize` waits for those. `fast` is where on
        this node copies of the files go (checkpoints/fast.py), `neighbour` who is sent them, too."""
        self.writer, self.identity, self.patience = writer, save, patience
        self._copies = {"fast": fast and str(fast), "neighbour": neighbour and asdict(neighbour)}
        self._pin, self._synchronize = pin, synchronize
        self._buffers: list[Buffer] = []
        self._places: list[Place] = []
        self._places_json = "[]"
        self._flying: deque[_Flight] = deque()
        self._outcomes: list[Outcome] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []
        self._unread, self._heard = b"", 0.0
        self._changed = threading.Condition()  # guards all that is above
        self._closed = False
        self._listener: threading.Thread | None = None

    @property
    def pid(self) -> int | None:
        """Of the writer process."""
        return self._process.pid if self._process else None

    @property
    def busy(self) -> bool:
        return bool(self._flying)

    def prepare(self, shards: Iterable[Shard]) -> None:
        """Make buffers for such shards and start the writer, so that the first save need not. Raises
        OSError when there is no memory for them."""
        with self._changed:
            self._lay_out([*shards])
            if self._process is None:
                with contextlib.suppress(OSError):  # `save` tells
                    self._start()

    def save(self, attempt: Path, shards: Iterable[Shard], commit: Commit | None = None) -> float:
        """Take the shards as they are now, and have them written; the seconds that it took.

        One writer, the leader's, is given a `commit`. What comes of it is an outcome of `watch` or `finish`.
        """
        began, held = time.monotonic(), [*shards]
        with self._changed:
            self._lay_out(held)
            self._changed.wait_for(lambda: len(self._flying) < _BUFFERS)
            number = min({*range(_BUFFERS)} - {flight.buffer for flight in self._flying})
        flight = _Flight(attempt, began, number, self._fill(self._buffers[number], attempt, held, commit))
        flight.stall = time.monotonic() - began
        with self._changed:
            self._launch(flight)
            self._changed.notify_all()
        return flight.stall

    def watch(self) -> list[Outcome]:
        """What has ended since the last call. Waits for nothing; to be called now and then."""
        with self._changed:
            outcomes, self._outcomes = self._outcomes, []
        return outcomes

    def finish(self) -> list[Outcome]:
        """As `watch`, when nothing is under way any more."""
        with self._changed:
            self._changed.wait_for(lambda: not self._flying)
        return self.watch()

    def close(self) -> None:
        """End the writer, whatever it is at. Nothing can be saved afterwards."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            if self._process is not None:
                self._process.kill()  # so that the listener hears its end
        if self._listener is not None:
            self._listener.join()
        self._dismiss()

    # ---- what is to be written

    def _lay_out(self, shards: Sequence[Shard]) -> None:
        places = places_of(shards)
        if places == self._places and self._buffers:
            return
        self._places, self._places_json = places, json.dumps([vars(place) for place in places])
        room = room_for(places) + len(self._places_json) + _FACTS_ROOM
        if not self._buffers or room > self._buffers[0].room:
            self._changed.wait_for(lambda: not self._flying)
            self._dismiss()  # a writer has the files of the buffers from its start
            self._buffers = [Buffer(room, self._pin) for _ in range(_BUFFERS)]

    def _dismiss(self) -> None:
        if self._process is not None:
            self._kill(self._process)
            self._process = None
        for buffer in self._buffers:
            buffer.close()
        self._buffers = []

    def _fill(
        self, buffer: Buffer, attempt: Path, shards: Sequence[Shard], commit: Commit | None
    ) -> tuple[int, int]:
        buffer.fill(self._places, (shard.tensor for shard in shards))
        rest: dict[str, Any] = {"attempt": str(attempt), "save": self.identity, "writer": self.writer}
        rest |= {"commit": asdict(commit) if commit else None, **self._copies}
        order = f'{{"places":{self._places_json},{json.dumps(rest)[1:]}'.encode()
        position = room_for(self._places)
        if position + len(order) > buffer.room:
            raise ValueError(f"the facts of a checkpoint take {len(order)} bytes; at most {_FACTS_ROOM}")
        buffer.note(position, order)
        self._synchronize()
        return position, len(order)

    def _launch(self, flight: _Flight) -> None:
        try:
            if self._process is None or (not self._flying and self._process.poll() is not None):
                self._start()
        except OSError as error:
            self._give_up(flight, f"no writer process can be started: {error.strerror}")
            return
        if not self._flying:
            self._heard = time.monotonic()
        self._flying.append(flight)
        self._send(flight, self._process)

    def _start(self) -> None:
        files = [buffer.file for buffer in self._buffers]
        command = [sys.executable, "-P", "-m", "checkpoints.writer", str(os.getpid()), *map(str, files)]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, pass_fds=files, bufsize=0)
        self._unread, self._heard = b"", time.monotonic()
        if self._listener is None:
            self._listener = threading.Thread(target=self._listen, name="checkpoint writer", daemon=True)
            self._listener.start()

    def _send(self, flight: _Flight, process: subprocess.Popen[bytes] | None) -> None:
        position, length = flight.order
        message = {"buffer": flight.buffer, "position": position, "length": length, "lost": flight.lost}
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # its end is heard
            process.stdin.write(json.dumps(message).encode() + b"\n")

    def _listen(self) -> None:
        """Until the end, take in what the writer tells. Alone in taking flights away."""
        with self._changed:
            while not self._closed:
                process = self._process
                if not self._flying or process is None or process.stdout is None:
                    self._changed.wait()
                    continue
                pipe = process.stdout.fileno()
                self._changed.release()
                try:
                    readable, _, _ = select.select([pipe], [], [], _LISTENING_SECONDS)
                finally:
                    self._changed.acquire()
                if not self._closed:
                    self._hear(process, os.read(pipe, 1 << 16) if readable else None)
                    self._changed.notify_all()

    def _hear(self, process: subprocess.Popen[bytes], block: bytes | None) -> None:
        """What was told; nothing at its end, None for silence."""
        if block:
            self._heard = time.monotonic()
            *lines, self._unread = (self._unread + block).split(b"\n")
            for line in lines:
                self._take(json.loads(line))
        elif block is not None:
            self._replace(f"its writer process {_end(process)}")
        elif time.monotonic() - self._heard > self.patience:
            self._replace(f"its writer process gave no sign for {self.patience:.0f} s and was killed")

    def _take(self, message: Mapping[str, Any]) -> None:
        if "done" in message:
            self._end(self._flying.popleft(), None, **message["done"])
        elif "failed" in message:
            self._end(self._flying.popleft(), message["failed"])

    def _replace(self, reason: str) -> None:
        """A new writer takes over. It is told what its predecessor was at, for which that may have left
        everything but the word that it is there; when that kills it too, it is given up."""
        assert self._process is not None
        self._kill(self._process)
        self._process = None
        if self._flying[0].lost is not None:
            self._give_up(self._flying.popleft(), reason)
        else:
            self._flying[0].lost = reason
        waiting, self._flying = self._flying, deque()
        for flight in waiting:
            self._launch(flight)

    def _give_up(self, flight: _Flight, problem: str) -> None:
        """Without any writer: the leader's must hear of it from us."""
        leave_note(flight.attempt, self.writer, problem)
        self._end(flight, problem)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        process.kill()
        for pipe in filter(None, (process.stdin, process.stdout)):
            pipe.close()
        self._killed = [p for p in (*self._killed, process) if not _has_ended(p)]

    def _end(self, flight: _Flight, problem: str | None, **told: Any) -> None:
        seconds = time.monotonic() - flight.began
        self._outcomes.append(Outcome(flight.attempt, problem, flight.stall, seconds, **told))


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_DYING_SECONDS)
    return process.returncode is not None


def _end(process: subprocess.Popen[bytes]) -> str:
    """How a process that has closed its output ended."""
    if not _has_ended(process):
        return "closed its output"
    code = process.returncode
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
