"""An island whose writers fail: training goes on, it is told, and no segment ends as if all were well."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import psutil
import pytest

from checkpoints.attempts import survey
from checkpoints.manifest import load
from clusters.events import (
    CHECKPOINT_DAMAGED,
    CHECKPOINT_FAILED,
    CHECKPOINT_SAVED,
    STEP,
    TRAINING_ENDED,
    TRAINING_READY,
)
from clusters.paths import SegmentPaths
from clusters.segment import EXIT_COMPLETED, Segment
from parallelism import provenance
from parallelism.layout import Layout
from parallelism.megatron.trainer import StepResult, Trainer
from parallelism.rank import main
from tests.checkpoints.saving import stop, wait_until
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
Deed = Callable[[psutil.Process], object]


def own_writer() -> psutil.Process:
    (writer,) = [p for p in psutil.Process().children() if "checkpoints.writer" in p.cmdline()]
    return writer


def disturbed(segment_dir: Path, deeds: dict[tuple[int, int], Deed]) -> int:
    """`main`, where a rank does something to its writer just before the step after so many completed ones,
    once the first checkpoint is there."""
    original, given = Trainer.step, SegmentPaths(segment_dir).load()

    def step(trainer: Trainer, completed: int) -> StepResult:
        deed = deeds.get((int(os.environ["RANK"]), completed))
        if deed is not None:
            await_saved(given, 1)
            deed(own_writer())
        return original(trainer, completed)

    Trainer.step = step  # type: ignore[method-assign]
    return main(segment_dir)


def halt(writer: psutil.Process) -> None:
    stop(writer.pid)


def kill(writer: psutil.Process) -> None:
    writer.send_signal(signal.SIGKILL)


def fill_the_disk(writer: psutil.Process) -> None:
    """For this writer: it cannot write beyond 8 KiB of any file."""
    writer.rlimit(resource.RLIMIT_FSIZE, (8192, resource.RLIM_INFINITY))


def make_room(writer: psutil.Process) -> None:
    writer.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def run(ranks: Ranks, scratch: Path, deeds: dict[tuple[int, int], Deed]) -> tuple[Segment, SegmentPaths]:
    given = segment(scratch, TP2, every=2)
    paths = written(given)
    ranks.start(2, disturbed, paths.root, deeds)
    return given, paths


@pytest.mark.parametrize("rank", [0, 1])
def test_a_writer_that_dies_costs_one_checkpoint(ranks: Ranks, tmp_path: Path, rank: int) -> None:
    """Stopped before the save of step 4 begins, killed before step 6's: it can have written nothing."""
    given, paths = run(ranks, tmp_path / "x", {(rank, 3): halt, (rank, 5): kill})
    assert ranks.results() == [EXIT_COMPLETED] * 2
    (failed,) = told(paths, CHECKPOINT_FAILED)
    assert (failed["step"], failed["path"].rpartition("/")[2]) == (4, "step-00000004.0001")
    assert failed["reason"] == f"writer {rank}: its writer process was killed by SIGKILL"
    assert [event["step"] for event in told(paths, CHECKPOINT_SAVED)] == [2, 6, 8]
    assert [event["step"] for event in told(paths, STEP)] == list(range(1, 9))
    reference = segment(tmp_path / "undisturbed", TP2, every=8)
    ranks.run(2, main, written(reference).root)
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


def test_a_full_disk_costs_what_is_saved_meanwhile(ranks: Ranks, tmp_path: Path) -> None:
    given, paths = run(ranks, tmp_path, {(1, 3): fill_the_disk, (1, 7): make_room})
    assert ranks.results() == [EXIT_COMPLETED] * 2
    for failed in told(paths, CHECKPOINT_FAILED):
        assert failed["reason"] == "writer 1: File too large"
    steps = {kind: [e["step"] for e in told(paths, kind)] for kind in (CHECKPOINT_FAILED, CHECKPOINT_SAVED)}
    assert 4 in steps[CHECKPOINT_FAILED]  # its write may have come late enough to find room again, or not: 6
    assert sorted(steps[CHECKPOINT_FAILED] + steps[CHECKPOINT_SAVED]) == [2, 4, 6, 8]
    assert steps[CHECKPOINT_SAVED][-1] == 8
    assert survey(saved(given)[-1].parent).uncommitted == []


def test_an_end_that_cannot_be_saved_is_a_failure(ranks: Ranks, tmp_path: Path) -> None:
    given, paths = run(ranks, tmp_path, {(1, 3): fill_the_disk})
    assert ranks.wait() == {0: 1, 1: 1}
    assert "step 8 cannot be saved: writer 1: File too large" in ranks.log().splitlines()[-1]
    assert [event["step"] for event in told(paths, CHECKPOINT_FAILED)] == [4, 6, 8, 8]
    assert told(paths, TRAINING_ENDED) == []
    assert [path.name for path in saved(given)] == ["step-00000002.0001"]


