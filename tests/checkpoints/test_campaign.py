"""kill -9 of ranks, leader, writers, all, at random instants of real saves: nothing unloadable or mixed.

EUROTRAIN_KILLS says how many; without it there are few.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.checkpoints.campaign import TARGETS, Campaign
from tests.parallelism.forked import Ranks


@pytest.fixture
def campaign(tmp_path: Path) -> Iterator[Campaign]:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    started = Ranks(tmp_path)
    yield Campaign(tmp_path / "checkpoints", started, random.Random(11))
    started.kill()
    started.wait()


@pytest.mark.ranks
@pytest.mark.timeout(7200)
def test_killed_at_random(campaign: Campaign) -> None:
    rounds = int(os.environ.get("EUROTRAIN_KILLS", 3 * len(TARGETS)))
    for number in range(rounds):
        campaign.round(TARGETS[number % len(TARGETS)])
    print(f"{dict(campaign.kills)}, {campaign.within} within a save")
    assert campaign.kills.total() == rounds
    assert campaign.within >= rounds / 2, "kills that fall between saves prove little"
