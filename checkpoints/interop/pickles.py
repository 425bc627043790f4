"""Reads a pickle without running any of it: every class in it becomes a record of ours that does nothing.

A pickle is a program that names functions and calls them. Here a name is looked up in a list of exact names;
what it finds there is never the real thing but a sealed record that keeps what it was given, or a word. So
even an allowed name calls nothing, and a name that is not allowed ends the reading.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable, Mapping
from typing import Any, cast

from checkpoints.interop.sandbox import memory_limit

Names = Mapping[tuple[str, str], Any]

_MEMORY = 1 << 30  # bytes beside 64 for each byte of the pickle; an index of its memo could ask for 64 GiB


class _Sealed(type):
    """Classes whose attributes a pickle cannot set."""

    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"sets {name[:60]} of a class")


class Record(metaclass=_Sealed):
    """What stood for an object: the arguments it would have been made with, and its state."""

    __slots__ = ("arguments", "state")

    arguments: tuple[Any, ...]
    state: Any

    def __new__(cls, *arguments: Any) -> Record:
        self = super().__new__(cls)
        object.__setattr__(self, "arguments", arguments)
        object.__setattr__(self, "state", None)
        return self

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"sets {name[:60]} of an object")

    def __setstate__(self, state: Any) -> None:
        object.__setattr__(self, "state", state)

    def field(self, name: str) -> Any:
        """A value of its state. Raises ValueError when it has none of that name."""
        if not isinstance(self.state, dict) or name not in self.state:
            raise ValueError(f"{type(self).__name__} without {name}")
        return self.state[name]


def record(name: str) -> type[Record]:
    """A kind of record, told from others by its type."""
    return cast("type[Record]", _Sealed(name, (Record,), {"__slots__": ()}))


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: Names, persistent: Callable[[Any], Any] | None) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names
        self._persistent = persistent

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._names[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"names {module[:60]}.{name[:60]}, which is not allowed") from None

    def persistent_load(self, identity: Any) -> Any:
        if self._persistent is None:
            raise pickle.UnpicklingError("refers to something outside of it")
        return self._persistent(identity)


def read(data: bytes, names: Names, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What a pickle describes, of plain values and records. Raises ValueError, one line, for any other."""
    try:
        with memory_limit(_MEMORY + 64 * len(data)):
            return _Unpickler(data, names, persistent).load()
    except Exception as error:  # a crafted one can provoke any
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"a pickle that {reason}") from None
