"""A chain of four segments is the same training as one long job, loss for loss.

Here each of the first three is asked to stop when it has begun to train, which ends it as its time limit
would, but on a slow machine too. With segments of a minute on real Slurm: `python -m tests.testbed.chain`.
"""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from clusters.events import STEP, read_events
from clusters.paths import SitePaths, write_atomically
from orchestrator import lease
from orchestrator.desk import Desk
from orchestrator.segments import segment_for
from orchestrator.state import Event, RunState
from orchestrator.units import micro_units
from tests.leftovers import Leftovers
from tests.losses import assert_same_training, losses
from tests.parallelism.samples import write_text

pytestmark = [pytest.mark.demo, pytest.mark.ray, pytest.mark.ranks, pytest.mark.timeout(600)]

SEGMENTS, STEPS = 4, 120
RUN_TOML = f"""
name = "chain"
[model]
layers = 4
hidden_size = 128
ffn_hidden_size = 256
attention_heads = 4
query_groups = 2
vocabulary_size = 300
[data]
prefixes = ["text"]
[training]
tokens = {STEPS * 8 * 64}
sequence_length = 64
global_batch = 8
micro_batch = 4
learning_rate = 3e-3
warmup_steps = 20
[checkpoint]
every_steps = 100
[[islands]]
site = "here"
allocation = "acc"
time_limit = "20min"
"""


def one_long_job(desk: Desk, spec: Path) -> list[tuple[int, float]]:
    """The whole training in one process, by hand: nobody supervises or stops it."""
    scratch = desk.sites()["here"].scratch
    segment = segment_for(desk.plan(spec), "whole-aaaaaa", "here", 0, str(scratch))
    paths = SitePaths(scratch).segment(segment.key)
    write_atomically(paths.segment, segment.to_json())
    words = [sys.executable, "-P", "-m", "parallelism.rank", str(paths.root)]
    subprocess.run(words, check=True, timeout=500, cwd=paths.root)
    told, _ = read_events(paths.events / "ranks.jsonl")
    return [(event["step"], event["loss"]) for event in told if event["kind"] == STEP]


def chain(desk: Desk, spec: Path, stops: int) -> tuple[RunState, list[tuple[int, float]]]:
    """A run of which the first `stops` segments are asked to end when they have begun to train."""
    run = desk.create(spec, desk.plan(spec))
    scratch = SitePaths(desk.sites()["here"].scratch)
    over = threading.Event()

    def stop_early() -> None:
        for number in range(stops):
            paths = scratch.segment(f"{run}.here.{number:04d}")
            stream = paths.events / "ranks.jsonl"
            while not over.is_set() and (not stream.exists() or '"kind": "step"' not in stream.read_text()):
                time.sleep(0.01)
            paths.stop.touch()

    def listener(_event: Event, _state: RunState) -> None: ...

    thread = threading.Thread(target=stop_early)
    thread.start()
    try:
        state = desk.campaign(run, listener).until_the_end(lease.acquire(desk.store, run, lambda _: None))
    finally:
        over.set()
        thread.join()
    return state, losses(desk.store, run)


def test_four_segments_are_one_long_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leftovers = Leftovers()
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path / "home"))
    for name, value in leftovers.environment.items():
        monkeypatch.setenv(name, value)
    desk = Desk.open()
    desk.home.sites.write_text(f'[here]\ncatalogue = "local"\nscratch = "{tmp_path}/here"\n')
    desk.ledger.grant("acc", micro_units("100"), "core-hour", "g")
    write_text(tmp_path / "here" / "text", documents=600)
    spec = tmp_path / "run.toml"
    spec.write_text(RUN_TOML)
    expected = one_long_job(desk, spec)
    try:
        state, found = chain(desk, spec, stops=SEGMENTS - 1)
    finally:
        leftovers.kill()
    assert state.outcome == "completed", state.reason
    segments = state.islands["here"].segments
    assert [s.outcome for s in segments] == ["drained"] * (SEGMENTS - 1) + ["completed"]
    assert all(s.trained and s.checkpoints for s in segments)
    assert len(expected) == STEPS
    assert_same_training(found, expected)
