"""Quantities: what people may write, what they may not, and that writing back loses nothing that shows."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.units import (
    MICRO,
    format_bytes,
    format_count,
    format_duration,
    format_units,
    micro_units,
    parse_bytes,
    parse_count,
    parse_duration,
)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("2M", 2_000_000),
        ("1.5k", 1500),
        ("15T", 15 * 10**12),
        ("0.1B", 100_000_000),
        (" 2_000 K ", 2_000_000),
        ("1e9", 10**9),
        (2e6, 2_000_000),
        (7, 7),
        (2**60 + 1, 2**60 + 1),  # beyond what a float holds
    ],
)
def test_counts(written: object, meant: int) -> None:
    assert parse_count(written) == meant


@pytest.mark.parametrize(
    ("written", "seconds"),
    [
        ("30min", 1800.0),
        ("1.5h", 5400.0),
        ("1h30min", 5400.0),
        ("1d 2h", 93600.0),
        ("250ms", 0.25),
        ("60 s", 60.0),
    ],
)
def test_durations(written: str, seconds: float) -> None:
    assert parse_duration(written) == seconds


def test_a_tenth_of_an_hour_is_exactly_360_seconds() -> None:
    assert parse_duration("0.1h") == 360.0
    assert parse_duration("1.1h") == 3960.0  # in floats 1.1 * 3600 is 3960.0000000000005


@pytest.mark.parametrize(
    ("written", "size"),
    [("8GiB", 8 << 30), ("1.5kB", 1500), ("512 B", 512), ("2TB", 2 * 10**12), ("0.5KiB", 512)],
)
def test_sizes(written: str, size: int) -> None:
    assert parse_bytes(written) == size


@pytest.mark.parametrize(
    ("parse", "written", "complaint"),
    [
        (parse_count, "2m", "unknown unit 'm'; units: none, k, K, M, B, T"),
        (parse_count, "0.0001k", "not a whole number"),
        (parse_count, 2.5, "2.5 is not a count"),
        (parse_count, "-2M", "is not a count such as"),
        (parse_count, -1, "-1 is not a count"),
        (parse_count, True, "True is not a count"),
        (parse_count, math.nan, "nan is not a count"),
        (parse_count, math.inf, "inf is not a count"),
        (parse_count, "9e99", "too large"),
        (parse_count, 10**400, "too large"),
        (parse_duration, 60, 'not a duration such as "30min"'),
        (parse_duration, "90", "no unit; units: ms, s, min, h, d"),
        (parse_duration, "1m", "unknown unit 'm'"),
        (parse_duration, "1h30", "not a duration"),
        (parse_duration, "1h and 3min", "not a duration"),
        (parse_duration, "", "not a duration"),
        (parse_bytes, "8", "no unit"),
        (parse_bytes, "8gib", "unknown unit 'gib'"),
        (parse_bytes, "0.3B", "not a whole number of bytes"),
        (parse_bytes, None, "not a size"),
    ],
)  # fmt: skip
def test_what_is_refused_is_refused_in_one_line(
    parse: Callable[[object], float], written: object, complaint: str
) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        parse(written)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


@given(st.text(max_size=20))
def test_any_text_is_read_or_refused(text: str) -> None:
    for parse in (parse_count, parse_duration, parse_bytes):
        try:
            assert parse(text) >= 0
        except ValueError:
            continue


@given(st.integers(0, 2**62))
def test_a_count_is_written_to_three_digits_and_read_back(count: int) -> None:
    back = parse_count(format_count(count))
    assert abs(back - count) <= (0 if count < 10_000 else 0.00501 * count)


@given(st.integers(0, 2**50))
def test_a_size_is_written_to_three_digits_and_read_back(size: int) -> None:
    number, unit = format_bytes(size).split()
    assert abs(float(Fraction(number) * parse_bytes(f"1{unit}")) - size) <= 0.00501 * size


@given(st.floats(0, 1e8, allow_subnormal=False))
def test_a_duration_is_written_to_two_units_and_read_back(seconds: float) -> None:
    smallest = 3600 if seconds >= 86400 else 60 if seconds >= 3600 else 1
    tolerance = smallest / 2 + 0.5 if seconds >= 59.95 else 0.00501 * seconds + 1e-6
    assert abs(parse_duration(format_duration(seconds)) - seconds) <= tolerance


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0, "0s"),
        (0.25, "250ms"),
        (12.5, "12.5s"),
        (59.96, "1min"),
        (3570, "59min30s"),
        (5400, "1h30min"),
        (9e4, "1d1h"),
    ],
)
def test_durations_as_shown(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown


@pytest.mark.parametrize(
    ("count", "shown"),
    [
        (8192, "8192"),
        (10_000, "10k"),
        (999_499, "999k"),
        (999_500, "1M"),
        (2_129_920, "2.13M"),
        (10**16, "10000T"),
    ],
)
def test_counts_as_shown(count: int, shown: str) -> None:
    assert format_count(count) == shown


def test_units_as_shown() -> None:
    assert format_units(12_345_600, "core-hour") == "12.35 core-hours"
    assert format_units(12_345_600, "core-hour", exact=True) == "12.3456 core-hours"
    assert format_units(1_000_000, "core-hour") == "1 core-hour"
    assert format_units(-500, "GPU-hour") == "-0.0005 GPU-hours"
    assert format_units(1_234_567_891_234, "GPU-hour", exact=True) == "1,234,567.891234 GPU-hours"


@given(st.integers(-(2**63), 2**63 - 1))
def test_units_shown_exactly_are_exact(micro: int) -> None:
    number = format_units(micro, "node-hour", exact=True).split()[0]
    assert Fraction(number.replace(",", "")) * MICRO == micro


def test_units_become_whole_millionths() -> None:
    assert micro_units("0.1") == 100_000
    assert micro_units(1 / 3) == 333_333
    assert micro_units(Fraction(2, 3)) == 666_667
    for nonsense in (math.nan, math.inf, "ten", "1/0"):
        with pytest.raises(ValueError, match="not a number of units"):
            micro_units(nonsense)
