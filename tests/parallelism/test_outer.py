"""Rounds between islands of different layouts, against DiLoCo in one process."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints.reader import Reader, Shard
from clusters.rounds import Contribution
from clusters.segment import Rounds
from orchestrator.rounds import drift
from parallelism.outer import Average, Outer
from tests.parallelism.islands import (
    ROUNDS,
    RUN,
    SHAPES,
    Island,
    Layout,
    Plain,
    Tensors,
    added,
    alone,
    assert_equal,
    close,
    coarse,
    columns,
    stages,
    start,
    training,
)  # fmt: skip


@pytest.fixture
def islands(tmp_path: Path) -> tuple[Island, Island]:
    return Island("a", columns, tmp_path / "a"), Island("b", stages, tmp_path / "b")


@pytest.mark.parametrize("quantise", ["none", "int8", "int4"])
def test_layouts_agree_bitwise_with_one_process(tmp_path: Path, quantise: str) -> None:
    """Also where a layout cuts groups in two; and parameters keep exactly what was lost on the way."""
    rounds = replace(ROUNDS, quantise=quantise)
    a = Island("a", columns, tmp_path / "a", rounds)
    b = Island("b", stages, tmp_path / "b", rounds)
    plain, closed = Plain(quantise), None
    for number in range(1, 5):
        theta = {i.site: added(i.tensors("live"), i.train(tokens)) for i, tokens in ((a, 100), (b, 300))}
        lost = {i.site: left_out(plain.base, theta[i.site], quantise) for i in (a, b)}
        closed = close(closed, b.contribute(), a.contribute())
        norms = [island.apply(closed, [a, b]) for island in (a, b)]
        expected = plain.round([(100, theta["a"]), (300, theta["b"])])
        for island in (a, b):
            assert_equal(island.tensors("base"), plain.base)
            assert_equal(island.tensors("momentum"), plain.momentum)
            assert_equal(island.tensors("live"), added(plain.base, lost[island.site]))
            facts = {
                "round": number, "chain": closed.identity, "reset_from": "", "tokens": 0, "open": False,
            }  # fmt: skip
            assert [outer.facts() for outer in island.ranks] == [facts] * 2
        assert norms == pytest.approx([expected] * 2, rel=1e-5)


def left_out(base: Tensors, theta: Tensors, quantise: str) -> Tensors:
    """What was trained and not sent."""
    return {n: (theta[n] - base[n]) + coarse(base[n] - theta[n], quantise) for n in base}


@pytest.mark.parametrize(("quantise", "bound"), [("int8", 0.5 / 127), ("int4", 0.5 / 7)])
def test_what_was_sent_adds_up_to_what_was_trained(tmp_path: Path, quantise: str, bound: float) -> None:
    """Error feedback: after any number of rounds what is missing is half a step of the last one's."""
    rounds = Rounds(inner_steps=1, outer_learning_rate=1.0, outer_momentum=0.0, quantise=quantise)
    island = Island("a", columns, tmp_path, rounds)
    trained, closed = start(), None
    for _ in range(12):
        trained = added(trained, island.train())
        closed = close(closed, island.contribute())
        island.apply(closed, [island])
    largest = max(float(t.abs().max()) for t in training("a", 11).values())
    missing = {name: trained[name] - tensor for name, tensor in island.tensors("base").items()}
    assert max(float(t.abs().max()) for t in missing.values()) <= 1.2 * bound * largest
    for name, tensor in island.tensors("live").items():  # nothing is lost in the parameters
        torch.testing.assert_close(tensor, trained[name], rtol=0, atol=1e-5)


