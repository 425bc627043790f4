"""Sites: what is publicly known of a machine (catalogue/*.toml) and the operator's own part (sites.toml)."""

from __future__ import annotations

import difflib
import tomllib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from clusters.connection import Connection, LocalConnection

_OPERATOR_KEYS = ("catalogue", "scratch", "account", "python")


@dataclass(frozen=True)
class Site:
    """One site as the planner and the controller need it. A rank is one training process: a GPU or a core."""

    name: str
    description: str
    scheduler: str
    scratch: Path
    account: str
    python: str | None
    unit: str  # the native unit of its allocations
    units_per_rank_hour: float
    rank_memory_bytes: int
    rank_flops: float  # peak, per second
    efficiency: float  # assumed share of the peak
    max_ranks: int
    max_time_limit_seconds: float
    watch_seconds: float = 5.0  # how long one exchange may wait at the site for news; 0 on a login node
    lag_seconds: float = 5.0  # an answer "absent" younger than this after a submission is no answer (law 2)

    def units_per_hour(self, ranks: int) -> float:
        """What an allocation with so many ranks burns per hour, in the native unit."""
        return ranks * self.units_per_rank_hour

    def connect(self) -> Connection:
        return LocalConnection(self.scratch, **({"python": self.python} if self.python else {}))


def catalogue_names() -> list[str]:
    return sorted(p.name.removesuffix(".toml") for p in _catalogue().iterdir() if p.name.endswith(".toml"))


def load_sites(path: Path) -> dict[str, Site]:
    """The operator's sites by name. Raises ValueError: what is wrong, where, what is allowed."""
    try:
        tables = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; it names your sites, their accounts and paths") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    return {name: _site(path, name, table) for name, table in tables.items()}


def _site(path: Path, name: str, own: Any) -> Site:
    if not isinstance(own, dict):
        raise ValueError(f"{path}: {name} must be a table such as [{name}]")
    for key in own:
        _known(f"{path}: [{name}]", key, _OPERATOR_KEYS)
    if "scratch" not in own:
        raise ValueError(f"{path}: [{name}] lacks scratch, the directory there that eurotrain may fill")
    machine = own.get("catalogue", name)
    _known(f"{path}: [{name}] catalogue", machine, catalogue_names())
    facts = tomllib.loads((_catalogue() / f"{machine}.toml").read_text())
    return Site(
        name=name,
        description=facts["description"],
        scheduler=facts["scheduler"],
        scratch=Path(own["scratch"]).expanduser(),
        account=own.get("account", ""),
        python=own.get("python"),
        unit=facts["unit"]["name"],
        units_per_rank_hour=facts["unit"]["per_rank_hour"],
        rank_memory_bytes=int(facts["rank"]["memory_gib"] * 2**30),
        rank_flops=facts["rank"]["peak_gflops"] * 1e9,
        efficiency=facts["rank"]["efficiency"],
        max_ranks=facts["limits"]["ranks"],
        max_time_limit_seconds=facts["limits"]["hours"] * 3600,
    )


def _known(where: str, word: str, allowed: tuple[str, ...] | list[str]) -> None:
    if word in allowed:
        return
    near = difflib.get_close_matches(word, allowed, 1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ValueError(f"{where}: unknown {word!r}; {hint}known: {', '.join(allowed)}")


def _catalogue() -> Any:
    return resources.files("clusters") / "catalogue"
