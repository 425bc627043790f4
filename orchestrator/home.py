"""Where the operator's files lie: `$EUROTRAIN_HOME`, by default `~/.eurotrain`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    root: Path

    @property
    def spec(self) -> Path:
        return self.root / "run.toml"

    @property
    def plan(self) -> Path:
        return self.root / "plan.json"

    @property
    def summary(self) -> Path:
        return self.root / "summary.json"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    def logs(self, site: str, segment: str) -> Path:
        return self.root / "logs" / site / segment

    def update(self, number: int, site: str) -> Path:
        """Where an island's update waits on its way to the other sites."""
        return self.root / "rounds" / f"round-{number:06d}" / site


@dataclass(frozen=True)
class Home:
    """The operator's directory: database, sites, runs."""

    root: Path

    @classmethod
    def from_environment(cls) -> Home:
        return cls(Path(os.environ.get("EUROTRAIN_HOME") or "~/.eurotrain").expanduser().absolute())

    @property
    def database(self) -> str:
        """URL of the event log: `$EUROTRAIN_DATABASE`, or SQLite in this directory."""
        return os.environ.get("EUROTRAIN_DATABASE") or f"sqlite:///{self.root / 'eurotrain.db'}"

    @property
    def sites(self) -> Path:
        return self.root / "sites.toml"

    @property
    def staged(self) -> Path:
        """What was brought to each site."""
        return self.root / "staged"

    @property
    def wheelhouse(self) -> Path:
        """Wheels that were collected for sites."""
        return self.root / "wheelhouse"

    def run(self, name: str) -> RunFolder:
        return RunFolder(self.root / "runs" / name)