def test_all_islands_end_on_the_base(tmp_path: Path) -> None:
    rounds = replace(ROUNDS, quantise="int4")
    a, b = Island("a", columns, tmp_path / "a", rounds), Island("b", stages, tmp_path / "b", rounds)
    a.train(), b.train()
    closed = close(None, a.contribute(), b.contribute())
    a.apply(closed, [a, b], last=True)
    b.train(5)  # what is not in the round yet is not thrown away
    kept = b.tensors("live")
    b.apply(closed, [a, b], last=True)
    assert_equal(a.tensors("live"), a.tensors("base"))
    assert_equal(b.tensors("base"), a.tensors("base"))
    assert not torch.equal(b.tensors("live")["wide"], b.tensors("base")["wide"])
    assert not torch.equal(b.tensors("live")["wide"], kept["wide"])
    assert b.ranks[0].tokens == 5


def test_a_discarded_island_goes_back_to_the_base_and_nothing_is_kept(
    islands: tuple[Island, Island],
) -> None:
    a, b = islands
    a.train(), b.train(40)
    b.contribute()
    closed = replace(close(None, a.contribute()), discarded=("b",))
    a.apply(closed, [a])
    b.train(7)
    b.apply(closed, [a])
    for island in islands:
        assert_equal(island.tensors("live"), a.tensors("base"))
        assert [outer.tokens for outer in island.ranks] == [0, 0]
    assert_equal(b.tensors("base"), a.tensors("base"))


def test_a_base_that_has_drifted_is_seen_and_reset_bit_for_bit(tmp_path: Path) -> None:
    """Island b's base and momentum are changed behind its back; a's sketch differs by just that much."""
    rounds = replace(ROUNDS, quantise="int8")
    a, b = Island("a", columns, tmp_path / "a", rounds), Island("b", stages, tmp_path / "b", rounds)
    closed = None
    for _ in range(2):
        a.train(), b.train()
        closed = close(closed, a.contribute(), b.contribute())
        for island in (a, b):
            island.apply(closed, [a, b])
    for outer in b.ranks:
        for shard in outer.state_shards():
            if shard.name.endswith("wide"):
                shard.tensor.mul_(1.01)
    a.train(), b.train()
    found = drift({island.site: island.header().sketch for island in (a, b)})
    assert found is not None
    assert (found.tensor, found.sites) == ("wide", ("a", "b"))
    assert 0.005 < found.value < 0.02
    closed = replace(close(closed, a.contribute(), b.contribute()), reset_from="a")
    for island in (a, b):
        island.apply(closed, [a, b])
    assert not torch.equal(b.tensors("base")["wide"], a.tensors("base")["wide"])  # named, not yet there
    a.train(), b.train()
    theta = {island.site: island.tensors("live") for island in (a, b)}
    before = b.tensors("base")
    closed = close(closed, a.contribute(), b.contribute())
    for island in (a, b):
        island.apply(closed, [a, b])
    for kind in ("base", "momentum"):
        assert_equal(b.tensors(kind), a.tensors(kind))
    lost = left_out(before, theta["b"], "int8")  # what b trained stays, on whatever base
    assert_equal(b.tensors("live"), added(a.tensors("base"), lost))
    assert a.ranks[0].reset_from == b.ranks[0].reset_from == ""


def test_an_island_that_is_late_with_its_state_resets_nobody(islands: tuple[Island, Island]) -> None:
    a, b = islands
    a.train(), b.train()
    first = replace(close(None, a.contribute(), b.contribute()), reset_from="a")
    for island in islands:
        island.apply(first, [a, b])
    b.train()
    second = close(first, b.contribute())
    for island in islands:
        island.apply(second, [b])
    assert a.ranks[0].reset_from == ""
    a.train()
    assert not a.header().state


def test_a_resumed_island_gives_its_state_when_it_was_named(tmp_path: Path) -> None:
    a = Island("a", columns, tmp_path)
    a.train()
    closed = replace(close(None, a.contribute()), reset_from="a")
    a.apply(closed, [a])
    a = a.restarted(a.save(step=10), stages)
    a.train()
    assert a.header().state
    a.contribute()
    names = {piece.name for piece in Reader(a.outbox).manifest.pieces}
    assert {f"outer.{kind}.{name}" for kind in ("base", "momentum") for name in SHAPES} < names


