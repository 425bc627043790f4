"""Facts: their values, their sources, and what is said of a table that is not right."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date, timedelta
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.facts import (
    Fact,
    Reader,
    Source,
    check_known,
    facts_of,
    format_slurm_time,
    merged,
    parse_slurm_time,
    read_sources,
)

GUIDE = Source("guide", "https://example.org", "official", date(2026, 11, 21), "2026-01")
READER = Reader("m.toml", {"guide": GUIDE, "note": Source("note", "x", "third party", date(2026, 11, 22))})


@dataclass(frozen=True)
class Part:
    size: Fact[int] | None = None
    word: Fact[str] | None = None
    notes: tuple[Fact[str], ...] = ()


@dataclass(frozen=True)
class Whole:
    name: Fact[str]
    share: Fact[Decimal] | None = None
    limit: Fact[timedelta] | None = None
    ready: Fact[bool] | None = None
    ports: Fact[tuple[int, ...]] | None = None
    part: Part | None = None
    parts: dict[str, Part] | None = None


def whole(**told: Any) -> Whole:
    return READER.group(Whole, {"source": "guide", "name": "n", **told}, "whole")


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=99)))
def test_slurm_times_read_back(span: timedelta) -> None:
    span -= timedelta(microseconds=span.microseconds)
    assert parse_slurm_time(format_slurm_time(span)) == span


@pytest.mark.parametrize("text", ["30min", "1:2:3", "00:60:00", "1-", "", "01:00:00 "])
def test_other_times_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time as Slurm writes it"):
        parse_slurm_time(text)


def test_a_source_holds_for_the_tables_inside() -> None:
    group = whole(part={"size": 1, "word": {"value": "w", "source": "note"}}, parts={"a": {"size": 2}})
    assert group.part is not None
    assert group.part.size == Fact(1, GUIDE)
    assert group.part.word is not None
    assert group.part.word.source.key == "note"
    assert group.parts is not None
    assert group.parts["a"].size == Fact(2, GUIDE)
    nearer = whole(part={"source": "note", "size": 1})
    assert nearer.part is not None
    assert nearer.part.size is not None
    assert nearer.part.size.source.key == "note"


def test_values_are_what_json_can_hold() -> None:
    group = whole(
        share=Decimal("0.1"), limit="2-00:00:00", ready=False, ports=[22, 443], part={"notes": ["a"]}
    )
    told = {path: fact.plain for path, fact in facts_of(group)}
    wanted = {"name": "n", "share": 0.1, "limit": "2-00:00:00", "ready": False, "ports": [22, 443]}
    assert json.loads(json.dumps(told)) == {**wanted, "part.notes": "a"}
    assert group.share is not None
    assert group.share.value * 10 == 1  # a float's tenth would do as well, but three of them would not
    assert whole(share=3).share == Fact(Decimal(3), GUIDE)


def test_every_fact_is_found_in_order_by_its_name() -> None:
    group = whole(
        parts={"b": {"size": 1}, "a": {"notes": ["x", {"value": "y", "source": "note"}]}}, ready=True
    )
    names = [path for path, _ in facts_of(group, "top")]
    assert names == ["top.name", "top.ready", "top.parts.b.size", "top.parts.a.notes", "top.parts.a.notes"]


def test_conflicts_and_notes_stay_with_the_fact() -> None:
    fact = whole(share={"value": 2, "note": "about", "conflict": ["3", "4"]}).share
    assert fact == Fact(Decimal(2), GUIDE, "seen", "about", ("3", "4"))


def test_a_group_that_tells_more_is_merged_over_one_that_tells_less() -> None:
    base, own = Part(Fact(1, GUIDE), Fact("w", GUIDE)), Part(size=Fact(0, GUIDE))
    assert merged(base, own) == Part(Fact(0, GUIDE), Fact("w", GUIDE))
    assert merged(base, None) is base


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"shar": 1}, "[whole]: unknown 'shar'; did you mean 'share'? known: name, share, limit"),
        ({"part": {"sise": 1}}, "[whole.part]: unknown 'sise'; did you mean 'size'?"),
        ({"parts": {"a": {"sise": 1}}}, "[whole.parts.a]: unknown 'sise'; did you mean 'size'?"),
        ({"share": {"valeu": 1}}, "whole.share: unknown 'valeu'; did you mean 'value'?"),
        ({"share": {"source": "guide"}}, "whole.share lacks a value"),
        (
            {"share": {"value": 1, "source": "giude"}},
            "whole.share source: unknown 'giude'; did you mean 'guide'?",
        ),
        (
            {"share": {"value": 1, "status": "memory"}},
            "whole.share status: unknown 'memory'; known: seen, derived",
        ),
        ({"share": {"value": 1, "status": "derived"}}, "whole.share is derived: its note must say from what"),
        ({"share": {"value": 1, "note": 3}}, "whole.share note is 3; it must be a text"),
        ({"share": {"value": 1, "conflict": "2"}}, "whole.share conflict is '2'; it must be a list of texts"),
        ({"share": -1}, "whole.share is -1; it must be a number, 0 or more"),
        ({"share": float("nan")}, "whole.share is nan; it must be a number, 0 or more"),
        ({"share": True}, "whole.share is True; it must be a number, 0 or more"),
        ({"part": {"size": 1.5}}, "whole.part.size is 1.5; it must be a whole number, 0 or more"),
        ({"part": {"size": True}}, "whole.part.size is True; it must be a whole number"),
        ({"part": {"word": " "}}, "whole.part.word is ' '; it must be a text"),
        ({"part": {"notes": "a"}}, "whole.part.notes must be a list"),
        ({"part": 1}, "whole.part must be a table such as [whole.part]"),
        ({"parts": [1]}, "whole.parts must be a table such as [whole.parts]"),
        ({"limit": "2 days"}, "whole.limit is '2 days'; it must be a time as Slurm writes it, such as"),
        ({"ready": "yes"}, "whole.ready is 'yes'; it must be true or false"),
        ({"ports": [22, "http"]}, "whole.ports is [22, 'http']; it must be a list of whole numbers"),
    ],
)
def test_a_mistake_is_named(told: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=r"m\.toml: ") as caught:
        whole(**told)
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_fact_without_a_source_is_refused() -> None:
    with pytest.raises(ValueError, match=r"m.toml: p\.size has no source, and no table around it names one"):
        READER.group(Part, {"size": 1}, "p")
    with pytest.raises(ValueError, match=r"m.toml: \[w\] lacks name"):
        READER.group(Whole, {"source": "guide"}, "w")


def test_sources_have_dates() -> None:
    told = {
        "a": {"at": "x", "date": "2024", "kind": "third party"},
        "b": {"at": "y", "read": date(2026, 1, 2)},
    }
    sources = read_sources("m.toml", told, date(2026, 11, 21))
    assert sources["a"] == Source("a", "x", "third party", date(2026, 11, 21), "2024")
    assert sources["b"] == Source("b", "y", "official", date(2026, 1, 2))


@pytest.mark.parametrize(
    ("told", "read", "why"),
    [
        ({"a": "x"}, date(2026, 1, 1), r"\[sources\] a must be a table"),
        ({"a": {"att": "x"}}, date(2026, 1, 1), "unknown 'att'; did you mean 'at'"),
        ({"a": {"date": "2024"}}, date(2026, 1, 1), "lacks at, the address"),
        ({"a": {"at": "x", "kind": "offical"}}, date(2026, 1, 1), "did you mean 'official'"),
        ({"a": {"at": "x"}}, None, "read must be a date"),
        ({"a": {"at": "x", "read": "yesterday"}}, date(2026, 1, 1), "read must be a date"),
    ],
)
def test_a_source_that_says_too_little(told: dict[str, Any], read: date | None, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read_sources("m.toml", told, read)


def test_an_unknown_word_without_a_near_one() -> None:
    with pytest.raises(ValueError, match=r"^here: unknown 'zzz'; known: none$"):
        check_known("here", "zzz", [])
