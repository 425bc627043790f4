"""A stand-in for the system's sftp: it appends what it is told to, and can go wrong in many ways."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PROGRAM = """#!{python} -IS
import json, os, re, shlex, sys, time
folder = {folder!r}
does = json.load(open(folder + "/sftp.does"))
note = {{"words": sys.argv[1:], "pid": os.getpid(), "puts": []}}
left, code = does.get("stop_after", float("inf")), 0
for line in sys.stdin:
    verb, flag, source, target = shlex.split(line)
    assert verb in ("put", "get") and flag == "-a", line
    have = os.stat(target).st_size if verb == "put" or os.path.exists(target) else 0  # a part must be there
    with open(source, "rb") as given, open(target, "ab") as taken:
        given.seek(have)
        while block := given.read(int(min(4096, left))):
            block = bytearray(block)
            at = does.get("flip_at", -1) - have
            if 0 <= at < len(block):
                block[at] ^= 1
            taken.write(block)
            have, left = have + len(block), left - len(block)
        note["puts"].append([source, target, have])
        taken.flush()
        if left <= 0 and does.get("hang"):
            time.sleep(600)
        elif left <= 0:
            print(does["error"], file=sys.stderr)
            code = 1
            break
with open(folder + "/sftp.calls", "a") as stream:
    stream.write(json.dumps(note) + "\\n")
sys.exit(code)
"""


@dataclass
class FakeSftp:
    """`does(stop_after=bytes, error=text)`, `does(stop_after=bytes, hang=True)`, `does(flip_at=offset)`."""

    folder: Path

    def install(self) -> None:
        """Beside a fake ssh, which has put the folder in the PATH."""
        program = self.folder / "sftp"
        program.write_text(_PROGRAM.format(python=sys.executable, folder=str(self.folder)))
        program.chmod(0o755)
        self.does()

    def does(self, **more: Any) -> None:
        (self.folder / "sftp.does").write_text(json.dumps(more))

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Executions that ended by themselves: words, puts (source, target, size in the end)."""
        try:
            return [json.loads(line) for line in (self.folder / "sftp.calls").read_text().splitlines()]
        except FileNotFoundError:
            return []
