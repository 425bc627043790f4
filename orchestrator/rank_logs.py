"""The last words of a rank, for the reason that its segment ends with."""

from __future__ import annotations

from pathlib import Path

_TAIL = 600  # bytes


def tail(logs: Path, rank: int | None) -> str:
    """The end of a rank's log, as an addition to a reason; empty where there is none."""
    if rank is None:
        return ""
    path = rank_log(logs, rank)
    text = _text(path)[-_TAIL:].strip()
    return f"; {path.name} ends: {text}" if text else ""


def last_line(logs: Path, rank: int) -> str:
    """What a rank said of the input that it could not use."""
    lines = _text(rank_log(logs, rank)).strip().splitlines()
    return lines[-1].removeprefix("eurotrain: ") if lines else "bad input, and no word about it"


def rank_log(logs: Path, rank: int) -> Path:
    return logs / f"rank-{rank:04d}.log"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
