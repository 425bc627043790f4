"""Node names as Slurm writes many of them: "cn[01-03,07],login1" are cn01, cn02, cn03, cn07 and login1.

Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import re
from typing import Iterator  # noqa: UP035 - Python 3.9 at the sites

MOST = 100_000  # nodes of one expression: twice what any machine has
_PARTS = re.compile(r"((?:[^,\[\]]+|\[[^\[\]]+\])+)(?:,|$)")
_RANGE = re.compile(r"(\d{1,10})(?:-(\d{1,10}))?")


def expand(text: str) -> list[str]:
    """The names, in their order. Raises ValueError where the text is no such expression."""
    names: list[str] = []
    at = 0
    while at < len(text):
        part = _PARTS.match(text, at)
        if part is None:
            raise ValueError(f"not a list of nodes: {text[:80]!r}")
        for name in _one(part[1], text):
            names.append(name)
            if len(names) > MOST:
                raise ValueError(f"more than {MOST} nodes: {text[:80]!r}")
        at = part.end()
    return names


def _one(part: str, text: str) -> Iterator[str]:
    """ "r[1-2]n[01-02]": every range with every other, the last one the fastest."""
    before, bracket, rest = part.partition("[")
    if not bracket:
        yield before
        return
    inside, _, after = rest.partition("]")
    for number in _numbers(inside, text):
        for tail in _one(after, text) if after else [""]:
            yield before + number + tail


def _numbers(inside: str, text: str) -> Iterator[str]:
    for word in inside.split(","):
        found = _RANGE.fullmatch(word)
        if found is None:
            raise ValueError(f"not a list of nodes: {text[:80]!r}")
        first, last = found[1], found[2] or found[1]
        for number in range(int(first), int(last) + 1):
            yield str(number).zfill(len(first))
