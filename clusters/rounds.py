"""A closed round: which islands' updates make up one step of the outer optimisation.

Standard library only, and Python 3.9: this file travels to sites with an old interpreter.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Contribution:
    """One island's part in a closed round."""

    site: str
    tokens: int  # trained since the island's last contribution: its weight in the average
    sha256: str  # of the update's manifest.json, which holds the checksums of the rest


@dataclass(frozen=True)
class ClosedRound:
    """What every island applies, in site-name order. Written once by the coordinator, never changed.

    `base` is the identity of the round before (law 7: a hash chain of manifests, not of tensor
    bytes, because different GPUs round differently); the first round's base is `genesis(run)`.
    `discarded` sites have diverged: they go back to the base. The site `reset_from` sends its whole
    state along with its next update, and all islands take it when that is in the next round.
    """

    run: str
    number: int
    base: str
    contributions: tuple[Contribution, ...]
    discarded: tuple[str, ...] = ()
    reset_from: str = ""

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.contributions, key=lambda c: c.site))
        object.__setattr__(self, "contributions", ordered)
        object.__setattr__(self, "discarded", tuple(sorted(self.discarded)))

    def to_json(self) -> str:
        """What is rare is left out where it is not so: the identity of all other rounds stays as it was."""
        told = asdict(self)
        rare = [name for name in ("discarded", "reset_from") if not told[name]]
        return json.dumps({k: v for k, v in told.items() if k not in rare}, indent=1, sort_keys=True)

    @property
    def identity(self) -> str:
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @classmethod
    def from_json(cls, text: str) -> ClosedRound:
        """Raises ValueError when the text is not a closed round."""
        try:
            raw = json.loads(text)
            parts = tuple(Contribution(**c) for c in raw["contributions"])
            rare = (tuple(raw.get("discarded", ())), raw.get("reset_from", ""))
            return cls(raw["run"], raw["number"], raw["base"], parts, *rare)
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"not a closed round: {error}") from error


def genesis(run: str) -> str:
    """What the first round of a run is based on."""
    return hashlib.sha256(f"eurotrain round 0 of {run}".encode()).hexdigest()
