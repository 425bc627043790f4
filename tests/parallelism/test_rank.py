"""One island's training process: to the end, drained, killed, set back, in another layout."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from clusters.events import (
    CHECKPOINT_DAMAGED,
    CHECKPOINT_SAVED,
    COMPLETED,
    DRAINED,
    FAILED,
    STEP,
    TRAINING_ENDED,
    TRAINING_READY,
)
from clusters.paths import SegmentPaths
from clusters.segment import EXIT_BAD_INPUT, EXIT_COMPLETED, EXIT_DRAINED, Segment
from parallelism.layout import Layout
from parallelism.megatron.trainer import Trainer
from parallelism.rank import main
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import (
    MODEL,
    TRAINING,
    await_saved,
    contents,
    flip,
    interrupted,
    saved,
    segment,
    told,
    written,
)

pytestmark = pytest.mark.ranks

TP2 = Layout(tp=2)


def losses(paths: SegmentPaths) -> dict[int, float]:
    """By step, the last telling of each; every telling must be the same."""
    found: dict[int, float] = {}
    for event in told(paths, STEP):
        assert found.setdefault(event["step"], event["loss"]) == pytest.approx(event["loss"], abs=1e-6)
    return found


def kill_rank(rank: int, given: Segment, checkpoints: int) -> None:
    """Once so many checkpoints are there."""
    if int(os.environ["RANK"]) == rank:
        await_saved(given, checkpoints)
        os.kill(os.getpid(), signal.SIGKILL)


def undisturbed(ranks: Ranks, scratch: Path, layout: Layout = TP2) -> tuple[Segment, SegmentPaths]:
    given = segment(scratch / "undisturbed", layout)
    paths = written(given)
    assert ranks.run(layout.ranks, main, paths.root) == [EXIT_COMPLETED] * layout.ranks
    return given, paths


def killed(ranks: Ranks, scratch: Path, layout: Layout = TP2, at: int = 6) -> tuple[Segment, SegmentPaths]:
    """An island that lost its last rank after so many steps; checkpoints at every 4th."""
    given = segment(scratch / "killed", layout)
    paths = written(given)
    ranks.start(
        layout.ranks, interrupted, paths.root, at, partial(kill_rank, layout.ranks - 1, given, at // 4)
    )
    assert ranks.wait()[layout.ranks - 1] == -signal.SIGKILL
    assert max(losses(paths)) == at
    return given, paths


def test_to_the_end(ranks: Ranks, tmp_path: Path) -> None:
    given, paths = undisturbed(ranks, tmp_path)
    (ready,) = told(paths, TRAINING_READY)
    assert (ready["generation"], ready["step"], ready["checkpoint"]) == (1, 0, None)
    assert ready["parameters"] == MODEL.parameters
    steps = told(paths, STEP)
    assert [event["step"] for event in steps] == list(range(1, TRAINING.steps + 1))
    assert all(event["tokens"] == TRAINING.tokens_per_step and event["seconds"] > 0 for event in steps)
    assert all(event["grad_norm"] > 0 and event["learning_rate"] > 0 for event in steps)
    assert [event["step"] for event in told(paths, CHECKPOINT_SAVED)] == [4, 8]
    assert [Path(event["path"]) for event in told(paths, CHECKPOINT_SAVED)] == saved(given)
    (ended,) = told(paths, TRAINING_ENDED)
    assert (ended["outcome"], ended["step"]) == (COMPLETED, 8)


def test_a_finished_training_ends_at_once(ranks: Ranks, tmp_path: Path) -> None:
    given, paths = undisturbed(ranks, tmp_path)
    before = saved(given)
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    assert saved(given) == before
    assert len(told(paths, STEP)) == TRAINING.steps


@pytest.mark.parametrize("layout", [TP2, Layout(pp=2), Layout(dp=2)], ids=str)
def test_killed_and_resumed_is_bitwise_as_undisturbed(ranks: Ranks, tmp_path: Path, layout: Layout) -> None:
    reference, undisturbed_paths = undisturbed(ranks, tmp_path, layout)
    given, paths = killed(ranks, tmp_path, layout)
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    assert [event["step"] for event in told(paths, TRAINING_READY)] == [0, 4]
    assert losses(paths) == losses(undisturbed_paths)
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


@pytest.mark.parametrize("other", [Layout(pp=2), Layout(), Layout(tp=2, dp=2)], ids=str)
def test_resumed_in_another_layout(ranks: Ranks, tmp_path: Path, other: Layout) -> None:
    _, undisturbed_paths = undisturbed(ranks, tmp_path)
    given, _ = killed(ranks, tmp_path)
    moved = written(segment(Path(given.scratch), other))
    assert ranks.run(other.ranks, main, moved.root) == [EXIT_COMPLETED] * other.ranks
    expected = losses(undisturbed_paths)
    assert losses(moved) == pytest.approx(expected, abs=2e-6)


def test_killed_before_the_first_checkpoint_begins_anew(ranks: Ranks, tmp_path: Path) -> None:
    reference, _ = undisturbed(ranks, tmp_path)
    given, paths = killed(ranks, tmp_path, at=2)
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


def test_a_damaged_checkpoint_is_told_of_and_an_older_one_used(ranks: Ranks, tmp_path: Path) -> None:
    reference, _ = undisturbed(ranks, tmp_path)
    given, paths = drained(ranks, tmp_path, at=6)
    flip(saved(given)[-1] / "writer-00001.bin")
    paths.drain.unlink()
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    (damage,) = told(paths, CHECKPOINT_DAMAGED)
    assert damage["path"].endswith("step-00000006.0001")
    assert "crc32c" in damage["reason"]
    assert [event["step"] for event in told(paths, TRAINING_READY)] == [0, 4]
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


def test_a_checkpoint_that_lacks_a_file_is_told_of(ranks: Ranks, tmp_path: Path) -> None:
    given, paths = drained(ranks, tmp_path, at=6)
    (saved(given)[-1] / "writer-00000.bin").unlink()
    paths.drain.unlink()
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    (damage,) = told(paths, CHECKPOINT_DAMAGED)
    assert "writer-00000.bin is missing" in damage["reason"]


def test_nothing_begins_anew_when_all_checkpoints_are_damaged(ranks: Ranks, tmp_path: Path) -> None:
    given, paths = drained(ranks, tmp_path, at=6)
    for checkpoint in saved(given):
        flip(checkpoint / "writer-00000.bin")
    assert ranks.run(2, main, paths.root) == [EXIT_BAD_INPUT] * 2
    assert "no checkpoint can be read; remove all to start from the beginning" in ranks.log()
    assert len(told(paths, TRAINING_READY)) == 1


def drained(ranks: Ranks, scratch: Path, at: int) -> tuple[Segment, SegmentPaths]:
    """Asked to drain during the step after `at - 1` completed ones."""
    given = segment(scratch / "drained", TP2)
    paths = written(given)
    assert ranks.run(2, interrupted, paths.root, at - 1, paths.drain.touch) == [EXIT_DRAINED] * 2
    return given, paths


def test_drained_with_a_checkpoint(ranks: Ranks, tmp_path: Path) -> None:
    reference, _ = undisturbed(ranks, tmp_path)
    given, paths = drained(ranks, tmp_path, at=3)
    assert [event["step"] for event in told(paths, CHECKPOINT_SAVED)] == [3]
    (ended,) = told(paths, TRAINING_ENDED)
    assert (ended["outcome"], ended["step"]) == (DRAINED, 3)
    paths.drain.unlink()
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


def test_drained_in_its_last_step_is_completed(ranks: Ranks, tmp_path: Path) -> None:
    paths = written(segment(tmp_path, TP2))
    assert ranks.run(2, interrupted, paths.root, 7, paths.drain.touch) == [EXIT_COMPLETED] * 2


def test_as_many_checkpoints_are_kept_as_were_asked_for(ranks: Ranks, tmp_path: Path) -> None:
    given = segment(tmp_path, Layout(), every=1, keep=3)
    assert ranks.run(1, main, written(given).root) == [EXIT_COMPLETED]
    assert [path.name for path in saved(given)] == [f"step-0000000{n}.0001" for n in (6, 7, 8)]


def poison() -> None:
    """Break a weight just before a step."""
    original = Trainer.step

    def step(trainer: Trainer, completed: int) -> object:
        trainer.parameter_shards()[0].tensor.fill_(float("nan"))
        return original(trainer, completed)

    Trainer.step = step  # type: ignore[method-assign,assignment]


def poisoned(segment_dir: Path) -> int:
    return interrupted(segment_dir, 4, poison)


def test_a_training_that_diverges_saves_nothing(ranks: Ranks, tmp_path: Path) -> None:
    given = segment(tmp_path, TP2, every=1)
    paths = written(given)
    assert ranks.run(2, poisoned, paths.root) == [EXIT_BAD_INPUT] * 2
    (ended,) = told(paths, TRAINING_ENDED)
    assert (ended["outcome"], ended["step"]) == (FAILED, 5)
    assert ended["reason"].startswith("diverged in step 6: loss nan")
    assert [path.name for path in saved(given)][-1] == "step-00000005.0001"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": replace(TRAINING, seed=8)}, "its seed is 7, this segment's is 8"),
        ({"model": replace(MODEL, layers=2)}, "its model is"),
        ({"layout": {"tp": 2, "pp": 2}}, "WORLD_SIZE = 1: the segment's layout takes 4 ranks"),
        ({"layout": {"tpp": 2}}, "layout.tpp: no such axis"),
    ],
)
def test_another_training_is_not_taken_up(
    ranks: Ranks, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    given = segment(tmp_path, Layout())
    paths = written(given)
    assert ranks.run(1, main, paths.root) == [EXIT_COMPLETED]
    written(replace(given, **changes))  # type: ignore[arg-type]
    assert ranks.run(1, main, paths.root) == [EXIT_BAD_INPUT]
    last = ranks.log().splitlines()[-1]
    assert last.startswith("eurotrain: ")
    assert message in last


def test_by_hand_and_alone(tmp_path: Path) -> None:
    """A fresh interpreter, without a launcher. megatron-core's noise is held back, and there is no other."""
    paths = written(segment(tmp_path, Layout()))
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-P", "-m", "parallelism.rank", str(paths.root)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_COMPLETED, "", "")
    assert len(told(paths, STEP)) == TRAINING.steps