def test_a_resumed_island_sends_what_was_lost_on_the_way(tmp_path: Path) -> None:
    """Bit for bit what it would have sent without the interruption."""
    rounds = replace(ROUNDS, quantise="int4")
    sent = []
    for name in ("undisturbed", "resumed"):
        island = Island("a", columns, tmp_path / name, rounds)
        island.train()
        closed = close(None, island.contribute())
        island.apply(closed, [island])
        if name == "resumed":
            island = island.restarted(island.save(step=10), stages)
        island.train()
        island.contribute()
        sent.append({s: read(island, s) for s in SHAPES})
    assert_equal(*sent)


def read(island: Island, name: str) -> torch.Tensor:
    """A whole tensor of the open contribution."""
    values = torch.empty(SHAPES[name])
    Reader(island.outbox).read(Shard(name, SHAPES[name], (0,) * values.dim(), values))
    return values


@pytest.mark.parametrize("order", ["abc", "cab"])
def test_updates_are_added_in_the_order_of_their_sites(tmp_path: Path, order: str) -> None:
    islands = {site: Island(site, alone, tmp_path / site) for site in "abc"}
    weights = {"a": 100, "b": 700, "c": 150}
    theta = {site: added(start(), island.train(weights[site])) for site, island in islands.items()}
    parts = {site: island.contribute() for site, island in islands.items()}
    closed = replace(close(None, *parts.values()), contributions=tuple(parts[site] for site in order))
    islands["a"].apply(closed, list(islands.values()))
    plain = Plain()
    plain.round([(weights[site], theta[site]) for site in "abc"])
    assert_equal(islands["a"].tensors("base"), plain.base)


