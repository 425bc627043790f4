"""Two islands of different layouts, and a coordinator that closes their rounds."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from checkpoints.manifest import MANIFEST, load
from checkpoints.reader import Reader, Shard
from clusters.events import (
    CHECKPOINT_SAVED,
    COMPLETED,
    FAILED,
    ROUND_APPLIED,
    ROUND_CONTRIBUTED,
    ROUND_OPEN,
    STARVED,
    STEP,
    TRAINING_ENDED,
    TRAINING_READY,
)
from clusters.paths import SegmentPaths, SitePaths, write_atomically
from clusters.rounds import ClosedRound, Contribution, genesis
from clusters.segment import EXIT_BAD_INPUT, EXIT_COMPLETED, EXIT_DRAINED, EXIT_STARVED, Rounds, Segment
from parallelism.layout import Layout
from parallelism.rank import main
from tests.parallelism.forked import Ranks
from tests.parallelism.samples import (
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

ROUNDS = Rounds(
    inner_steps=3, deadline_seconds=240.0, max_open_rounds=2
)  # boundaries at 3, 6, and the end: 8
IMPATIENT = replace(ROUNDS, deadline_seconds=0.2)
LAYOUTS = {"a": Layout(tp=2), "b": Layout(pp=2)}


@dataclass
class Coordinator:
    """Closes a round as soon as all `sites` have contributed, and brings it to each of them."""

    scratch: dict[str, SitePaths]
    run: str = "run"
    closed: list[ClosedRound] = field(default_factory=list)
    wanted: Callable[[int], list[str]] | None = None  # whose updates a round waits for and includes
    deliver: Callable[[int], bool] = lambda number: True
    delivered: set[int] = field(default_factory=set)
    discarded: dict[int, tuple[str, ...]] = field(default_factory=dict)  # by round
    reset_from: dict[int, str] = field(default_factory=dict)

    def tick(self) -> None:
        number = len(self.closed) + 1
        sites = self.wanted(number) if self.wanted else sorted(self.scratch)
        outboxes = {site: self.scratch[site].outbox(self.run, number, site) for site in sites}
        if sites and all((outbox / MANIFEST).exists() for outbox in outboxes.values()):
            updates = {site: load(outbox) for site, outbox in outboxes.items()}
            parts = tuple(
                Contribution(site, u.facts["tokens"], u.sha256) for site, u in sorted(updates.items())
            )
            base = self.closed[-1].identity if self.closed else genesis(self.run)
            rare = (self.discarded.get(number, ()), self.reset_from.get(number, ""))
            self.closed.append(ClosedRound(self.run, number, base, parts, *rare))
        for closed in self.closed:
            if closed.number not in self.delivered and self.deliver(closed.number):
                self.delivered.add(closed.number)
                self.bring(closed)

    def bring(self, closed: ClosedRound) -> None:
        for site, paths in self.scratch.items():
            for part in closed.contributions:
                if part.site != site:
                    origin = self.scratch[part.site].outbox(self.run, closed.number, part.site)
                    shutil.copytree(
                        origin, paths.inbox(self.run, closed.number, part.site), dirs_exist_ok=True
                    )
            write_atomically(paths.closed_round(self.run, closed.number), closed.to_json())


@dataclass
class Pair:
    """Islands a (TP2) and b (PP2), each with a scratch of its own, and their coordinator."""

    root: Path
    ranks: dict[str, Ranks] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ranks = {site: Ranks(self.root / f"ranks-{site}") for site in "ab"}
        self.coordinator = Coordinator({site: SitePaths(self.root / site) for site in "ab"})

    def island(self, site: str, **changes: object) -> tuple[Segment, SegmentPaths]:
        arguments = {"rounds": ROUNDS, "keep": 9, **changes}
        given = segment(self.root / site, LAYOUTS[site], site=site, island=("ab".index(site), 2), **arguments)  # type: ignore[arg-type]
        return given, written(given)

    def start(
        self, site: str, function: Callable[..., int] = main, *arguments: object, **changes: object
    ) -> None:
        _, paths = self.island(site, **changes)
        self.ranks[site].start(2, function, paths.root, *arguments)

    def finish(self, *sites: str) -> list[int]:
        """Exit codes of the ranks of these islands, while the coordinator does its work."""
        codes: list[int] = []
        for site in sites:
            codes += self.ranks[site].results(self.coordinator.tick)
        return codes

    def end(self) -> None:
        for ranks in self.ranks.values():
            ranks.kill()
            ranks.wait()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    torch.set_num_threads(1)  # a pool of threads would not survive the fork
    islands = Pair(tmp_path)
    yield islands
    islands.end()


def tensors(checkpoint: Path, prefix: str = "") -> dict[str, torch.Tensor]:
    """The global tensors whose names begin so, from a checkpoint of whatever layout."""
    reader = Reader(checkpoint)
    shapes = {p.name: p.global_shape for p in reader.manifest.pieces if p.name.startswith(prefix)}
    whole = {name: torch.empty(shape) for name, shape in shapes.items()}
    for name, tensor in whole.items():
        reader.read(Shard(name, shapes[name], (0,) * tensor.dim(), tensor))
    return whole


def assert_one_model(*checkpoints: Path) -> None:
    """Base, momentum and weights of the islands are bitwise equal."""
    for prefix in ("outer.", "decoder.", "embedding.", "output_layer."):
        first, *others = (tensors(checkpoint, prefix) for checkpoint in checkpoints)
        assert first
        for other in others:
            assert first.keys() == other.keys()
            assert all(torch.equal(first[name], other[name]) for name in first)


def test_two_layouts_share_one_model(pair: Pair) -> None:
    islands = {site: pair.island(site) for site in "ab"}
    for site in islands:
        pair.start(site)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    assert_one_model(*(saved(given)[-1] for given, _ in islands.values()))
    per_step = TRAINING.tokens_per_step
    for _, paths in islands.values():
        contributed, applied = told(paths, ROUND_CONTRIBUTED), told(paths, ROUND_APPLIED)
        assert [(e["round"], e["step"], e["tokens"]) for e in contributed] == [
            (1, 3, 3 * per_step),
            (2, 6, 3 * per_step),
            (3, 8, 2 * per_step),
        ]
        assert [(e["round"], e["step"], e["included"]) for e in applied] == [
            (1, 3, True),
            (2, 6, True),
            (3, 8, True),
        ]
        assert all(event["update_norm"] > 0 and event["waited_seconds"] >= 0 for event in applied)
        assert told(paths, TRAINING_ENDED)[0]["outcome"] == COMPLETED
    norms = [[event["update_norm"] for event in told(paths, ROUND_APPLIED)] for _, paths in islands.values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    for number, closed in enumerate(pair.coordinator.closed, start=1):
        listed = {part.site: part.sha256 for part in closed.contributions}
        assert listed == {
            s: told(p, ROUND_CONTRIBUTED)[number - 1]["sha256"] for s, (_, p) in islands.items()
        }
    losses = {site: [event["loss"] for event in told(paths, STEP)] for site, (_, paths) in islands.items()}
    assert losses["a"] != losses["b"]  # they trained on different text


def test_updates_that_no_checkpoint_needs_are_deleted(pair: Pair) -> None:
    """Kept are those of steps 7 and 8; the older of them has round 2 behind it."""
    for site in "ab":
        pair.start(site, every=1, keep=2)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    for site, paths in pair.coordinator.scratch.items():
        for box in (paths.outbox("run", 1, site), paths.inbox("run", 1, site)):
            assert [folder.name for folder in box.parent.parent.iterdir()] == ["round-000003"]


def kill_rank_1(given: Segment, checkpoints: int) -> None:
    """Once so many checkpoints are there."""
    if os.environ["RANK"] == "1":
        await_saved(given, checkpoints)
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("at", "every", "resumes", "precision"),
    [(3, 4, 0, "fp32"), (5, 4, 4, "fp32"), (7, 4, 4, "fp32"), (4, 3, 3, "bf16")],
)
def test_an_island_that_was_killed_repeats_its_part_exactly(
    pair: Pair, tmp_path: Path, at: int, every: int, resumes: int, precision: str
) -> None:
    """Killed after a round, set back to before it or to after it, it ends as if nothing had happened."""
    how = {"every": every, "training": replace(TRAINING, precision=precision)}
    reference = Pair(tmp_path / "undisturbed")
    for islands in (pair, reference):
        islands.start("b", **how)
    reference.start("a", **how)
    assert reference.finish("a", "b") == [EXIT_COMPLETED] * 4
    given, paths = pair.island("a", **how)
    pair.start("a", interrupted, at, partial(kill_rank_1, given, at // every), **how)
    assert pair.ranks["a"].wait(pair.coordinator.tick)[1] == -signal.SIGKILL
    pair.start("a", **how)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    assert [event["step"] for event in told(paths, TRAINING_READY)] == [0, resumes]
    expected, _ = reference.island("a")
    assert contents(saved(given)[-1]) == contents(saved(expected)[-1])
    applied = [(event["round"], event["step"]) for event in told(paths, ROUND_APPLIED)]
    assert sorted(set(applied)) == [(1, 3), (2, 6), (3, 8)]
    reference.end()


def test_without_a_closed_round_it_goes_on_then_saves_and_ends(pair: Pair) -> None:
    given, paths = pair.island("a", rounds=IMPATIENT)
    pair.start("a", rounds=IMPATIENT)
    assert pair.ranks["a"].results() == [EXIT_STARVED] * 2
    opened = told(paths, ROUND_OPEN)
    assert [(event["round"], event["step"]) for event in opened] == [(1, 3), (1, 6)]
    assert all(0.2 <= event["waited_seconds"] < 5 for event in opened)
    assert [event["step"] for event in told(paths, ROUND_CONTRIBUTED)] == [3]  # one open update at a time
    assert [event["step"] for event in told(paths, CHECKPOINT_SAVED)] == [4, 6]
    assert told(paths, TRAINING_ENDED)[0]["outcome"] == STARVED
    outer = Reader(saved(given)[-1]).facts["outer"]
    assert (outer["round"], outer["open"], outer["tokens"]) == (0, True, 6 * TRAINING.tokens_per_step)


def test_a_late_round_is_applied_at_the_next_boundary(pair: Pair) -> None:
    """It is brought once the island has gone on without it; its next update holds what came after."""
    _, paths = pair.island("a")
    patient_later = replace(ROUNDS, deadline_seconds=2.0)
    pair.coordinator.wanted = lambda number: ["a"]
    pair.coordinator.deliver = lambda number: number > 1 or bool(told(paths, ROUND_OPEN))
    pair.start("a", rounds=patient_later)
    assert pair.finish("a") == [EXIT_COMPLETED] * 2
    assert [event["step"] for event in told(paths, ROUND_OPEN)] == [3]
    assert [(e["round"], e["step"]) for e in told(paths, ROUND_APPLIED)] == [(1, 6), (2, 6), (3, 8)]
    per_step = TRAINING.tokens_per_step
    contributed = [(e["round"], e["step"], e["tokens"] // per_step) for e in told(paths, ROUND_CONTRIBUTED)]
    assert contributed == [(1, 3, 3), (2, 6, 3), (3, 8, 2)]


def test_an_island_that_missed_rounds_catches_up_before_it_trains(pair: Pair) -> None:
    pair.coordinator.wanted = lambda number: ["a"] if number < 3 else ["a", "b"]
    pair.start("a")
    pair.ranks["a"].wait(
        lambda: (pair.coordinator.tick(), pair.end() if len(pair.coordinator.closed) == 2 else None)
    )
    assert len(pair.coordinator.closed) == 2
    given, paths = pair.island("b")
    for site in "ab":
        pair.start(site)
    pair.coordinator.wanted = lambda number: ["a", "b"] if number == 3 else ["b"]
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    applied = [(e["round"], e["step"], e["included"]) for e in told(paths, ROUND_APPLIED)]
    assert applied[:3] == [(1, 0, False), (2, 0, False), (3, 3, True)]
    assert Reader(saved(given)[-1]).facts["outer"]["tokens"] == 0


def test_an_update_left_out_of_the_last_round_goes_into_another(pair: Pair) -> None:
    given, paths = pair.island("a")

    def wanted(number: int) -> list[str]:
        if number != 3:
            return ["a", "b"] if number < 3 else ["a"]
        left_out = pair.coordinator.scratch["a"].outbox("run", 3, "a")
        return ["b"] if (left_out / MANIFEST).exists() else []

    pair.coordinator.wanted = wanted
    for site in "ab":
        pair.start(site)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    applied = [(e["round"], e["step"], e["included"]) for e in told(paths, ROUND_APPLIED)]
    assert applied == [(1, 3, True), (2, 6, True), (3, 8, False), (4, 8, True)]
    assert Reader(saved(given)[-1]).facts["outer"]["tokens"] == 0


def test_a_drain_ends_the_wait_and_the_next_segment_waits_on(pair: Pair) -> None:
    given, paths = pair.island("a")
    pair.start("a")

    def drain() -> None:
        if told(paths, ROUND_CONTRIBUTED):
            paths.drain.touch()

    assert pair.ranks["a"].results(drain) == [EXIT_DRAINED] * 2
    assert Reader(saved(given)[-1]).facts["outer"]["open"]
    assert not told(paths, ROUND_OPEN)
    paths.drain.unlink()
    for site in "ab":
        pair.start(site)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    assert [(e["round"], e["step"]) for e in told(paths, ROUND_APPLIED)] == [(1, 3), (2, 6), (3, 8)]
    other, _ = pair.island("b")
    assert_one_model(saved(given)[-1], saved(other)[-1])


def test_all_take_the_state_of_one_island_where_a_round_says_so(pair: Pair) -> None:
    """Round 1 names a: its update of round 2 brings base and momentum along, and the next ones do not."""
    pair.coordinator.reset_from = {1: "a"}
    for site in "ab":
        pair.start(site)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    sizes = {s: [e["bytes"] for e in told(pair.island(s)[1], ROUND_CONTRIBUTED)] for s in "ab"}
    assert sizes["a"][1] > 3 * sizes["a"][0]
    assert sizes["a"][2] == sizes["a"][0]
    assert len(set(sizes["b"])) == 1
    assert_one_model(*(saved(pair.island(site)[0])[-1] for site in "ab"))


def test_a_discarded_island_goes_back_to_the_base(pair: Pair) -> None:
    given, paths = pair.island("a")
    refused = pair.coordinator.scratch["a"].outbox("run", 2, "a") / MANIFEST
    refusing = {False: [], True: ["b"]}
    pair.coordinator.wanted = lambda number: refusing[refused.exists()] if number == 2 else ["a", "b"]
    pair.coordinator.discarded = {2: ("a",)}
    for site in "ab":
        pair.start(site, every=3)
    assert pair.finish("a", "b") == [EXIT_COMPLETED] * 4
    applied = [(e["round"], e["step"], e["included"]) for e in told(paths, ROUND_APPLIED)]
    assert applied == [(1, 3, True), (2, 6, False), (3, 8, True)]
    per_step = TRAINING.tokens_per_step
    contributed = [(e["round"], e["step"], e["tokens"] // per_step) for e in told(paths, ROUND_CONTRIBUTED)]
    assert contributed == [(1, 3, 3), (2, 6, 3), (3, 8, 2)]  # the three of round 2 are gone
    at_6 = saved(given)[1]
    weights, base = tensors(at_6, "decoder."), tensors(at_6, "outer.base.decoder.")
    assert all(torch.equal(weights[name], base[f"outer.base.{name}"]) for name in weights)


def damaged(pair: Pair, closed: ClosedRound) -> ClosedRound:
    flip(pair.coordinator.scratch["b"].inbox("run", closed.number, "a") / "writer-00000.bin")
    return closed


def of_another_base(pair: Pair, closed: ClosedRound) -> ClosedRound:
    return replace(closed, base=genesis("another run"))


def of_another_update(pair: Pair, closed: ClosedRound) -> ClosedRound:
    return replace(closed, contributions=tuple(replace(p, sha256="0" * 64) for p in closed.contributions))


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (damaged, "writer-00000.bin: bytes .* have crc32c"),
        (of_another_base, "its base is"),
        (of_another_update, "its manifest has sha256"),
    ],
)
def test_a_round_that_cannot_be_applied_fails_and_saves_nothing(
    pair: Pair, harm: Callable[[Pair, ClosedRound], ClosedRound], reason: str
) -> None:
    """Damage is seen by one rank alone: the other stage has none of that tensor."""
    given, paths = pair.island("b")
    pair.coordinator.deliver = lambda number: False
    for site in "ab":
        pair.start(site)
    a, b = pair.ranks["a"], pair.ranks["b"]
    a.wait(lambda: (pair.coordinator.tick(), pair.coordinator.closed and a.kill()))
    (closed,) = pair.coordinator.closed
    scratch = pair.coordinator.scratch
    shutil.copytree(scratch["a"].outbox("run", 1, "a"), scratch["b"].inbox("run", 1, "a"))
    write_atomically(scratch["b"].closed_round("run", 1), harm(pair, closed).to_json())
    assert b.results() == [EXIT_BAD_INPUT] * 2
    assert all("round 1 cannot be applied" in b.log(rank).splitlines()[-1] for rank in (0, 1))
    (ended,) = told(paths, TRAINING_ENDED)
    assert (ended["outcome"], ended["step"]) == (FAILED, 3)
    assert re.search(f"round 1 cannot be applied: .*{reason}", ended["reason"])
    assert saved(given) == []


def test_the_rounds_of_a_checkpoint_cannot_be_switched_off(pair: Pair) -> None:
    pair.coordinator.wanted = lambda number: ["a"]
    pair.start("a")
    assert pair.finish("a") == [EXIT_COMPLETED] * 2
    pair.start("a", rounds=None)
    assert pair.ranks["a"].results() == [EXIT_BAD_INPUT] * 2
    assert "was saved with rounds, unlike this segment" in pair.ranks["a"].log().splitlines()[-1]
