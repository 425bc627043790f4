"""Work that needs torch, done by a child process: this room imports none (design: import law).

The child tells what it has done so far as JSON objects, one a line, on its standard output; on its standard
error, last, the one line that says why it failed (checkpoints/lines.py does both).
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO, Any

_BAD_INPUT = 2
_TERMINATION_SECONDS = 10.0  # from SIGTERM until SIGKILL


def stream(module: str, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Run `python -P -m module arguments` and yield its JSON lines as they come.

    When the caller stops iterating, the child is terminated. Raises ValueError with the child's last line of
    standard error when it exits with 2, OSError with that line for any other end but 0.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as errors:  # a pipe that nobody reads would fill up
        command = [sys.executable, "-P", "-m", module, *arguments]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, errors="replace")
        try:
            assert child.stdout is not None
            for line in child.stdout:
                yield _parsed(module, line)
            code = child.wait()
        finally:
            _end(child)
        if code:
            reason = _last_line(errors)
            if code == _BAD_INPUT:
                raise ValueError(reason)
            raise OSError(f"{module} {_how(code)}: {reason}")


def _parsed(module: str, line: str) -> dict[str, Any]:
    try:
        told = json.loads(line)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise OSError(f"{module} printed what is no JSON object: {line.strip()[:200]!r}")
    return told


def _end(child: subprocess.Popen[str]) -> None:
    assert child.stdout is not None
    child.stdout.close()
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(_TERMINATION_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _last_line(errors: IO[str]) -> str:
    errors.seek(0)
    lines = [line.strip() for line in errors if line.strip()]
    return lines[-1] if lines else "it said nothing of why"


def _how(code: int) -> str:
    return f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with exit code {code}"
