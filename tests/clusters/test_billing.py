"""Billing rules: exact, monotone, additive in time, and equal to the examples that the sites publish."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.billing import Resources, Rule, Slices, Weights, WholeNodes, make_rule
from clusters.machine import Catalogue

AMOUNTS = st.builds(Fraction, st.integers(0, 10**6), st.integers(1, 1000))
RATES = st.builds(Fraction, st.integers(1, 10**6), st.integers(1, 1000))
SOME = RATES | st.none()


@st.composite
def slices(draw: st.DrawFn) -> Slices:
    sizes = [draw(SOME), draw(SOME), draw(SOME)]
    if not any(sizes):
        sizes[0] = draw(RATES)
    return Slices(draw(RATES), *sizes, whole_slices=draw(st.booleans()))


RULES = st.builds(WholeNodes, RATES) | slices() | st.builds(Weights, RATES, RATES, RATES)
HELD = st.builds(Resources, st.integers(0, 5000), AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS)
MORE = st.tuples(st.integers(0, 10), AMOUNTS, AMOUNTS, AMOUNTS, AMOUNTS)


def plus(job: Resources, more: tuple[int, Fraction, Fraction, Fraction, Fraction]) -> Resources:
    nodes, *amounts = more
    names = ("gpus", "cores", "threads", "memory_gib")
    return Resources(job.nodes + nodes, *(job.of(n) + a for n, a in zip(names, amounts, strict=True)))


@given(RULES, HELD, MORE)
def test_more_of_anything_never_costs_less(
    rule: Rule, job: Resources, more: tuple[int, Fraction, Fraction, Fraction, Fraction]
) -> None:
    assert rule.per_hour(job) <= rule.per_hour(plus(job, more))


@given(RULES, HELD, AMOUNTS, AMOUNTS)
def test_a_chain_of_jobs_costs_what_one_long_job_does(
    rule: Rule, job: Resources, first: Fraction, second: Fraction
) -> None:
    assert rule.units(job, first) + rule.units(job, second) == rule.units(job, first + second)
    assert rule.units(job, first) <= rule.units(job, first + second)


@given(slices(), HELD)
def test_the_largest_share_is_billed_and_rounded_up_by_less_than_a_slice(
    rule: Slices, job: Resources
) -> None:
    sizes = {n: getattr(rule, f"{n}_per_slice") for n in ("gpus", "cores", "memory_gib")}
    largest = max(job.of(n) / s for n, s in sizes.items() if s)
    billed = rule.per_hour(job) / rule.per_slice_hour
    assert largest <= billed < largest + 1
    assert billed.denominator == 1 if rule.whole_slices else billed == largest


@given(HELD, st.integers(1, 20))
def test_weights_add_up(job: Resources, times: int) -> None:
    rule = Weights(Fraction(1), Fraction("0.035714286"), Fraction(1, 4))
    larger = Resources(
        job.nodes * times,
        job.gpus * times,
        *(job.of(n) * times for n in ("cores", "threads", "memory_gib")),
    )
    assert rule.per_hour(larger) == times * rule.per_hour(job)


def held(nodes: int, gpus: int, cores: int | None = None, memory: int | None = None) -> Resources:
    cpu = None if cores is None else Fraction(cores)
    return Resources(nodes, Fraction(gpus), cpu, None, None if memory is None else Fraction(memory))


# What the sites publish: where; machine, partition; resources of a job, its hours; its bill.
LUMI = "billing page of the LUMI user guide, 2024-10-15"
EXAMPLES = [
    (LUMI, "lumi standard-g", held(4, 32), 24, "384 GPU-hour"),
    (LUMI, "lumi small-g", held(1, 2, 2, 2), 24, "24 GPU-hour"),
    (LUMI, "lumi dev-g", held(1, 1, 1, 128), 24, "24 GPU-hour"),
    ("as before: 9 cores are two slices of 8", "lumi small-g", held(1, 1, 9, 1), 1, "1 GPU-hour"),
    ("an award at JUPITER: 3,500 node-h", "jupiter booster", held(3500, 14000), 1, "1008000 core-hour"),
    ("an AI Factory award", "leonardo boost_usr_prod", held(1250, 5000, 40000, 0), 1, "40000 core-hour"),
    ("IT4I: gpus * hours / 8", "karolina qgpu", held(1, 1), 1, "1/8 node-hour"),
    ("a user's bsc_acct: 20 per GPU-h", "marenostrum5 acc", held(1, 4), 1, "80 core-hour"),
    ("MACC: max(gpus, cpus / 32)", "deucalion normal-a100-40", held(1, 1, 64), 1, "2 GPU-hour"),
    ("CSCS: a GPU is billed as the node", "alps daint-normal", held(1, 1), 1, "1 node-hour"),
    ("LuxProvide: node-hours", "meluxina gpu", held(2, 8), 3, "6 node-hour"),
]


@pytest.mark.parametrize(("source", "where", "job", "hours", "bill"), EXAMPLES)
def test_what_the_sites_publish(source: str, where: str, job: Resources, hours: int, bill: str) -> None:
    machine, partition = where.split()
    units, unit = bill.split()
    charge = Catalogue().load(machine).charges(partition)[unit]
    assert charge.formula().units(job, Fraction(hours)) == Fraction(units), source


def test_an_award_of_two_budgets_at_discoverer_plus() -> None:
    """5,000 GPU-h came with 330,900 billing-h: 66.18 for a GPU with 26 threads and 257 GB."""
    charges = Catalogue().load("discoverer-plus").charges("common")
    job = Resources(1, Fraction(1), None, Fraction(26), Fraction(257))
    assert charges["GPU-hour"].formula().per_hour(job) == 1
    assert round(float(charges["billing-hour"].formula().per_hour(job)), 2) == 66.18 == 330_900 / 5_000


def test_a_rule_that_needs_what_is_not_known_says_so() -> None:
    with pytest.raises(ValueError, match="needs the cores of a node, which are not known"):
        Slices(Fraction(1), cores_per_slice=Fraction(8)).per_hour(Resources(1, Fraction(1)))
    with pytest.raises(ValueError, match="needs the memory of a node"):
        Weights(per_memory_gib_hour=Fraction(1)).per_hour(Resources(1, Fraction(1)))
    assert (
        Weights(per_gpu_hour=Fraction(2)).per_hour(Resources(1, Fraction(3))) == 6
    )  # the rest is not asked for


@pytest.mark.parametrize(
    ("name", "parameters", "why"),
    [
        ("node", {}, "here rule: unknown 'node'; did you mean 'nodes'? known: nodes, slices, weights"),
        ("nodes", {}, "here rule 'nodes' lacks per_node_hour"),
        ("nodes", {"per_node_hours": 1}, "unknown 'per_node_hours'; did you mean 'per_node_hour'?"),
        ("nodes", {"per_node_hour": 1, "per_gpu_hour": 1}, "here rule 'nodes': unknown 'per_gpu_hour'"),
        ("slices", {"per_slice_hour": 1}, "lacks the size of a slice"),
        ("slices", {"per_slice_hour": 1, "whole_slices": True}, "lacks the size of a slice"),
        ("slices", {"per_slice_hour": 1, "gpus_per_slice": 0}, "gpus_per_slice is 0; a slice holds more"),
    ],
)
def test_a_formula_that_makes_no_sense(name: str, parameters: dict[str, int], why: str) -> None:
    with pytest.raises(ValueError, match="here") as caught:
        make_rule("here", name, parameters)
    assert why in str(caught.value)
