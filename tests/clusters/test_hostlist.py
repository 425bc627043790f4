"""Slurm's lists of nodes, written out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.hostlist import MOST, expand

names = st.from_regex(r"[a-z][a-z0-9.-]{0,6}", fullmatch=True)


@pytest.mark.parametrize(
    ("text", "nodes"),
    [
        ("", []),
        ("cn1", ["cn1"]),
        ("cn[1-3]", ["cn1", "cn2", "cn3"]),
        ("cn[08-11,13],login1", ["cn08", "cn09", "cn10", "cn11", "cn13", "login1"]),
        ("r[1-2]n[1-2]", ["r1n1", "r1n2", "r2n1", "r2n2"]),
        ("r[1,3]i0n2-opa", ["r1i0n2-opa", "r3i0n2-opa"]),
        ("nid[005001-005002].site", ["nid005001.site", "nid005002.site"]),
    ],
)
def test_as_scontrol_show_hostnames_writes_them(text: str, nodes: list[str]) -> None:
    assert expand(text) == nodes


@given(st.lists(names, max_size=5))
def test_a_plain_list_is_itself(nodes: list[str]) -> None:
    assert expand(",".join(nodes)) == nodes


@given(names, st.lists(st.tuples(st.integers(0, 999), st.integers(0, 30)), min_size=1, max_size=4))
def test_ranges_keep_their_width(name: str, ranges: list[tuple[int, int]]) -> None:
    text = ",".join(f"{first:04d}-{first + more:04d}" for first, more in ranges)
    assert expand(f"{name}[{text}]") == [
        f"{name}{number:04d}" for first, more in ranges for number in range(first, first + more + 1)
    ]


@given(st.text("a1,[]-", max_size=12))
def test_any_text_is_a_list_or_refused(text: str) -> None:
    try:
        assert len(expand(text)) <= MOST
    except ValueError as error:
        assert "nodes" in str(error)  # noqa: PT017 - either outcome is right


@pytest.mark.parametrize(
    "text", ["cn[1-3", "cn1]", "cn[]", "cn[a-b]", "cn[[1]]", "cn[1-]", "[", "cn[0-9999999]"]
)
def test_what_is_no_list_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="nodes"):
        expand(text)
