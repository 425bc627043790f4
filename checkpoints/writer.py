"""The process that writes a rank's checkpoints while the rank trains on. No torch.

`python -P -m checkpoints.writer PARENT FILE...`: the rank's process id, and the descriptors of its buffers.
JSON lines on standard input and output:

    -> {"buffer": 0, "position": p, "length": n, "lost": null}   an Order, as JSON, lies there in a buffer
    <- {"beat": true}                                at most once a second, whenever something has moved
    <- {"done": {...}} or {"failed": "reason"}       one for each order, in their order

With "lost", the order was a former writer's, which ended for the reason that is given: what it had finished
counts, the rest is given up. The process ends with its input, and is killed with its parent.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import fast
from checkpoints import manifest as form
from checkpoints.attempts import (
    Retention,
    commit,
    durable_directory,
    prune,
    receipt_name,
    survey,
    write_durably,
    writer_name,
)
from checkpoints.beside import stay_beside
from checkpoints.channel import Peer
from checkpoints.image import Place, places_from, size_of, write_image
from checkpoints.lines import tell
from checkpoints.manifest import MANIFEST, Damaged
from checkpoints.peers import Sender

BEAT_SECONDS = 1.0
POLL_SECONDS = (0.01, 0.25)  # between two looks for receipts: at first, and at most

Beat = Callable[[], None]


class GivenUp(Exception):
    """This attempt will not become a checkpoint; the reason, in one line."""


@dataclass(frozen=True)
class Commit:
    """What the leader's writer does when its own part is written."""

    writers: int
    facts: Mapping[str, Any]
    patience: float  # seconds without a sign of any other writer
    retention: Retention


@dataclass(frozen=True)
class Order:
    """One image to write."""

    attempt: Path
    save: str  # names this save: receipts of another are not taken for its own
    writer: int
    places: Sequence[Place]
    commit: Commit | None
    fast: Path | None = None  # where a copy goes, too: checkpoints/fast.py
    neighbour: Peer | None = None  # who is sent that copy

    @classmethod
    def from_json(cls, text: bytes) -> Order:
        raw = json.loads(text)
        commit = raw.pop("commit")
        if commit is not None:
            commit = Commit(**{**commit, "retention": Retention(**commit["retention"])})
        places = places_from(raw.pop("places"))
        attempt, tier, peer = Path(raw.pop("attempt")), raw.pop("fast"), raw.pop("neighbour")
        raw |= {"fast": Path(tier) if tier else None, "neighbour": Peer(**peer) if peer else None}
        return cls(attempt, places=places, commit=commit, **raw)


def work(
    order: Order, image: memoryview, lost: str | None, beat: Beat, sender: Sender | None = None
) -> dict[str, Any]:
    """Write, and commit if that is asked for; what there is to tell. Raises GivenUp or OSError."""
    problem = _write(order, image, lost, beat)
    if problem is not None:
        leave_note(order.attempt, order.writer, problem)
    elif lost is None:
        _copy(order, image, beat, sender)  # while others may still be writing
    if order.commit is not None:
        return _conclude(order, order.commit, problem, beat)
    if problem is not None:
        raise GivenUp(problem)
    return {}


def _write(order: Order, image: memoryview, lost: str | None, beat: Beat) -> str | None:
    """Why this writer's part is not there; None when it is."""
    if lost is not None:
        ended_well = (order.attempt / MANIFEST, order.attempt / receipt_name(order.writer))
        return None if any(path.exists() for path in ended_well) else lost
    try:
        durable_directory(order.attempt)
        write_image(order.attempt, order.writer, order.places, image, {"save": order.save}, beat)
    except OSError as error:
        return _reason(error)
    except Exception as error:  # a fault of ours, which the leader's writer has to hear of, too
        traceback.print_exc()
        return repr(error)
    return None


def _copy(order: Order, image: memoryview, beat: Beat, sender: Sender | None) -> None:
    """That there is no room for a copy costs no checkpoint."""
    if order.fast is None:
        return
    try:
        size = size_of(order.places)
        copy = fast.copy(order.fast, order.attempt.name, order.writer, image, size, beat)
        if order.neighbour is not None and sender is not None:
            sender.offer(order.neighbour, copy)
    except OSError as error:
        sys.stderr.write(f"checkpoints: no copy in {order.fast}: {_reason(error)}\n")


