"""What tests of the training process share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.parallelism.forked import Ranks


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    started = Ranks(tmp_path)
    yield started
    started.kill()
    started.wait()
