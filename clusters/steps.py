"""Inside an allocation of several nodes: which they are, and the command line of a step on one of them.

Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import os
import subprocess
from typing import Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

_SECONDS = 30.0  # for scontrol, which asks nobody


def node_names(environment: Mapping[str, str] = os.environ) -> list[str]:
    """The job's nodes in Slurm's order, the batch script's own first.

    Slurm writes a list as "cn[1-3,7],gpu04"; only its own scontrol knows all the forms. Raises ValueError
    outside of a job, or when scontrol cannot tell.
    """
    listed = environment.get("SLURM_JOB_NODELIST", "")
    if not listed:
        raise ValueError("SLURM_JOB_NODELIST is not set: this is no job of Slurm")
    command = ["scontrol", "show", "hostnames", listed]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"scontrol show hostnames {listed}: {error}") from error
    names = done.stdout.split()
    if done.returncode or not names:
        raise ValueError(f"scontrol show hostnames {listed}: {' '.join(done.stderr.split()) or 'no answer'}")
    own = environment.get("SLURMD_NODENAME", names[0])
    return [own, *(name for name in names if name != own)]


def step(node: str, command: Sequence[str]) -> list[str]:
    """Run a command on one node of the job, beside what else runs there.

    The step shares the node's whole part of the allocation (`--overlap`, all memory, no binding: the ranks
    share it among themselves). A lost node or a command that fails ends this step alone, not the job
    (`--no-kill`, `--kill-on-bad-exit=0`): the supervisor decides. Standard input goes to the command.
    """
    options = ["--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={node}", "--mem=0", "--cpu-bind=none"]
    return ["srun", *options, "--no-kill", "--kill-on-bad-exit=0", "--export=ALL", *command]
