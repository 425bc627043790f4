"""`eurotrain bench poll SITE`: how long a poll takes, beside squeue by hand over the same ssh."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

from clusters.site import Site
from clusters.ssh import SshConnection
from orchestrator.bench import Pair
from orchestrator.poll import Question

_SECONDS = 60.0  # for one execution of ssh


def poll(site: Site, home: Path, repetitions: int) -> list[Pair]:
    """Seconds of one exchange and of `ssh SITE squeue --me`, in turns, over the operator's own session.

    The first of each is not counted: it may open the session, and bring the agent. Raises ValueError for a
    site on this machine, Unreachable and OSError where the site does not answer.
    """
    connection = site.connect(home)
    if not isinstance(connection, SshConnection):
        raise ValueError(
            f"{site.name} is on this machine: there is no ssh to compare with; name one with a host"
        )
    key = f"bench.{site.name}.0000"  # nobody has heard of it; everything is asked all the same
    question = Question({key: {}}, {key: {}}, 0.0, "slurm").operations()
    pairs = [Pair(_poll(connection, question), _squeue(connection)) for _ in range(repetitions + 1)]
    return pairs[1:]


def _poll(connection: SshConnection, question: list[dict[str, object]]) -> float:
    began = time.monotonic()
    connection.exchange(question, _SECONDS)
    return time.monotonic() - began


def _squeue(connection: SshConnection) -> float:
    """As typed by hand, but with the same options, so that the same session carries it. Raises OSError."""
    words = ["ssh", *connection.session.options(), "-T", connection.alias, "squeue --me"]
    began = time.monotonic()
    done = subprocess.run(words, capture_output=True, check=False, timeout=_SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode:
        told = done.stderr.decode(errors="replace").strip()[:300]
        raise OSError(f"{connection.alias}: squeue --me: {told}")
    return time.monotonic() - began
