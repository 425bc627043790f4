"""Stand-ins for Slurm's programs: they print what a file says, and remember how they were called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

_PROGRAM = """#!/bin/sh
printf '%s\\n' "$0 $*" >> {folder}/calls
[ -n "{keeps}" ] && cp "$1" {folder}/script
. {folder}/{name}.does
"""


@dataclass
class FakeSlurm:
    """`says("squeue", ...)` sets what a program prints; `does` sets what it does, as shell."""

    folder: Path

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("squeue", "sacct", "sbatch", "srun", "scancel", "scontrol", "sacctmgr"):
            keeps = "yes" if name == "sbatch" else ""
            program = self.folder / name
            program.write_text(_PROGRAM.format(folder=self.folder, name=name, keeps=keeps))
            program.chmod(0o755)
            self.says(name, "")
        self.says("sbatch", "Submitted batch job 42\n")
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")

    def says(self, name: str, text: str) -> None:
        (self.folder / f"{name}.says").write_text(text)
        self.does(name, f"cat {self.folder}/{name}.says")

    def does(self, name: str, shell: str) -> None:
        (self.folder / f"{name}.does").write_text(shell + "\n")

    def calls(self, name: str) -> list[str]:
        try:
            lines = (self.folder / "calls").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [line for line in lines if line.split()[0].endswith(f"/{name}")]

    @property
    def script(self) -> list[str]:
        """The last batch script."""
        return (self.folder / "script").read_text().splitlines()
