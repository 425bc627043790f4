"""The bench of compression: every kind of tensor, both coders, and only lossless ones."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints.bench import compression
from tests.checkpoints.samples import as_bf16, checkpoint, weights


@pytest.fixture
def source(tmp_path: Path) -> Path:
    tensors = {
        "decoder.w": weights(100_000),
        "decoder.b": as_bf16(weights(50_000, 1)),
        "optimizer.exp_avg.w": weights(100_000, 2),
    }
    return checkpoint(tmp_path, tensors)


def test_every_kind_of_tensor_is_measured_on_both(source: Path) -> None:
    pytest.importorskip("zipnn")
    command = [sys.executable, "-P", "-m", "checkpoints.bench.compression", str(source.parent), "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [
        "weights, float32", "weights, rounded to bfloat16", "weights, bfloat16",
        "optimizer state, float32", "optimizer state, rounded to bfloat16",
    ]  # fmt: skip
    assert [line["kind"] for line in lines] == kinds * 2
    assert [line["bytes"] for line in lines[:3]] == [400_000, 200_000, 100_000]
    for line in lines:
        assert line["ours"]["ratio"] == pytest.approx(line["peer"]["ratio"], rel=0.02)


def test_a_coder_that_loses_a_byte_is_no_peer() -> None:
    with pytest.raises(ValueError, match="the bytes that came back are others"):
        compression._measure((lambda data: data, lambda small, size: small[:-1] + b"x"), bytes(100))


def test_bf16_is_rounded_to_nearest_even() -> None:
    torch = pytest.importorskip("torch")
    values = weights(10_000)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert compression._rounded(values.tobytes()) == expected


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "checkpoints.bench.compression", str(tmp_path), "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "neither a committed checkpoint" in done.stderr
    assert done.stderr.count("\n") == 1