def test_what_a_checkpoint_says_of_its_origin(ranks: Ranks, tmp_path: Path) -> None:
    given = segment(tmp_path, Layout(), every=4, keep=9)
    paths = written(given)
    ranks.run(1, main, paths.root)
    first, last = saved(given)
    assert (load(first).facts["parent"], load(last).facts["parent"]) == (None, None)
    before = load(last).facts
    shutil.rmtree(last)
    longer = replace(given, training=replace(TRAINING, steps=10))
    ranks.run(1, main, written(longer).root)
    newest = load(saved(given)[-1])
    origin = {"name": "step-00000004.0001", "site": "a", "sha256": load(first).sha256}
    assert newest.facts["parent"] == origin
    assert newest.facts["data"]["sequence"] == 10 * TRAINING.global_batch
    assert newest.facts["data"]["prefixes"] == ["text"]
    assert newest.facts["code"] == provenance.code()
    assert newest.facts["config"] == provenance.config(longer) != before["config"]
    assert newest.facts["model"]["layers"] == MODEL.layers
    assert before["time"] <= newest.facts["time"]


def test_code_is_told_by_its_sources() -> None:
    told = provenance.code()
    assert set(told) == {"version", "sha256"}
    provenance.code.cache_clear()
    assert provenance.code() == told


def test_config_tells_what_is_trained_and_not_where(tmp_path: Path) -> None:
    given = segment(tmp_path, TP2)
    config = provenance.config(given)
    assert provenance.config(replace(given, key="x", sequence=5, layout={"pp": 2}, unit_cap=9.0)) == config
    for other in (replace(given, training=replace(TRAINING, seed=8)), replace(given, island=1)):
        assert provenance.config(other) != config


def test_an_island_is_set_back_by_way_of_its_nodes_copies(ranks: Ranks, tmp_path: Path) -> None:
    """The site's file of rank 0 is damaged and so is the node's of rank 1: together they are whole."""
    (tmp_path / "node").mkdir()
    given = segment(tmp_path / "x", TP2, every=4)
    given = replace(given, checkpointing=replace(given.checkpointing, fast=str(tmp_path / "node")))
    paths = written(given)
    ranks.start(2, interrupted, paths.root, 6, partial(die_once_copied, given, tmp_path / "node"))
    assert set(ranks.wait().values()) == {-signal.SIGKILL}
    (attempt,) = saved(given)
    (copies,) = (tmp_path / "node").glob("eurotrain-*/run/a/*")
    flip(attempt / "writer-00000.bin")
    flip(copies / "writer-00001.bin")
    assert ranks.run(2, main, paths.root) == [EXIT_COMPLETED] * 2
    assert [event["step"] for event in told(paths, TRAINING_READY)] == [0, 4]
    (damage,) = told(paths, CHECKPOINT_DAMAGED)
    assert damage["reason"].startswith(f"{copies}: writer-00001.bin: bytes 0 to ")
    assert damage["reason"].endswith("the file on the site's file system is used")
    assert list((tmp_path / "node").iterdir()) == []
    reference = segment(tmp_path / "undisturbed", TP2, every=8)
    ranks.run(2, main, written(reference).root)
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


def die_once_copied(given: Segment, node: Path) -> None:
    await_saved(given, 1)
    wait_until(lambda: len([*node.glob("*/*/*/*/*.bin")]) == 2, "no copies")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_replaced_node_is_served_by_its_neighbour(ranks: Ranks, tmp_path: Path) -> None:
    """The site's file of its rank is damaged: without the copy there would be no checkpoint."""
    nodes = [tmp_path / "node-0", tmp_path / "node-1"]
    for node in nodes:
        node.mkdir()
    given = segment(tmp_path / "x", TP2, every=4)
    copies = replace(given.checkpointing, fast=f"{tmp_path}/node-$RANK", peers=True)
    given = replace(given, checkpointing=copies)
    paths = written(given)
    killed = partial(interrupted, paths.root, 6, partial(die_once_kept, given, nodes))
    ranks.start(2, on_its_own_node, killed)
    assert set(ranks.wait().values()) == {-signal.SIGKILL}
    (attempt,) = saved(given)
    shutil.rmtree(nodes[1])
    nodes[1].mkdir()
    flip(attempt / "writer-00001.bin")
    assert ranks.run(2, on_its_own_node, partial(main, paths.root)) == [EXIT_COMPLETED] * 2
    assert [event["step"] for event in told(paths, TRAINING_READY)] == [0, 4]
    assert told(paths, CHECKPOINT_DAMAGED) == []
    assert [[*node.iterdir()] for node in nodes] == [[], []], "the nodes are not as they were found"
    reference = segment(tmp_path / "undisturbed", TP2, every=8)
    ranks.run(2, main, written(reference).root)
    assert contents(saved(given)[-1]) == contents(saved(reference)[-1])


def on_its_own_node(work: Callable[[], int]) -> int:
    os.environ["LOCAL_RANK"] = "0"
    return work()


def die_once_kept(given: Segment, nodes: list[Path]) -> None:
    await_saved(given, 1)
    for node in nodes:
        wait_until(lambda node=node: len([*node.glob("*/*/*/*/writer-*.bin")]) == 2, "no copies")
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_node_without_the_place_for_copies_does_without(ranks: Ranks, tmp_path: Path) -> None:
    given = segment(tmp_path, Layout())
    given = replace(given, checkpointing=replace(given.checkpointing, fast=str(tmp_path / "nowhere")))
    assert ranks.run(1, main, written(given).root) == [EXIT_COMPLETED]
    assert f"checkpoint.fast = {tmp_path}/nowhere is not used: " in ranks.log()
    assert len(saved(given)) == 2
