"""What the coordinator may do next. decide.py chooses, actions.py acts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Intend:
    """Reserve for a new segment, log its key, submit it: to start when `after` has ended, however it did."""

    site: str
    sequence: int
    after: str = ""
    time_limit: float = 0.0  # seconds; 0: as planned
    begin: float = 0.0  # seconds since 1970: not before
    reason: str = ""  # why it is not as planned


@dataclass(frozen=True)
class Learn:
    """Ask a site what it allows, before something is submitted to it."""

    site: str


@dataclass(frozen=True)
class Hold:
    """Say what an island's next segment waits for."""

    site: str
    reason: str


@dataclass(frozen=True)
class Submit:
    """Submit a logged key that the site has never heard of."""

    site: str
    key: str


@dataclass(frozen=True)
class Settle:
    """Book what an ended segment used and free the rest of its reservation."""

    site: str
    key: str


@dataclass(frozen=True)
class Release:
    """Free the reservation of a segment that was never submitted and no longer will be."""

    site: str
    key: str


@dataclass(frozen=True)
class Drain:
    """Ask a live segment to checkpoint and exit."""

    site: str
    key: str


@dataclass(frozen=True)
class Cancel:
    """Take a segment that is no longer wanted out of the queue."""

    site: str
    key: str


@dataclass(frozen=True)
class Exclude:
    """Keep a waiting segment away from these nodes and no others."""

    site: str
    key: str
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class GiveUp:
    """Stop an island's chain."""

    site: str
    reason: str


@dataclass(frozen=True)
class Collect:
    """Fetch an island's update of the open round and verify it."""

    number: int
    site: str


@dataclass(frozen=True)
class Close:
    """Close the open round with these sites' updates, without those."""

    number: int
    sites: tuple[str, ...]
    missing: tuple[str, ...]


@dataclass(frozen=True)
class Deliver:
    """Bring a closed round and the others' updates to a site."""

    number: int
    site: str


@dataclass(frozen=True)
class End:
    """Nothing is left to do."""

    outcome: str
    reason: str


Action = (
    Intend
    | Learn
    | Hold
    | Submit
    | Settle
    | Release
    | Drain
    | Cancel
    | Exclude
    | GiveUp
    | Collect
    | Close
    | Deliver
    | End
)
