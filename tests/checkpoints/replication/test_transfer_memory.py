"""A copy holds a few chunks per stream in memory, whatever the checkpoint's size."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.checkpoints.samples import checkpoint, weights

CHUNK = 8 << 20
STREAMS = 3
PROGRAM = f"""
import sys
from functools import partial
from pathlib import Path
from checkpoints.replication.flat import FlatSource
from checkpoints.replication.receive import FlatTarget
from checkpoints.replication.transfer import Options, replicate

def peak():  # not ru_maxrss, which begins with that of the process that started this one
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

before = peak()
source, target = map(Path, sys.argv[1:])
for _ in range(2):  # the second time, what is there is read
    replicate(partial(FlatSource, source, largest={CHUNK}), partial(FlatTarget, target, largest={CHUNK}),
              Options({STREAMS}, "always", {CHUNK}))
print((peak() - before) * 1024)
"""


def test_memory_does_not_grow_with_the_checkpoint(tmp_path: Path) -> None:
    tensors = {f"t{n}": weights(CHUNK // 4, n) for n in range(16)}
    source = checkpoint(tmp_path / "here", tensors)
    command = [sys.executable, "-P", "-c", PROGRAM, str(source), str(tmp_path / "there")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    print(f"{int(done.stdout) / CHUNK / STREAMS:.1f} chunks per stream")
    assert int(done.stdout) < 5 * CHUNK * STREAMS < 16 * CHUNK
