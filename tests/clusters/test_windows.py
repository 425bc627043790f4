"""Windows in which nothing runs, as an operator writes them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clusters.windows import Window, parse_window

moments = st.datetimes(datetime(2000, 1, 1), datetime(2100, 1, 1)).map(lambda d: d.replace(microsecond=0))


def test_both_ways_of_writing_an_offset() -> None:
    window = parse_window("2026-12-01T08:00+01:00/2026-12-01T17:30Z")
    assert window == Window(1796108400.0, 1796146200.0, "maintenance")
    assert not window.by_slurm


@given(moments, st.integers(1, 10**7), st.integers(-12, 14))
def test_what_is_written_is_read(start: datetime, seconds: int, offset: int) -> None:
    first = start.replace(tzinfo=timezone(timedelta(hours=offset)))
    last = (first + timedelta(seconds=seconds)).astimezone(UTC)
    window = parse_window(f"{first.isoformat()}/{last.isoformat()}")
    assert (window.start, window.end) == (first.timestamp(), last.timestamp())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("2026-12-01T08:00+01:00", "has no /"),
        ("2026-12-01T08:00/2026-12-01T18:00", "has no offset such as"),
        ("2026-12-01T08:00Z/2026-12-01T08:00Z", "ends before it begins"),
        ("tomorrow/2026-12-01T08:00Z", "Invalid isoformat string: 'tomorrow'"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        parse_window(text)


def test_what_an_agent_tells_is_slurms_own() -> None:
    assert Window.from_json({"start": 1, "end": 2, "name": "m"}) == Window(1.0, 2.0, "m", by_slurm=True)
