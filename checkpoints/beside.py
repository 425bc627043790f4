"""How a process lives beside a rank: checkpoints/writer.py and checkpoints/keeper.py. No torch."""

from __future__ import annotations

import ctypes
import os
import signal

NICENESS = 10  # ranks that compute on this core come first; a write needs next to no CPU time
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def stay_beside(parent: int) -> bool:
    """Live until the rank ends us or dies, whatever a terminal or Slurm asks; False where it is gone."""
    for asked in (signal.SIGTERM, signal.SIGINT):  # the rank decides when its helper has done its work
        signal.signal(asked, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return False
    os.nice(NICENESS)
    return True
