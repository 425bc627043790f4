"""How a child process talks to the command that started it (orchestrator/child.py): JSON lines out, one line
of standard error for why it failed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

_DONE, _FAILED, _BAD_INPUT = 0, 1, 2


def tell(**facts: Any) -> None:
    """One JSON object to the parent, at once."""
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


def exit_code(work: Callable[[], object]) -> int:
    """Do the work; what the process should exit with. Bad input (ValueError, Damaged among them) is 2, a
    machine that fails (OSError: no space, no permission) is 1, each told in one line."""
    try:
        work()
    except ValueError as error:
        return _failed(error, _BAD_INPUT)
    except OSError as error:
        return _failed(error, _FAILED)
    return _DONE


def _failed(error: Exception, code: int) -> int:
    sys.stderr.write(" ".join(str(error).split()) + "\n")
    return code
