"""An island's contribution as a file: it never changes, and a bad one is refused by name."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from checkpoints.attempts import begin
from checkpoints.manifest import MANIFEST, Damaged, Manifest
from checkpoints.reader import Missing, Reader, Shard
from checkpoints.store import write_shards
from checkpoints.update import Header
from clusters.rounds import ClosedRound, Contribution, genesis
from parallelism.updates import commit_update, committed_update
from tests.parallelism.islands import RUN, SHAPES, Island, alone, assert_equal, close, columns, stages


@pytest.fixture
def islands(tmp_path: Path) -> tuple[Island, Island]:
    return Island("a", columns, tmp_path / "a"), Island("b", stages, tmp_path / "b")


def test_a_committed_contribution_never_changes(islands: tuple[Island, Island]) -> None:
    _, b = islands
    b.train()
    assert committed_update(b.outbox, b.header(10)) is None
    first = b.contribute(step=10)
    files = {path.name: path.read_bytes() for path in b.outbox.iterdir()}
    b.train(7)  # an incarnation that went another way
    assert b.contribute(step=11) == first
    assert {path.name: path.read_bytes() for path in b.outbox.iterdir()} == files
    assert list(b.outbox.parent.iterdir()) == [b.outbox]  # no attempt is left beside it
    assert Reader(b.outbox).facts == {
        "run": RUN, "site": "b", "round": 1, "base": genesis(RUN), "tokens": 100, "step": 10,
        "quantiser": "none", "state": False, "fragment": 0, "fragments": 1, "sketch": b.header().sketch,
    }  # fmt: skip


def test_a_crash_before_the_commit_leaves_no_contribution(islands: tuple[Island, Island]) -> None:
    a, _ = islands
    a.train()
    header = a.header(10)
    for writers in (1, 2):  # the second attempt died after all had written
        attempt = begin(a.outbox.parent, a.outbox.name)
        for rank, part in enumerate(a.parts()[:writers]):
            write_shards(attempt, rank, part)
    assert committed_update(a.outbox, header) is None
    a.contribute()
    Reader(a.outbox).verify()
    assert committed_update(a.outbox, header) is not None


def test_a_contribution_of_another_history_is_refused(islands: tuple[Island, Island]) -> None:
    _, b = islands
    b.train()
    b.contribute()
    for outer in b.ranks:
        outer.chain = "f" * 64
    with pytest.raises(ValueError, match=r"round-000001/b: its base is '.*', not 'ffff"):
        b.contribute()


def test_ranks_write_only_what_they_own(islands: tuple[Island, Island]) -> None:
    for island in islands:
        island.train()
        island.contribute()
        pieces = Reader(island.outbox).manifest.pieces
        sizes = {name: sum(math.prod(p.shape) for p in pieces if p.name == name) for name in SHAPES}
        expected = {name: math.prod(shape) for name, shape in SHAPES.items()}
        assert sizes == expected
        state = [shard for outer in island.ranks for shard in outer.owned_state_shards()]
        for name, size in expected.items():
            for kind in ("base", "momentum"):
                assert sum(s.box.size for s in state if s.name == f"outer.{kind}.{name}") == size


def test_no_tokens_no_contribution(islands: tuple[Island, Island]) -> None:
    with pytest.raises(AssertionError):
        islands[0].header(1)


def test_an_island_that_diverged_does_not_contribute(islands: tuple[Island, Island]) -> None:
    a, _ = islands
    a.train()
    a.ranks[1].shards[0].tensor[0, 0] = torch.inf
    with pytest.raises(ValueError, match="the update of site a is not finite: tensor embedding"):
        a.contribute()
    assert not a.outbox.exists()


# What is wrong with a round. Each takes the two islands and the good round, and returns the round to apply.


def wrong_round(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return replace(good, number=3)


def wrong_run(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return replace(good, run="run-2")


def wrong_base(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return replace(good, base="0" * 64)


def empty(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return replace(good, contributions=())


def twice(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return replace(good, contributions=(*good.contributions, good.contributions[0]))


def no_tokens(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return replace(good, contributions=(replace(good.contributions[0], tokens=0),))


def wrong_sha(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    first, second = good.contributions
    return replace(good, contributions=(first, replace(second, sha256="0" * 64)))


def wrong_tokens(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    first, second = good.contributions
    return replace(good, contributions=(first, replace(second, tokens=101)))


def other_manifest(b: Island, good: ClosedRound, change: Callable[[Manifest], Manifest]) -> ClosedRound:
    manifest = change(Reader(b.outbox).manifest)
    (b.outbox / MANIFEST).write_text(manifest.to_json())
    contribution = Contribution("b", 100, manifest.sha256)
    return replace(good, contributions=(good.contributions[0], contribution))


def wrong_site(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return other_manifest(b, good, lambda m: replace(m, facts={**m.facts, "site": "c"}))


def wrong_kind(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return other_manifest(b, good, lambda m: replace(m, kind="checkpoint"))


def wrong_state(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return other_manifest(b, good, lambda m: replace(m, facts={**m.facts, "state": True}))


def odd_header(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return other_manifest(b, good, lambda m: replace(m, facts={**m.facts, "fragment": 1}))


def no_header(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return other_manifest(b, good, lambda m: replace(m, facts={}))


def flipped_bit(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    file = b.outbox / "writer-00000.bin"
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    return good


def flipped_manifest(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    text = (b.outbox / MANIFEST).read_text()
    (b.outbox / MANIFEST).write_text(text.replace('"tokens":100', '"tokens":101'))
    return good


def rewritten(a: Island, b: Island, good: ClosedRound, change: Callable[[Shard], object]) -> ClosedRound:
    """The update of b, written again after `change`, and listed as such."""
    header = Header.of(Reader(b.outbox).manifest)
    shutil.rmtree(b.outbox)
    attempt = begin(b.outbox.parent, "b")
    for rank, part in enumerate(b.parts()):
        write_shards(attempt, rank, [s for s in part if change(s) is not None])
    manifest = commit_update(attempt, b.outbox, 2, header)
    return replace(good, contributions=(good.contributions[0], Contribution("b", 100, manifest.sha256)))


def not_a_number(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return rewritten(a, b, good, lambda s: s.tensor.fill_(torch.nan) if s.name == "norm" else s)


def infinite(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return rewritten(a, b, good, lambda s: s.tensor.fill_(-torch.inf) if s.name == "embedding" else s)


def incomplete(a: Island, b: Island, good: ClosedRound) -> ClosedRound:
    return rewritten(a, b, good, lambda s: None if s.name == "layers.1.up" else s)


BAD = {
    wrong_round: (ValueError, "closed round 3 of run run-1: cannot follow round 0"),
    wrong_run: (ValueError, "closed round 1 of run run-2: this is run run-1"),
    wrong_base: (ValueError, "its base is 000000000000, this island's"),
    empty: (ValueError, r"must list at least one site and each once, not \[\]"),
    twice: (ValueError, r"each once, not \['a', '[ab]', '[ab]'\]"),
    no_tokens: (ValueError, "lists an update of no tokens"),
    wrong_sha: (ValueError, "round-000001/b: its manifest has sha256 .*, the round lists 000000000000"),
    wrong_tokens: (ValueError, "round-000001/b: its tokens is 100, not 101"),
    wrong_site: (ValueError, "round-000001/b: its site is 'c', not 'b'"),
    wrong_kind: (ValueError, "round-000001/b: a checkpoint, not an update"),
    wrong_state: (ValueError, "round-000001/b: its state is True, not False"),
    odd_header: (ValueError, "round-000001/b: the update's fragment cannot be 1"),
    no_header: (ValueError, "round-000001/b: the update's header lacks, or should lack, base, fragment"),
    flipped_bit: (Damaged, r"round-000001/b: writer-00000.bin: bytes 0 to 3192 \(embedding\) have crc32c"),
    flipped_manifest: (Damaged, "round-000001/b: the manifest does not match its own checksum"),
    not_a_number: (ValueError, "the update of site b is not finite: tensor norm"),
    infinite: (ValueError, "the update of site b is not finite: tensor embedding"),
    incomplete: (Missing, "tensor 'layers.1.up' has no piece"),
}


@pytest.mark.parametrize("spoil", BAD, ids=lambda spoil: spoil.__name__)
def test_a_bad_round_changes_nothing(
    tmp_path: Path, spoil: Callable[[Island, Island, ClosedRound], ClosedRound]
) -> None:
    a, b = Island("a", alone, tmp_path / "a"), Island("b", stages, tmp_path / "b")
    a.train(), b.train()
    bad = spoil(a, b, close(None, a.contribute(), b.contribute()))
    kinds = ("live", "base", "momentum")
    before = [a.tensors(kind) for kind in kinds]
    kind, message = BAD[spoil]
    with pytest.raises(kind, match=message) as caught:
        a.apply(bad, [a, b])
    assert "\n" not in str(caught.value)
    for name, tensors in zip(kinds, before, strict=True):
        assert_equal(a.tensors(name), tensors)
    facts = {"round": 0, "chain": genesis(RUN), "reset_from": "", "tokens": 100, "open": True}
    assert a.ranks[0].facts() == facts