@settings(max_examples=50, deadline=None)
@given(st.floats(0.0, 0.99), st.floats(0.01, 1.5), st.integers(0, 1 << 30))
def test_the_outer_step_is_that_of_torch_sgd(momentum: float, learning_rate: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shard = Shard("w", (40,), (0,), torch.randn(40, generator=generator))
    parameter = torch.nn.Parameter(shard.tensor.clone())
    rounds = Rounds(inner_steps=1, outer_learning_rate=learning_rate, outer_momentum=momentum)
    outer = Outer([shard], [shard], rounds, RUN, "a")
    sgd = torch.optim.SGD([parameter], lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    closed = None
    for _ in range(4):
        parameter.grad = torch.randn(40, generator=generator)
        closed = close(closed, Contribution("a", 1, ""))
        outer.advance(Average(closed, [parameter.grad.clone()], [], 0))
        sgd.step()
        torch.testing.assert_close(outer.state_shards()[0].tensor, parameter.detach(), rtol=1e-5, atol=1e-5)


def test_training_goes_on_while_the_contribution_travels(islands: tuple[Island, Island]) -> None:
    a, b = islands
    a.train(), b.train()
    closed = close(None, a.contribute(), b.contribute())
    since = a.train(50)
    a.apply(closed, [a, b])
    b.apply(closed, [a, b])
    assert_equal(a.tensors("base"), b.tensors("base"))
    expected = added(a.tensors("base"), since)
    for name, tensor in a.tensors("live").items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert [outer.tokens for outer in (*a.ranks, *b.ranks)] == [50, 50, 0, 0]


def test_a_late_island_keeps_its_work_for_the_next_round(islands: tuple[Island, Island]) -> None:
    a, b = islands
    a.train()
    own = b.train(40)
    first = close(None, a.contribute())
    b.contribute()  # too late
    assert b.ranks[0].open
    a.apply(first, [a])
    b.apply(first, [a])
    assert not b.ranks[0].open
    assert_equal(a.tensors("base"), b.tensors("base"))
    for name, tensor in b.tensors("live").items():
        torch.testing.assert_close(tensor - b.tensors("base")[name], own[name], rtol=0, atol=1e-6)
    b.train(60)
    a.train()
    second = close(first, a.contribute(), b.contribute())
    assert [c.tokens for c in second.contributions] == [100, 100]  # 40 + 60: all that the base lacks
    for island in islands:
        island.apply(second, [a, b])
        assert_equal(island.tensors("live"), a.tensors("base"))


def test_an_idle_island_that_was_not_included_lands_on_the_base(islands: tuple[Island, Island]) -> None:
    a, b = islands
    a.train()
    closed = close(None, a.contribute())
    b.apply(closed, [a])
    assert_equal(b.tensors("live"), b.tensors("base"))
    a.apply(closed, [a])
    assert_equal(b.tensors("base"), a.tensors("base"))


@pytest.mark.parametrize("layout", [columns, stages, alone])
def test_a_dead_island_catches_up_from_its_checkpoint(islands: tuple[Island, Island], layout: Layout) -> None:
    a, b = islands
    for island in islands:
        island.train()
    rounds = [close(None, a.contribute(), b.contribute())]
    for island in islands:
        island.apply(rounds[0], [a, b])
    b.train(30)
    checkpoint = b.save(step=11)
    b.train()  # lost
    for _ in range(3):
        a.train()
        rounds.append(close(rounds[-1], a.contribute()))
        a.apply(rounds[-1], [a])
    b = b.restarted(checkpoint, layout)
    for closed in rounds[1:]:
        b.apply(closed, [a])
    assert_equal(b.tensors("base"), a.tensors("base"))
    assert_equal(b.tensors("momentum"), a.tensors("momentum"))
    for name, change in training("b", 1).items():
        torch.testing.assert_close(
            b.tensors("live")[name] - b.tensors("base")[name], change, rtol=0, atol=2e-6
        )
    assert b.ranks[0].tokens == 30


@pytest.mark.parametrize("layout", [stages, columns])
def test_a_contribution_is_taken_up_after_a_restart(islands: tuple[Island, Island], layout: Layout) -> None:
    a, b = islands
    a.train(), b.train()
    checkpoint = b.save(step=10)
    closed = close(None, a.contribute(), b.contribute(step=10))
    b = b.restarted(checkpoint, layout)
    for island in (a, b):
        island.apply(closed, [a, b])
    assert_equal(b.tensors("live"), a.tensors("base"))  # bitwise, though its own part was read back
    facts = {"round": 1, "chain": closed.identity, "reset_from": "", "tokens": 0, "open": False}
    assert b.ranks[0].facts() == facts


def test_an_older_checkpoint_trains_again_what_the_base_holds(islands: tuple[Island, Island]) -> None:
    a, b = islands
    a.train()
    b.train(40)
    checkpoint = b.save(step=4)
    b.train(60)
    closed = close(None, a.contribute(), b.contribute(step=10))
    b = b.restarted(checkpoint)
    b.apply(closed, [a, b])
    assert b.ranks[0].tokens == -60  # the base holds what this island has yet to do again
    b.train(60)
    assert b.ranks[0].tokens == 0
    for name, tensor in b.tensors("live").items():
        torch.testing.assert_close(tensor, b.tensors("base")[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "facts",
    [{}, {"round": 1.0, "chain": "x", "tokens": 0, "open": False}, {"round": 1, "chain": "x", "tokens": 0}],
)
def test_facts_of_something_else_are_refused(
    islands: tuple[Island, Island], facts: dict[str, object]
) -> None:
    with pytest.raises(ValueError, match="not the facts of an outer update"):
        islands[0].ranks[0].restore(facts)


def test_facts_survive_json(islands: tuple[Island, Island]) -> None:
    a, _ = islands
    a.train(5)
    other = Island("a", columns, a.scratch).ranks[0]
    other.restore(json.loads(json.dumps(a.ranks[0].facts())))
    assert other.facts() == a.ranks[0].facts()
