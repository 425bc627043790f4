"""The plan: what is shown before anything starts, and what is refused before anything is spent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.segment import Segment, Start
from clusters.site import load_sites
from orchestrator.ledger import Balance, Ledger
from orchestrator.plan import Plan, SiteFacts, make_plan
from orchestrator.segments import segment_for
from orchestrator.spec import RunSpec, parse_run
from orchestrator.store import Store
from parallelism.costs import flops_per_token, memory_per_rank
from parallelism.layout import Layout

TEXT = """\
name = "demo"
[model]
preset = "llama-7m"
[data]
prefixes = ["data/eu"]
[training]
tokens = "2M"
sequence_length = 256
global_batch = 16
micro_batch = 4
learning_rate = 3e-3
[rounds]
inner_steps = 20
deadline = "60s"
[checkpoint]
every_steps = 20
[[islands]]
site = "local-a"
allocation = "demo-a"
tp = 2
time_limit = "30min"
[[islands]]
site = "local-b"
allocation = "demo-b"
pp = 2
time_limit = "1h"
"""


@dataclass(frozen=True)
class Machine:
    """A site as the plan sees it."""

    name: str
    unit: str = "core-hour"
    rank_memory_bytes: int = 4 << 30
    rank_flops: float = 60e9
    efficiency: float = 0.2
    max_ranks: int = 64
    ranks_per_node: int = 64
    max_nodes: int = 4
    max_time_limit_seconds: float = 7 * 86400.0
    per_rank_hour: float = 1.0

    def refuses(self, nodes: int) -> str | None:
        return f"nodes = {nodes}: too many" if nodes > self.max_nodes else None

    def units_per_hour(self, ranks: int, nodes: int) -> float:
        return ranks * self.per_rank_hour


@dataclass(frozen=True)
class Purse:
    """Allocations by name."""

    balances: Mapping[str, Balance]

    def allocations(self) -> list[str]:
        return sorted(self.balances)

    def balance(self, allocation: str) -> Balance:
        return self.balances[allocation]


def balance(name: str, granted: int = 10_000_000, unit: str = "core-hour", settled: int = 0) -> Balance:
    return Balance(name, unit, granted, settled, burning=0, committed=0, age=0.0)


SITES: dict[str, SiteFacts] = {name: Machine(name) for name in ("local-a", "local-b")}
PURSE = Purse({name: balance(name) for name in ("demo-a", "demo-b")})


def spec(old: str = "", new: str = "") -> RunSpec:
    assert old in TEXT
    return parse_run(TEXT.replace(old, new) if old else TEXT, "run.toml")


def refusals(run: RunSpec, sites: Mapping[str, SiteFacts] = SITES, purse: Purse = PURSE) -> list[str]:
    with pytest.raises(ValueError, match=r".") as caught:
        make_plan(run, sites, purse)
    return str(caught.value).splitlines()


def test_what_a_plan_says_of_an_island() -> None:
    plan = make_plan(spec(), SITES, PURSE)
    a, b = plan.islands
    assert (plan.steps, plan.rounds_planned, plan.parameters) == (260, 13, 7_096_576)
    assert plan.tokens == a.tokens + b.tokens == 260 * 4096 * 2
    assert (a.ranks, a.units_per_hour, a.time_limit_seconds, a.reserved) == (2, 2.0, 1800.0, 1_000_000)
    assert (b.time_limit_seconds, b.reserved, b.available) == (3600.0, 2_000_000, 10_000_000)
    assert a.flops == a.tokens * flops_per_token(plan.model, 256)
    assert a.estimated_seconds == pytest.approx(a.flops / (2 * 60e9 * 0.2))
    assert a.estimated_units == pytest.approx(a.estimated_seconds / 3600 * 2.0 * 1e6, abs=1)
    assert a.estimated_memory_per_rank_bytes == memory_per_rank(
        plan.model, plan.training, Layout(tp=2), rounds=True
    )
    assert plan.totals == {
        "core-hour": {"estimated_units": a.estimated_units + b.estimated_units, "reserved": 3_000_000}
    }


def test_reasons_are_sentences_with_the_figures() -> None:
    plan = make_plan(spec(), SITES, PURSE)
    assert plan.reasons == (
        "2M tokens / (4096 tokens per step x 2 islands) is 244.1; rounded up to whole rounds of 20: "
        "260 steps, 2.13M tokens",
        "each round brings about 6.82 MiB from each island to the others: every parameter as int8g256",
    )
    assert plan.islands[0].reasons == (
        "TP2 on 2 ranks: 696 MiB of 4 GiB per rank (estimated)",
        "3.53e+13 FLOPs at 20% of 6e+10 FLOP/s per rank (assumed): 24min31s (estimated)",
        "1 core-hour are reserved for a segment: 30min at 2 core-hours per hour, the most it can burn",
    )


def test_where_a_run_starts_from_is_in_the_plan_and_in_every_segment() -> None:
    digest = "ab12" * 16
    start = f"[start]\ncheckpoint = 'models/llama'\nsha256 = '{digest}'\n[rounds]"
    plan = make_plan(spec("[rounds]", start), SITES, PURSE)
    assert "every site starts from its models/llama, of manifest sha256 ab12ab12ab12..." in plan.reasons
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    for site in ("local-a", "local-b"):
        assert segment_for(again, "r-1", site, 0, "/scratch").start == Start("models/llama", digest)
    assert segment_for(make_plan(spec(), SITES, PURSE), "r-1", "local-a", 0, "/scratch").start is None


def test_a_long_run_tells_its_chain() -> None:
    island = make_plan(spec('"2M"', '"20M"'), SITES, PURSE).islands[0]
    assert island.estimated_seconds == pytest.approx(13914, abs=1)
    assert island.estimated_segments == math.ceil(island.estimated_seconds / (1800 - 60)) == 8
    assert island.reasons[-1] == (
        "a chain of 8 segments (estimated), each reserved before it is submitted; demo-a holds enough for 10"
    )


def test_one_island_without_rounds() -> None:
    text = TEXT[: TEXT.rindex("[[islands]]")].replace('[rounds]\ninner_steps = 20\ndeadline = "60s"\n', "")
    plan = make_plan(parse_run(text, "run.toml"), SITES, PURSE)
    assert (plan.rounds, plan.rounds_planned, plan.steps) == (None, 0, 489)
    assert plan.reasons == (
        "2M tokens / (4096 tokens per step) is 488.3; rounded up to whole steps: 489 steps, 2M tokens",
    )
    with_rounds = make_plan(spec(), SITES, PURSE).islands[0]
    assert plan.islands[0].estimated_memory_per_rank_bytes < with_rounds.estimated_memory_per_rank_bytes


def test_units_of_different_kinds_are_not_added_up() -> None:
    sites = SITES | {"local-b": Machine("local-b", unit="node-hour", per_rank_hour=0.25)}
    purse = Purse({"demo-a": balance("demo-a"), "demo-b": balance("demo-b", unit="node-hour")})
    totals = make_plan(spec(), sites, purse).totals
    assert {unit: total["reserved"] for unit, total in totals.items()} == {
        "core-hour": 1_000_000,
        "node-hour": 500_000,
    }


@pytest.mark.parametrize(
    ("site", "complaint"),
    [
        (Machine("local-b", max_ranks=1), "islands.local-b: PP2 needs 2 ranks; local-b has 1"),
        (
            Machine("local-b", max_time_limit_seconds=1800.0),
            "islands.local-b.time_limit is 1h; local-b allows 30min",
        ),
        (
            Machine("local-b", rank_memory_bytes=512 << 20),
            "islands.local-b: PP2 needs 768 MiB per rank (estimated); a rank of local-b has 512 MiB",
        ),
        (
            Machine("local-b", unit="node-hour"),
            "islands.local-b: allocation 'demo-b' holds core-hours, and local-b counts node-hours",
        ),
    ],
)
def test_what_the_site_cannot_do_is_refused(site: Machine, complaint: str) -> None:
    assert refusals(spec(), SITES | {"local-b": site}) == [complaint]


def test_unknown_names_are_answered_with_the_nearest() -> None:
    assert refusals(spec('"local-b"', '"locl-b"')) == [
        "islands.locl-b: unknown site 'locl-b': did you mean 'local-b'? Known: local-a, local-b"
    ]
    assert refusals(spec('"demo-b"', '"dmo-b"')) == [
        "islands.local-b: unknown allocation 'dmo-b': did you mean 'demo-b'? Known: demo-a, demo-b"
    ]


def test_every_obstacle_is_told_at_once() -> None:
    sites = {"local-b": Machine("local-b", max_ranks=1, rank_memory_bytes=1)}
    assert [line.split(":")[0] for line in refusals(spec(), sites)] == [
        "islands.local-a",
        *["islands.local-b"] * 2,
    ]


def test_an_allocation_that_cannot_pay_a_segment_is_refused_with_the_figures() -> None:
    purse = Purse(
        {"demo-a": balance("demo-a"), "demo-b": balance("demo-b", granted=4_000_000, settled=2_000_001)}
    )
    assert refusals(spec(), purse=purse) == [
        "islands.local-b: a segment may burn 2 core-hours; allocation 'demo-b' has 1.999999 core-hours "
        "available (granted 4, settled 2.000001, burning 0, committed 0)"
    ]
    enough = Purse(PURSE.balances | {"demo-b": balance("demo-b", granted=2_000_000)})
    assert make_plan(spec(), SITES, enough).islands[1].available == 2_000_000


def test_islands_that_share_an_allocation_must_both_be_paid() -> None:
    purse = Purse({"demo-a": balance("demo-a", granted=2_999_999)})
    assert refusals(spec('"demo-b"', '"demo-a"'), purse=purse) == [
        "islands.local-a and islands.local-b: a segment may burn 3 core-hours; allocation 'demo-a' has "
        "2.999999 core-hours available (granted 2.999999, settled 0, burning 0, committed 0)"
    ]


@given(
    minutes=st.integers(1, 10_000),
    per_rank_hour=st.floats(0.001, 100, allow_nan=False),
    ranks=st.sampled_from([1, 2, 4]),
)
def test_a_reservation_covers_the_time_limit_and_no_more(
    minutes: int, per_rank_hour: float, ranks: int
) -> None:
    sites = SITES | {"local-a": replace(Machine("local-a"), per_rank_hour=per_rank_hour)}
    purse = Purse(PURSE.balances | {"demo-a": balance("demo-a", granted=2**62)})
    run = parse_run(TEXT.replace('"30min"', f'"{minutes}min"').replace("tp = 2", f"tp = {ranks}"), "run.toml")
    worst = minutes / 60 * per_rank_hour * ranks * 1e6
    assert worst * (1 - 1e-12) <= make_plan(run, sites, purse).islands[0].reserved <= worst * (1 + 1e-12) + 1


@pytest.mark.parametrize(
    ("asked", "room", "nodes", "reasons"),
    [
        ("tp = 4", 4, 1, []),
        ("tp = 2\ndp = 2", 2, 2, ["2 nodes with 2 of the ranks each"]),
        (
            "tp = 2\nnodes = 2",
            4,
            2,
            [
                "2 nodes with 1 of the ranks each",
                "a tensor-parallel group lies on 2 nodes: every layer waits for their network",
            ],
        ),
    ],
)
def test_ranks_are_laid_on_nodes(asked: str, room: int, nodes: int, reasons: list[str]) -> None:
    sites = SITES | {"local-a": replace(Machine("local-a"), ranks_per_node=room)}
    island = make_plan(spec("tp = 2", asked), sites, PURSE).islands[0]
    assert island.nodes == nodes
    assert [reason for reason in island.reasons if "nodes" in reason] == reasons


@pytest.mark.parametrize(
    ("asked", "room", "why"),
    [
        ("tp = 2\ndp = 4", 1, "islands.local-a: nodes = 8: too many"),
        (
            "tp = 2\nnodes = 3",
            4,
            "islands.local-a: nodes = 3: 2 ranks in groups of tp = 2, at most 4 on a node, lie evenly on "
            "1, 2",
        ),
    ],
)
def test_nodes_that_cannot_be_had_are_refused(asked: str, room: int, why: str) -> None:
    sites = SITES | {"local-a": replace(Machine("local-a"), ranks_per_node=room)}
    assert refusals(spec("tp = 2", asked), sites) == [why]


def test_a_plan_survives_json() -> None:
    plan = make_plan(spec(), SITES, PURSE)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_what_is_no_plan_is_refused() -> None:
    raw = make_plan(spec(), SITES, PURSE).to_json()
    with pytest.raises(ValueError, match=r"^not a plan of this version of eurotrain: stepz: .*$"):
        Plan.from_json({**raw, "stepz": 1})
    with pytest.raises(ValueError, match=r"^not a plan of this version of eurotrain: islands: .*$"):
        Plan.from_json({key: value for key, value in raw.items() if key != "islands"})


def test_a_segment_is_the_same_for_ever() -> None:
    plan = Plan.from_json(json.loads(json.dumps(make_plan(spec(), SITES, PURSE).to_json())))
    segment = segment_for(plan, "demo-abc234", "local-b", 3, "/scratch")
    assert segment == segment_for(plan, "demo-abc234", "local-b", 3, "/scratch")
    assert segment.key == "demo-abc234.local-b.0003"
    assert (segment.island, segment.islands, segment.sequence) == (1, 2, 3)
    assert segment.layout == asdict(Layout(pp=2))
    assert Layout.from_mapping(segment.layout) == Layout(pp=2)
    assert segment.unit_cap == 2.0
    assert segment.units_per_hour * segment.time_limit_seconds / 3600 == segment.unit_cap
    assert segment.training == spec().segment_training()
    assert segment.rounds == spec().segment_rounds()
    assert Segment.from_json(segment.to_json()) == segment


def test_a_short_segment_still_has_time_to_train() -> None:
    island = make_plan(spec('"30min"', '"40s"'), SITES, PURSE).islands[0]
    assert island.drain_seconds == 10.0
    assert segment_for(make_plan(spec(), SITES, PURSE), "r", "local-a", 0, "/s").drain_seconds == 60.0


def test_with_the_real_catalogue_and_ledger(tmp_path: Path) -> None:
    sites = "".join(
        f'[{name}]\ncatalogue = "local"\nscratch = "{tmp_path}"\n' for name in ("local-a", "local-b")
    )
    (tmp_path / "sites.toml").write_text(sites)
    store = Store(tmp_path / "eurotrain.db")
    ledger = Ledger(store)
    for name in ("demo-a", "demo-b"):
        ledger.grant(name, 5_000_000, "core-hour", "2026")
    plan = make_plan(spec(), load_sites(tmp_path / "sites.toml"), ledger)
    assert [island.reserved for island in plan.islands] == [1_000_000, 2_000_000]
    ledger.reserve("demo-b", "another run", 3_000_001)
    with pytest.raises(
        ValueError, match=r"1.999999 core-hours available \(granted 5, settled 0, burning 0, committed 3"
    ):
        make_plan(spec(), load_sites(tmp_path / "sites.toml"), ledger)
    store.close()
