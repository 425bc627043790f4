"""Copies one checkpoint from a source to a target, over several streams at once; it counts at the end or not.

    outcome = replicate(partial(FlatSource, here), partial(FlatTarget, there), Options(streams=4))

Every stream has a source and a target of its own, opened anew when its link is lost. The target is told what
to expect, keeps what it has of it, gets the rest chunk by chunk, reads every chunk back, and only then gives
the checkpoint its name: a copy that ends before that is gone on with by the same call (law 6).
Memory: about three chunks (of at most 64 MiB) per stream at the end that compresses, one elsewhere.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from checkpoints.manifest import Manifest
from checkpoints.replication.chunks import LARGEST, Chunk, cut
from checkpoints.replication.compression import Garbled, Mode, Wish
from checkpoints.replication.ends import Begun, OpenSource, OpenTarget, Source, Target

TRIES = 4  # of one chunk over links that are lost or garble it, before the copy gives up
_PAUSE = 0.5  # seconds before a lost link is opened again; doubles with every try


@dataclass(frozen=True)
class Options:
    """How a checkpoint is copied. Both ends must cut it alike: `largest` bytes per chunk."""

    streams: int = 2
    compress: Mode = "auto"
    largest: int = LARGEST
    rate: float | None = None  # bytes per second that all streams carry at most, where that is known


@dataclass
class Outcome:
    """What a copy did. Bytes are those of the checkpoint, except `carried`: those that crossed."""

    name: str
    bytes: int
    chunks: int
    where: str = ""
    already: bool = False  # it was there, committed, and its every chunk was right
    sent: int = 0
    reused: int = 0  # found at the target
    carried: int = 0
    repaired: int = 0  # chunks sent again, because they were read back otherwise
    relinked: int = 0
    seconds: float = 0.0


Tell = Callable[[Outcome], None]


def replicate(
    open_source: OpenSource, open_target: OpenTarget, options: Options, tell: Tell = lambda _: None
) -> Outcome:
    """Copy a checkpoint; `tell` hears after every chunk how far it is.

    Raises Damaged where the source is not what was written, OSError where a link or a disk fails for good,
    ValueError for what cannot be copied. Whatever it raises, the same call goes on with what has come.
    """
    copy = _Copy(open_source, open_target, options, tell)
    try:
        return copy.run()
    finally:
        copy.close()


class _Lane:
    """One stream: a source and a target, opened when they are needed and again when they are lost."""

    def __init__(self, copy: _Copy) -> None:
        self._copy = copy
        self._ends: tuple[Source, Target] | None = None

    def open(self) -> tuple[Source, Target]:
        if self._ends is None:
            source = self._copy.open_source(self._copy.name)
            self._ends = source, self._copy.open_target()
        return self._ends

    def close(self) -> None:
        ends, self._ends = self._ends, None
        for end in ends or ():
            end.close()

    def attempt(self, work: Callable[[Source, Target], None]) -> None:
        """Do some work; again where the link was lost under it or its bytes were garbled.

        A link that never was is not tried again: a site that refuses its operator should hear it once.
        """
        for tries in range(1, TRIES + 1):
            try:
                work(*self._ready())
            except (ConnectionError, Garbled) as error:
                self.close()
                if not self._copy.text:
                    raise
                if tries == TRIES:
                    raise OSError(f"given up after {TRIES} tries: {error}") from error
                self._copy.lost()
                time.sleep(_PAUSE * 2 ** (tries - 1))
            else:
                break

    def _ready(self) -> tuple[Source, Target]:
        fresh = self._ends is None
        source, target = self.open()
        if fresh and self._copy.text:
            if source.text != self._copy.text:
                raise ValueError(
                    f"{source.name} is not the checkpoint any more that it was when the copy began"
                )
            target.begin(source.name, source.text, self._copy.anew)
        return source, target


class _Copy:
    """The state of one copy: what is named, what is verified, what crossed."""

    def __init__(
        self, open_source: OpenSource, open_target: OpenTarget, options: Options, tell: Tell
    ) -> None:
        self.open_source, self.open_target = open_source, open_target
        self.name, self.text, self.anew = "", "", False
        self._options, self._tell = options, tell
        self._lanes = [_Lane(self) for _ in range(options.streams)]
        self._lock = threading.Lock()
        self._chunks: tuple[Chunk, ...] = ()
        self._begun = Begun(frozenset())
        self._outcome = Outcome("", 0, 0)
        self._names: dict[int, str] = {}  # of chunks that should be at the target
        self._unread: set[int] = set()  # of those, what was not read back since it was written
        # payload bytes per second and stream; unknown at first, and then the first chunks go as they are
        self._rate = options.rate / options.streams if options.rate else None

    def run(self) -> Outcome:
        began = time.monotonic()
        self._lanes[0].attempt(self._begin)
        self._carry(range(len(self._chunks)), self._find if self._begun.finished else self._move)
        if self._begun.finished and len(self._names) < len(self._chunks):
            self.anew = True
            self.close()  # every lane looks at the damaged one
            self._lanes[0].attempt(self._begin)
            self._carry(range(len(self._chunks)), self._move)
        for _ in range(TRIES):
            if not (wrong := self._read_back()):
                break
            self._outcome.repaired += len(wrong)
            self._carry(wrong, self._send)
        else:
            raise OSError(
                f"the target gives back other bytes than it got, {TRIES} times over; nothing counts there"
            )
        self._lanes[0].attempt(self._commit)
        self._outcome.seconds = time.monotonic() - began
        return self._outcome

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()

    def lost(self) -> None:
        with self._lock:
            self._outcome.relinked += 1

    # ---- the parts of it

    def _begin(self, source: Source, target: Target) -> None:
        self._begun = target.begin(source.name, source.text, self.anew)
        manifest = Manifest.from_json(source.text)
        self._chunks = cut(manifest, self._options.largest)
        self._names.clear()
        self.name, self.text = source.name, source.text
        self._outcome = Outcome(
            source.name, manifest.bytes, len(self._chunks), relinked=self._outcome.relinked
        )

    def _commit(self, _: Source, target: Target) -> None:
        self._outcome.where = target.commit()
        self._outcome.already = bool(self._begun.finished) and not self.anew

    def _carry(self, indexes: Iterable[int], work: Callable[[int, Source, Target], None]) -> None:
        """Do the work for every chunk, in all lanes at once. Raises what the first one raised."""
        todo: queue.SimpleQueue[int] = queue.SimpleQueue()
        for index in indexes:
            todo.put(index)
        failed = threading.Event()

        def follow(lane: _Lane) -> None:
            try:
                while not failed.is_set():
                    index = todo.get_nowait()
                    lane.attempt(lambda source, target: work(index, source, target))  # noqa: B023 - called at once
            except queue.Empty:
                return
            except BaseException:
                failed.set()
                raise

        lanes = self._lanes[: max(1, min(len(self._lanes), todo.qsize()))]
        with ThreadPoolExecutor(len(lanes)) as pool:
            running = [pool.submit(follow, lane) for lane in lanes]
            try:
                for done in running:
                    done.result()
            finally:
                failed.set()  # Ctrl-C comes here: what is on its way still arrives, nothing else is begun

    def _move(self, index: int, source: Source, target: Target) -> None:
        if index in self._begun.promising and self._keep(index, source, target):
            return
        self._send(index, source, target)

    def _find(self, index: int, source: Source, target: Target) -> None:
        """Name a chunk of a checkpoint that is there already, if it is right."""
        name = source.digest(index)
        if target.digest(index) == name:
            self._note(index, name, reused=self._chunks[index].size)

    def _keep(self, index: int, source: Source, target: Target) -> bool:
        there, is_read = target.digest(index), True
        if there is None:
            there, is_read = target.adopt(index), False
        if there is None or there != source.digest(index):
            return False
        self._note(index, there, reused=self._chunks[index].size, is_read=is_read)
        return True

    def _send(self, index: int, source: Source, target: Target) -> None:
        began = time.monotonic()
        sent = source.read(index, Wish(self._options.compress, self._rate))
        target.write(index, sent)
        self._measure(len(sent.payload), time.monotonic() - began - sent.seconds)
        self._note(index, sent.name, sent=self._chunks[index].size, carried=len(sent.payload), is_read=False)

    def _read_back(self) -> list[int]:
        """Chunks that the target does not give back as they were sent."""
        wrong: list[int] = []

        def look(index: int, _: Source, target: Target) -> None:
            if target.digest(index) == self._names[index]:
                with self._lock:
                    self._unread.discard(index)
            else:
                wrong.append(index)

        self._carry(sorted(self._unread), look)
        return sorted(wrong)

    def _measure(self, size: int, seconds: float) -> None:
        """A moving average over about four chunks; the first one is over a link that has yet to speed up."""
        found = size / max(seconds, 1e-6)
        with self._lock:
            self._rate = found if self._rate is None else 0.75 * self._rate + 0.25 * found

    def _note(
        self, index: int, name: str, *, sent: int = 0, carried: int = 0, reused: int = 0, is_read: bool = True
    ) -> None:
        with self._lock:
            self._names[index] = name
            if not is_read:
                self._unread.add(index)
            self._outcome.sent += sent
            self._outcome.carried += carried
            self._outcome.reused += reused
            self._tell(self._outcome)
