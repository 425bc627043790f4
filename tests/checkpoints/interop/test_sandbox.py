"""A confined process can do its work, and nothing that foreign code would begin with."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ATTEMPTS = [
    "import os; os.system(f'touch {outside}')",
    "import subprocess; subprocess.run(['touch', outside])",
    "import os; os.posix_spawn('/usr/bin/touch', ['touch', outside], {})",
    "import os; os.fork() or open(outside, 'w')",
    "import os; os.execv('/usr/bin/touch', ['touch', outside])",
    "open(outside, 'w')",
    "open(outside, 'ab')",
    "import os; os.open(outside, os.O_CREAT | os.O_WRONLY)",
    "import os; os.rename(inside, outside)",
    "import os; os.symlink(inside, outside)",
    "import os; os.remove(kept)",
    "import os; os.mkdir(outside)",
    "import os; os.symlink(top, inside + '-link'); open(inside + '-link/outside', 'w')",
    "import socket; socket.create_connection(('127.0.0.1', 9))",
    "import socket; socket.getaddrinfo('localhost', 80)",
    "import os; os.kill(os.getppid(), 0)",
]
PROGRAM = """
import sys
from pathlib import Path
from checkpoints.interop.sandbox import confine
top = sys.argv[1]
outside, kept, inside = f"{top}/outside", f"{top}/kept", f"{top}/target/inside"
confine(Path(top) / "target")
open(inside, "w").write("x")
"""


def confined(top: Path, code: str) -> subprocess.CompletedProcess[str]:
    (top / "target").mkdir()
    (top / "kept").touch()
    command = [sys.executable, "-P", "-c", PROGRAM + code, str(top)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("code", ATTEMPTS)
def test_what_it_must_not_do(tmp_path: Path, code: str) -> None:
    done = confined(tmp_path, code)
    assert done.returncode == 1
    assert "PermissionError: a process that reads foreign files must not" in done.stderr
    assert not (tmp_path / "outside").exists()
    assert (tmp_path / "kept").exists()


def test_what_it_may_do(tmp_path: Path) -> None:
    code = "import os; os.rename(inside, inside + '2'); os.mkdir(inside); open(kept).read(); print('done')"
    assert confined(tmp_path, code).stdout == "done\n"
