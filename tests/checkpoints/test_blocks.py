"""Verified blocks without torch: what the controller checks before it carries an update on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from checkpoints.attempts import begin, commit
from checkpoints.blocks import Blocks, verify
from checkpoints.manifest import Damaged, load
from checkpoints.reader import Shard
from checkpoints.store import write_shards


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    attempt = begin(tmp_path, "update")
    sizes = {"small": 10, "large": 5000}
    write_shards(
        attempt, 0, [Shard(n, (s,), (0,), torch.full((s,), s, dtype=torch.int32)) for n, s in sizes.items()]
    )
    commit(attempt, 1, "update", {})
    return attempt


def test_a_block_stays_while_it_is_looked_at_and_the_next_is_larger(saved: Path) -> None:
    small, large = load(saved).pieces
    blocks = Blocks(saved)
    values = torch.frombuffer(blocks.read(small, 0), dtype=torch.int32)
    assert torch.frombuffer(blocks.read(large, 0), dtype=torch.int32).tolist() == [5000] * 5000
    assert values.tolist() == [10] * 10


def test_padding_is_checked(saved: Path) -> None:
    file = saved / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    data[41] = 1  # after the 40 bytes of "small"
    file.write_bytes(data)
    with pytest.raises(Damaged, match="padding after byte 40 is not zero"):
        verify(saved, load(saved))


def test_bytes_that_no_one_wrote_are_noticed(saved: Path) -> None:
    with (saved / "writer-00000.bin").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(Damaged, match="has 24097 bytes, not 24096"):
        verify(saved, load(saved))


VERIFY = """
import sys
from pathlib import Path
from checkpoints.blocks import verify
from checkpoints.manifest import load
path = Path(sys.argv[1])
verify(path, load(path))
sys.exit("torch" in sys.modules)
"""


@pytest.mark.parametrize("damaged", [False, True])
def test_the_controller_verifies_without_torch(saved: Path, damaged: bool) -> None:
    if damaged:
        with (saved / "writer-00000.bin").open("r+b") as stream:
            stream.seek(5000)
            stream.write(b"x")
    command = [sys.executable, "-P", "-c", VERIFY, str(saved)]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    assert answer.returncode == int(damaged)
    assert ("Damaged" in answer.stderr) == damaged
