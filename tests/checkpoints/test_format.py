"""FORMAT.md tells enough to read a checkpoint: its own reader, which imports nothing of ours, reads one."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import checkpoints
from checkpoints.attempts import begin, commit
from checkpoints.manifest import BLOCK
from checkpoints.reader import Shard
from checkpoints.store import write_shards

PAGE = Path(checkpoints.__path__[0]) / "FORMAT.md"
TENSORS = {
    "w": torch.randn(7, 9),
    "half": torch.randn(12).bfloat16(),
    "flag": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.zeros(0, 3),
    "long": torch.arange(BLOCK + 5, dtype=torch.int64).to(torch.uint8),  # two blocks
}


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    path = tmp_path_factory.mktemp("independent") / "reader.py"
    path.write_text(code)
    return path


@pytest.fixture(scope="module")
def reader(program: Path) -> ModuleType:
    module = ModuleType("independent_reader")
    exec(program.read_text(), module.__dict__)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`w` in two boxes of two writers, the rest in one."""
    attempt = begin(tmp_path_factory.mktemp("saved"), "step-00000003")
    whole = [Shard(name, tuple(t.shape), (0,) * t.dim(), t) for name, t in TENSORS.items() if name != "w"]
    write_shards(attempt, 0, [Shard("w", (7, 9), (0, 0), TENSORS["w"][:, :4]), *whole])
    write_shards(attempt, 1, [Shard("w", (7, 9), (0, 4), TENSORS["w"][:, 4:])])
    commit(attempt, 2, "checkpoint", {"step": 3, "loss": 1e-7, "text": 'ü", "crc32c":1,'})
    return attempt


def test_it_reads_what_was_written(reader: ModuleType, saved: Path) -> None:
    found = reader.tensors_of(saved)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        expected = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
        assert np.array_equal(found[name], expected.numpy()), name
        assert found[name].shape == tuple(tensor.shape)


def test_it_needs_nothing_of_ours(program: Path, saved: Path) -> None:
    command = [sys.executable, "-I", "-X", "importtime", str(program), str(saved)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "w float32 (7, 9)\n" in done.stdout
    assert not re.search(r"\| +(checkpoints|torch)\b", done.stderr)


@pytest.mark.parametrize(
    ("file", "position", "complaint"),
    [
        ("manifest.json", 5, "manifest.json is damaged"),
        ("manifest.json", 400, "manifest.json is damaged"),
        ("writer-00000.bin", 3, "w is damaged"),
        ("writer-00001.bin", 100, "w is damaged"),
    ],
)
def test_it_notices_damage(reader: ModuleType, saved: Path, file: str, position: int, complaint: str) -> None:
    path = saved / file
    data = path.read_bytes()
    try:
        path.write_bytes(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :])
        with pytest.raises(ValueError, match=complaint):
            reader.tensors_of(saved)
    finally:
        path.write_bytes(data)


def test_its_figures_are_those_of_the_code() -> None:
    text = PAGE.read_text()
    assert f"{BLOCK >> 20} MiB" in text
    assert len(text.splitlines()) < 130, "more than a page"
