"""Curves, read back as TensorBoard reads them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.util.tensor_util import make_ndarray

from clusters import events as site_kinds
from orchestrator import kinds
from orchestrator.tensorboard import MERGED, Curves
from tests.orchestrator.story import BATCH_TOKENS, A, B, Story

TAGS = {"train/loss", "train/learning_rate", "train/grad_norm", "train/tokens_per_second"}


def draw(story: Story, folder: Path) -> None:
    """What a coordinator does that finds these events in the log."""
    curves = Curves(folder)
    for event in story.events:
        curves.add(event)
    curves.close()


def read(folder: Path, who: str) -> dict[str, list[tuple[int, float, float]]]:
    """Step, value and time of every point, by tag. TensorBoard keeps 32 bits of a value."""
    found = EventAccumulator(str(folder / who)).Reload()
    assert set(found.PluginTagToContent("scalars")) == set(found.Tags()["tensors"])
    return {
        tag: [(p.step, float(make_ndarray(p.tensor_proto)), p.wall_time) for p in found.Tensors(tag)]
        for tag in found.Tags()["tensors"]
    }


def curve(folder: Path, who: str, tag: str) -> list[tuple[int, Any]]:
    return [(step, pytest.approx(value, rel=1e-6)) for step, value, _ in read(folder, who)[tag]]


def test_every_island_and_the_whole_have_all_curves(tmp_path: Path) -> None:
    story = Story().start(A, B).train(A, 1, 2).train(B, 1, 2)
    story.add(site_kinds.ROUND_APPLIED, at=A)
    story.add(site_kinds.ROUND_APPLIED, at=B)
    draw(story, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([A, B, MERGED])
    for who in (A, B, MERGED):
        assert read(tmp_path, who).keys() == TAGS | {"outer/update_norm"}


def test_an_island_s_curves(tmp_path: Path) -> None:
    story = Story().start(A).train(A, 1, 3, seconds=0.25, grad_norm=1.5, learning_rate=0.125)
    draw(story, tmp_path)
    assert curve(tmp_path, A, "train/loss") == [(1, 6.9), (2, 6.8), (3, 6.7)]
    assert curve(tmp_path, A, "train/grad_norm") == [(1, 1.5), (2, 1.5), (3, 1.5)]
    assert curve(tmp_path, A, "train/learning_rate") == [(1, 0.125), (2, 0.125), (3, 0.125)]
    assert curve(tmp_path, A, "train/tokens_per_second") == [(n, BATCH_TOKENS / 0.25) for n in (1, 2, 3)]
    assert [time for _, _, time in read(tmp_path, A)["train/loss"]] == [e.time for e in story.events[-3:]]


def test_the_whole_is_the_mean_and_of_tokens_per_second_the_sum(tmp_path: Path) -> None:
    story = Story().start(A, B)
    story.train(A, 1, 1, loss=6.0, grad_norm=1.0, learning_rate=0.5, seconds=0.5)
    story.train(B, 1, 1, loss=4.0, grad_norm=2.0, learning_rate=0.25, seconds=0.25)
    draw(story, tmp_path)
    assert curve(tmp_path, MERGED, "train/loss") == [(1, 5.0)]
    assert curve(tmp_path, MERGED, "train/grad_norm") == [(1, 1.5)]
    assert curve(tmp_path, MERGED, "train/learning_rate") == [(1, 0.375)]
    assert curve(tmp_path, MERGED, "train/tokens_per_second") == [(1, BATCH_TOKENS * 6)]


def test_a_step_of_the_whole_waits_for_every_island(tmp_path: Path) -> None:
    """Also for one that has not started yet: half a rate would look like a slow start."""
    story = Story().start(A).train(A, 1, 3)
    draw(story, tmp_path)
    assert not (tmp_path / MERGED).exists()
    story.start(B).train(B, 1, 2)
    draw(story, tmp_path)
    assert [step for step, _ in curve(tmp_path, MERGED, "train/loss")] == [1, 2]


def test_an_island_given_up_is_not_waited_for(tmp_path: Path) -> None:
    story = Story().start(A, B).train(B, 1, 1).train(A, 1, 3, seconds=0.5)
    story.add(kinds.ISLAND_GIVEN_UP, site=B)
    draw(story, tmp_path)
    assert [step for step, _ in curve(tmp_path, MERGED, "train/loss")] == [1, 2, 3]
    assert curve(tmp_path, MERGED, "train/tokens_per_second")[1:] == [(n, BATCH_TOKENS * 2) for n in (2, 3)]
    story.add(kinds.ALERT)
    story.train(A, 4, 4).add(kinds.RUN_RESUMED)
    story.train(A, 5, 6)
    draw(story, tmp_path)
    assert [step for step, _ in curve(tmp_path, MERGED, "train/loss")] == [1, 2, 3, 4]


def test_steps_that_a_restart_repeats_stand_once_in_the_whole(tmp_path: Path) -> None:
    story = Story().start(A, B).train(A, 1, 5).train(B, 1, 3).train(A, 2, 6, loss=1.0).train(B, 4, 6)
    draw(story, tmp_path)
    whole = curve(tmp_path, MERGED, "train/loss")
    assert [step for step, _ in whole] == [1, 2, 3, 4, 5, 6]
    assert whole[2:4] == [(3, 6.7), (4, (1.0 + 6.6) / 2)]


def test_the_norm_of_an_update_stands_once_in_the_whole(tmp_path: Path) -> None:
    story = Story().start(A, B)
    for number in (1, 2):
        for site in (A, B):
            story.add(
                site_kinds.ROUND_APPLIED, at=site, round=number, step=10 * number, update_norm=number / 4
            )
    draw(story, tmp_path)
    for who in (A, MERGED):
        assert curve(tmp_path, who, "outer/update_norm") == [(10, 0.25), (20, 0.5)]


def test_a_new_coordinator_draws_no_point_twice(tmp_path: Path) -> None:
    story = Story().start(A, B).train(A, 1, 3).train(B, 1, 3)
    (tmp_path / "stale").mkdir()
    draw(story, tmp_path)
    draw(story.train(A, 4, 4), tmp_path)
    assert [step for step, _ in curve(tmp_path, A, "train/loss")] == [1, 2, 3, 4]
    assert len(list((tmp_path / A).iterdir())) == 1
    assert not (tmp_path / "stale").exists()


def test_points_can_be_seen_after_a_flush(tmp_path: Path) -> None:
    curves = Curves(tmp_path / "tensorboard")
    for event in Story().start(A).train(A, 1, 2).events:
        curves.add(event)
    curves.flush()
    assert len(curve(tmp_path / "tensorboard", A, "train/loss")) == 2
    curves.close()


def test_a_loss_that_is_no_number_is_shown_as_such(tmp_path: Path) -> None:
    draw(Story().start(A).train(A, 1, 1, loss=float("nan")), tmp_path)
    ((step, loss, _),) = read(tmp_path, A)["train/loss"]
    assert (step, math.isnan(loss)) == (1, True)
