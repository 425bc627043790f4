"""The two ends of a transfer: what a source gives and a target takes, whatever lies behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from checkpoints.replication.compression import Encoded, Wish


@dataclass(frozen=True)
class Begun:
    """What a receiver says before the first chunk."""

    promising: frozenset[int]  # chunks that may be there, in this directory or in another checkpoint's
    finished: str = ""  # where this very checkpoint lies already, committed


class Source(Protocol):
    """A committed checkpoint. Errors: Damaged where it is not what was written, ConnectionError."""

    name: str
    text: str  # its manifest.json

    def digest(self, index: int) -> str:
        """The name of a chunk, which is verified."""

    def read(self, index: int, wish: Wish) -> Encoded:
        """A chunk, verified, compressed where that is wished and pays."""

    def close(self) -> None:
        """It is no longer held."""


class Target(Protocol):
    """Where a checkpoint goes. Errors: ValueError, Garbled, OSError, ConnectionError."""

    def begin(self, name: str, text: str, anew: bool = False) -> Begun:
        """Make room; `anew` where it is there already, and damaged."""

    def digest(self, index: int) -> str | None:
        """The name of what is stored as this chunk, read back; None where it is not there."""

    def adopt(self, index: int) -> str | None:
        """Take the chunk from what the target has elsewhere; its name, None where it has none."""

    def write(self, index: int, sent: Encoded) -> None:
        """Store a chunk durably."""

    def commit(self) -> str:
        """Make the checkpoint count; where it is now."""

    def close(self) -> None:
        """Nothing of it stays open."""


OpenSource = Callable[[str], Source]  # the checkpoint of this name; "" leaves the choice to the source
OpenTarget = Callable[[], Target]
