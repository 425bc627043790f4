"""A stand-in for the system's ssh: it runs the remote command here, and remembers how it was called."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import pytest

_PROGRAM = """#!/bin/sh
for word in "$@"; do
  [ "$word" = -G ] && {{ cat {folder}/ssh.G; exit 0; }}
done
for last in "$@"; do :; done
printf '%s\\n' "$*" >> {folder}/ssh.calls
. {folder}/ssh.does
"""


@dataclass
class FakeSsh:
    """`does` sets what a call does, as shell in which `$last` is the remote command."""

    folder: Path
    works: str = 'exec sh -c "$last"'

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        program = self.folder / "ssh"
        program.write_text(_PROGRAM.format(folder=self.folder))
        program.chmod(0o755)
        self.configured(f"controlpath {self.folder}/none")
        self.does(self.works)
        monkeypatch.setenv("PATH", f"{self.folder}:{os.environ['PATH']}")
        monkeypatch.delenv("SSH_AUTH_SOCK", raising=False)

    def configured(self, *lines: str) -> None:
        """What the operator's configuration says, as `ssh -G` prints it."""
        (self.folder / "ssh.G").write_text("\n".join(lines) + "\n")

    def does(self, shell: str) -> None:
        (self.folder / "ssh.does").write_text(shell + "\n")

    @property
    def calls(self) -> list[str]:
        try:
            return (self.folder / "ssh.calls").read_text().splitlines()
        except FileNotFoundError:
            return []
