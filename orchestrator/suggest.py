"""What to answer when somebody misspells a name."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known name that was probably meant."""
    return next(iter(difflib.get_close_matches(word, sorted(known), 1)), None)


def unknown(what: str, word: str, known: Iterable[str]) -> str:
    """ "unknown site 'locl-a': did you mean 'local-a'? Known: local-a, local-b" """
    names = sorted(known)
    near = nearest(word, names)
    hint = f": did you mean {near!r}? Known" if near else "; known"
    return f"unknown {what} {word!r}{hint}: {', '.join(names) or 'none'}"
