"""Quantities as people write them: "2M" tokens, "30min", "8GiB", and units of an allocation.

Numbers are read exactly (as fractions), so "0.1h" is 360 s and not 359.99999999999994.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from fractions import Fraction
from itertools import pairwise

# The ledger counts millionths of an allocation's native unit, as integers: sums are exact in any order, where
# floats would drift, and 1e-6 core-hour (3.6 ms of a core) is finer than any site's accounting. A signed
# 64-bit column then holds 9.2e12 units, about 1000 times the yearly core-hours of all EuroHPC machines.
MICRO = 1_000_000

_COUNTS = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
_SECONDS = {
    "ms": Fraction(1, 1000), "s": Fraction(1), "min": Fraction(60), "h": Fraction(3600), "d": Fraction(86400),
}  # fmt: skip
_BYTES = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}

_NUMBER = r"\d[\d_]*(?:\.\d+)?(?:[eE]\+?\d{1,2})?"
_QUANTITY = re.compile(rf"\s*({_NUMBER})\s*([A-Za-z]*)\s*", re.ASCII)
_COMPOUND = re.compile(rf"(?:\s*{_NUMBER}\s*[A-Za-z]+\s*)+", re.ASCII)
_LARGEST = 2**63 - 1  # what the database's integers hold


def parse_count(value: object) -> int:
    """ "2M" -> 2_000_000; whole numbers, also as 2e6, pass through. Raises ValueError, one line."""
    text: object = value
    if isinstance(value, int) and not isinstance(value, bool):
        text = str(value)
    elif isinstance(value, float) and value.is_integer():
        text = str(int(value))
    total = _single(text, _COUNTS, 'a count such as "2M"', value)
    if total.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number")
    return _within(total, value)


def parse_duration(value: object) -> float:
    """ "1h30min" -> 5400.0 seconds; a unit is required. Raises ValueError, one line."""
    wanted = 'a duration such as "30min" or "1h30min"'
    if not isinstance(value, str) or not _COMPOUND.fullmatch(value):
        return float(_single(value, _SECONDS, wanted))
    parts = _QUANTITY.findall(value)
    return float(sum(_size(number, unit, _SECONDS, value, wanted) for number, unit in parts))


def parse_bytes(value: object) -> int:
    """ "8GiB" -> 8_589_934_592; a unit is required. Raises ValueError, one line."""
    total = _single(value, _BYTES | _BINARY, 'a size such as "8GiB"')
    if total.denominator != 1:
        raise ValueError(f"{value!r} is not a whole number of bytes")
    return _within(total, value)


def micro_units(units: float | str | Fraction) -> int:
    """Native units -> millionths, to the nearest. Raises ValueError for what is no finite number."""
    try:
        return round(Fraction(units) * MICRO)
    except (ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f"{units!r} is not a number of units") from None


def format_count(count: int) -> str:
    """2_000_000 -> "2M", 8192 -> "8192": three digits from 10,000 on."""
    return str(count) if count < 10_000 else _scaled(count, _COUNTS)


def format_bytes(size: int) -> str:
    """8_589_934_592 -> "8 GiB", to three digits."""
    return _scaled(size, _BINARY, " ")


def format_duration(seconds: float) -> str:
    """5400 -> "1h30min": the two largest units; under a minute to three digits ("12.5s", "250ms")."""
    if seconds < 59.95:
        if seconds < 1e-6:
            return "0s"
        return f"{_digits(seconds)}s" if seconds >= 1 else f"{_digits(seconds * 1000)}ms"
    total = round(seconds)
    pairs = (("d", "h"), ("h", "min"), ("min", "s"))
    unit, smaller = next(pair for pair in pairs if total >= _SECONDS[pair[0]])
    step = int(_SECONDS[smaller])
    whole, rest = divmod(round(total / step), int(_SECONDS[unit]) // step)
    return f"{whole}{unit}" + (f"{rest}{smaller}" if rest else "")


def format_units(micro: int, unit: str, *, exact: bool = False) -> str:
    """12_345_600 micro-units -> "12.35 core-hours", or "12.3456 core-hours" exactly; all digits below 1."""
    size = abs(micro)
    if not exact and size >= MICRO:
        size = (size + 5_000) // 10_000 * 10_000
    whole, rest = divmod(size, MICRO)
    text = f"{'-' if micro < 0 else ''}{whole:,}" + (f".{rest:06d}".rstrip("0") if rest else "")
    return f"{text} {unit}" + ("" if text == "1" else "s")


def _single(text: object, known: Mapping[str, Fraction | int], wanted: str, shown: object = None) -> Fraction:
    match = _QUANTITY.fullmatch(text) if isinstance(text, str) else None
    shown = text if shown is None else shown
    if not match:
        raise ValueError(f"{shown!r} is not {wanted}; units: {_names(known)}")
    return _size(match[1], match[2], known, shown, wanted)


def _size(
    number: str, unit: str, known: Mapping[str, Fraction | int], shown: object, wanted: str
) -> Fraction:
    if unit not in known:
        what = f"unknown unit {unit!r}" if unit else "no unit"
        raise ValueError(f"{shown!r} is not {wanted}: {what}; units: {_names(known)}")
    return Fraction(number.replace("_", "")) * known[unit]


def _names(known: Mapping[str, Fraction | int]) -> str:
    return ", ".join(name or "none" for name in known)


def _within(value: Fraction, shown: object) -> int:
    if value > _LARGEST:
        raise ValueError(f"{str(shown)[:40]!r} is too large; at most {_LARGEST}")
    return int(value)


def _scaled(value: int, units: Mapping[str, int], space: str = "") -> str:
    """Three digits and the largest unit that leaves at least 1, after rounding."""
    names = [name for name in units if name != "K"]
    for name, larger in pairwise(names):
        if round(value / units[name]) < units[larger] // units[name]:
            return f"{_digits(value / units[name])}{space}{name}"
    return f"{_digits(value / units[names[-1]])}{space}{names[-1]}"


def _digits(value: float) -> str:
    """Three significant digits, or all before the point; never an exponent."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.3g}"
