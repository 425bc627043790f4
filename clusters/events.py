"""What a segment tells: append-only streams of JSON lines under `segments/<key>/events/`.

One process writes a stream: the supervisor "supervisor.jsonl", rank 0 "ranks.jsonl". Every event has
`time` (seconds since 1970 by the site's clock) and `kind`; an event is named for ever by site, segment,
stream and byte offset. Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Iterator  # noqa: UP035 - Python 3.9 at the sites

# Written by the supervisor.
SEGMENT_CLAIMED = "segment.claimed"  # incarnation, host, pid
RUNTIME_READY = "runtime.ready"  # seconds: Ray is up and the slots' parents have imported everything
RANKS_STARTED = "ranks.started"  # generation, pids (by rank), hosts (by rank)
RANK_DIED = "rank.died"  # generation, rank, host, pid, exit_code or signal, note
NODE_LOST = "node.lost"  # generation, host (as the scheduler calls it), reason
SEGMENT_DRAINING = "segment.draining"  # reason: stop, time limit, unit cap
SEGMENT_ENDED = "segment.ended"  # outcome (below), reason, units: burnt by the site's own clock, final:
# True when another segment would fail alike

# Written by rank 0.
TRAINING_READY = "training.ready"  # generation, step, checkpoint (or null), parameters, seconds
STEP = "step"  # step (1-based: completed), loss, grad_norm, learning_rate, tokens, seconds
CHECKPOINT_SAVED = "checkpoint.saved"  # step, path, bytes, seconds, stall_seconds (of them, rank 0 waited)
CHECKPOINT_FAILED = "checkpoint.failed"  # step, path, reason: training goes on, the last one stays
CHECKPOINT_DAMAGED = "checkpoint.damaged"  # path, reason: another copy or an older one is used
ROUND_CONTRIBUTED = "round.contributed"  # round, step, tokens, sha256 (of the update's manifest), bytes
ROUND_APPLIED = "round.applied"  # round, step, update_norm, included (this island's part), waited_seconds
ROUND_OPEN = "round.open"  # round, step, waited_seconds: going on without it
TRAINING_ENDED = "training.ended"  # outcome, step

# What the controller should hear of at once; the rest can wait for the next exchange.
URGENT = frozenset({SEGMENT_CLAIMED, RANK_DIED, NODE_LOST, SEGMENT_ENDED, ROUND_CONTRIBUTED, TRAINING_ENDED})

# Outcomes.
COMPLETED = "completed"
DRAINED = "drained"
STARVED = "starved"  # no closed round within the limit
FAILED = "failed"

GARBLED = "garbled"  # text: a line that is no event; never written, only read


@dataclass
class EventWriter:
    """Appends events to one stream. One process at a time writes a stream."""

    path: Path

    def __post_init__(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as stream:
            if stream.tell() and not _ends_a_line(stream):  # the last writer died in the middle of a line
                stream.write(b"\n")

    def emit(self, kind: str, **facts: Any) -> None:
        line = json.dumps({"time": time.time(), "kind": kind, **facts})
        with self.path.open("ab", buffering=0) as stream:
            stream.write(line.encode() + b"\n")


def _ends_a_line(stream: BinaryIO) -> bool:
    stream.seek(-1, 2)
    return stream.read(1) == b"\n"


def read_events(path: Path, offset: int = 0, limit: int = 4 << 20) -> tuple[list[dict[str, Any]], int]:
    """Events after byte `offset`, at most about `limit` bytes of them, and the offset to go on from.

    A line still being written is left for the next call; one that is not JSON becomes an event of
    kind GARBLED, so that nothing vanishes silently.
    """
    try:
        with path.open("rb") as stream:
            stream.seek(offset)
            block = stream.read(limit)
            if b"\n" not in block:  # one line beyond the limit may not stop the stream for ever
                block += stream.readline()
    except FileNotFoundError:
        return [], offset
    whole = block[: block.rfind(b"\n") + 1]
    return list(_parse_lines(whole, offset)), offset + len(whole)


def _parse_lines(block: bytes, offset: int) -> Iterator[dict[str, Any]]:
    for line in block.splitlines(keepends=True):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or not isinstance(event.get("kind"), str):
                raise ValueError("not an event")
        except (ValueError, RecursionError):
            event = {"kind": GARBLED, "text": line[:200].decode(errors="replace"), "time": 0.0}
        event["offset"] = offset  # names the line for ever: streams are append-only
        offset += len(line)
        yield event