def _conclude(order: Order, wanted: Commit, problem: str | None, beat: Beat) -> dict[str, Any]:
    if not (order.attempt / MANIFEST).exists():  # else the writer before this one did not live to tell
        problems = {order.writer: problem} if problem is not None else {}
        problems |= _await_parts(order.attempt, wanted, set(problems), beat)
        if problems:
            shutil.rmtree(order.attempt, ignore_errors=True)  # nobody writes there any more
            raise GivenUp("; ".join(f"writer {n}: {problems[n]}" for n in sorted(problems)))
        _commit(order.attempt, wanted)
    manifest = form.load(order.attempt)
    kept = _prune(order.attempt.parent, wanted.retention)
    return {"bytes": manifest.bytes, "facts": manifest.facts, "kept": kept}


def _commit(attempt: Path, wanted: Commit) -> None:
    try:
        commit(attempt, wanted.writers, "checkpoint", wanted.facts)
    except (OSError, Damaged):
        if not (attempt / MANIFEST).exists():
            shutil.rmtree(attempt, ignore_errors=True)
        raise


def _await_parts(attempt: Path, wanted: Commit, settled: set[int], beat: Beat) -> dict[int, str]:
    """Until all writers but the `settled` have left a receipt or a note; the notes.

    Raises GivenUp when there was no new one for too long.
    """
    waiting, heard, pause = set(range(wanted.writers)) - settled, time.monotonic(), POLL_SECONDS[0]
    notes: dict[int, str] = {}
    while waiting:
        there = {path.name for path in attempt.iterdir()}
        notes |= {n: (attempt / _note(n)).read_text() for n in waiting if _note(n) in there}
        left = {n for n in waiting if n not in notes and receipt_name(n) not in there}
        if left != waiting:
            waiting, heard = left, time.monotonic()
        elif time.monotonic() - heard > wanted.patience:
            missing = ", ".join(map(str, sorted(left)))
            raise GivenUp(f"writer {missing}: not a sign for {wanted.patience:.0f} s")
        else:
            beat()
            time.sleep(pause)
            pause = min(pause * 2, POLL_SECONDS[1])
    return notes


def _prune(directory: Path, retention: Retention) -> list[Any]:
    """Facts of what is kept. That something cannot be deleted does not undo a checkpoint."""
    try:
        prune(directory, retention)
        found = survey(directory)
        return [found.facts[path] for path in found.intact]
    except OSError as error:
        sys.stderr.write(f"checkpoints: cannot prune: {_reason(error)}\n")
        return []


def leave_note(attempt: Path, writer: int, problem: str) -> None:
    """For the leader's writer. Where not even that can be written, it waits in vain, for a while."""
    with contextlib.suppress(OSError):
        durable_directory(attempt)
        write_durably(attempt / _note(writer), problem)


def _note(writer: int) -> str:
    return f"{writer_name(writer)}.failed"


def _reason(error: OSError) -> str:
    return f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)


def serve(buffers: Sequence[memoryview], orders: Iterable[str]) -> None:
    """Work off orders until their stream ends."""
    last, sender = 0.0, Sender()

    def beat() -> None:
        nonlocal last
        if time.monotonic() - last >= BEAT_SECONDS:  # few enough for the pipe, however seldom it is read
            last = time.monotonic()
            tell(beat=True)

    for line in orders:
        message = json.loads(line)
        memory = buffers[message["buffer"]]
        position = message["position"]
        try:
            order = Order.from_json(bytes(memory[position : position + message["length"]]))
            tell(done=work(order, memory, message["lost"], beat, sender))
        except (GivenUp, Damaged) as problem:
            tell(failed=str(problem))
        except OSError as error:
            tell(failed=_reason(error))
        except Exception as error:  # must not cost more than this checkpoint
            traceback.print_exc()
            tell(failed=repr(error))


def main(parent: int, files: Sequence[int]) -> None:
    if not stay_beside(parent):
        return
    buffers = [
        memoryview(mmap.mmap(file, 0, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE))
        for file in files
    ]
    serve(buffers, sys.stdin)


if __name__ == "__main__":
    main(int(sys.argv[1]), [int(word) for word in sys.argv[2:]])
