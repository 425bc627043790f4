"""Crafted pickles do nothing: not where they name what is forbidden, not by tricks with what is allowed."""

from __future__ import annotations

import builtins
import contextlib
import functools
import io
import operator
import os
import pickle
import resource
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints.interop.pickles import Record, read, record

Allowed = record("Allowed")
NAMES = {("torch", "Size"): Allowed, ("torch", "float32"): "float32"}


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.call = (function, arguments) if state is None else (function, arguments, state)

    def __reduce__(self) -> Any:
        return self.call


def attacks(canary: Path) -> dict[str, bytes]:
    touch = f"touch {canary}"
    program = f"__import__('os').system({touch!r})"
    nested = pickle.dumps(Call(os.system, touch))
    saved = io.BytesIO()
    torch.save(Call(os.system, touch), saved)
    calls = {
        "os.system": Call(os.system, touch),
        "builtins.eval": Call(builtins.eval, program),
        "builtins.exec": Call(builtins.exec, program),
        "builtins.open": Call(builtins.open, str(canary), "w"),
        "builtins.getattr": Call(getattr, Call(builtins.__import__, "os"), "system"),
        "builtins.__import__": Call(builtins.__import__, "os"),
        "subprocess": Call(subprocess.Popen, ["touch", str(canary)]),
        "functools.partial": Call(functools.partial, os.system, touch),
        "operator": Call(operator.methodcaller, "system", touch),
        "pickle.loads": Call(pickle.loads, nested),
        "torch.load": Call(torch.load, io.BytesIO(nested)),
        "nested in a storage": Call(torch.storage._load_from_bytes, saved.getvalue()),
        "a class of ours": Call(Path, str(canary)),
        "hidden in a table": {"a": [1, (2, {"b": Call(os.system, touch)})]},
        "as a key": {Call(os.system, touch): 1},
        "as a state": Call(torch.Size, [1], state={"x": Call(os.system, touch)}),
    }
    made = {
        f"{name}, protocol {protocol}": pickle.dumps(call, protocol)
        for name, call in calls.items()
        for protocol in (2, 4)
    }
    text = touch.encode()
    return made | {
        "protocol 0": b"cos\nsystem\n(S'" + text + b"'\ntR.",
        "INST": b"(S'" + text + b"'\nios\nsystem\n.",
        "OBJ": b"(cos\nsystem\nS'" + text + b"'\no.",
        "a dotted name": b"\x80\x04\x8c\x05torch\x8c\x10Size.__class__.x\x93.",
        "a dotted module": b"\x80\x04\x8c\x02os\x8c\x0bpath.system\x93.",
        "an extension": b"\x80\x02\x82\x01.",
        "a persistent id": b"\x80\x02K\x01Q.",
        "called twice": b"\x80\x02ctorch\nSize\n)R)R.",
        "a word called": b"\x80\x02ctorch\nfloat32\n)R.",
        "an attribute of a class": b"\x80\x02ctorch\nSize\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        "a state of a class": b"\x80\x02ctorch\nSize\n}X\x01\x00\x00\x00aK\x01sb.",
        "cut": b"\x80\x02ctorch\nSi",
        "nothing": b"",
        "no pickle": b"\xff" * 50,
        "a huge memo": b"\x80\x02Nr\xff\xff\xff\xff.",
        "a huge length": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7fabc.",
    }


def test_crafted_pickles_are_refused_and_do_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for name, data in attacks(canary).items():
        with pytest.raises(ValueError, match=r"^a pickle that [^\n]{1,250}$") as refusal:
            pytest.fail(f"{name} was read as {read(data, NAMES)!r}")
        assert refusal.value.__cause__ is None
        assert not canary.exists(), name


def test_the_attacks_would_work_on_others(tmp_path: Path) -> None:
    """Else it would prove nothing that they do nothing here."""
    canary = tmp_path / "canary"
    for name, data in attacks(canary).items():
        if name.startswith(("os.system", "builtins.eval", "pickle.loads", "nested", "INST", "OBJ", "hidden")):
            pickle.loads(data)
            assert canary.exists(), name
            canary.unlink()


def test_allowed_names_are_sealed_records(tmp_path: Path) -> None:
    state = {"size": (1, 2), "dtype": "x"}
    found = read(pickle.dumps(Call(torch.Size, [3, 4], state=state)), NAMES)
    assert type(found) is Allowed
    assert isinstance(found, Record)
    assert (found.arguments, found.state) == (([3, 4],), state)
    assert found.field("size") == (1, 2)
    with pytest.raises(ValueError, match="Allowed without name"):
        found.field("name")
    with pytest.raises(pickle.UnpicklingError):
        found.arguments = ()
    assert read(pickle.dumps(torch.float32), NAMES) == "float32"


def test_a_name_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a pickle that names (posix|os).system, which is not allowed"):
        read(pickle.dumps(Call(os.system, "true")), NAMES)


def test_memory_is_given_back() -> None:
    before = resource.getrlimit(resource.RLIMIT_DATA)
    read(pickle.dumps([1]), NAMES)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner) | st.tuples(inner, inner),
)


@given(plain, st.integers(3, 5))  # before 3, bytes were written as a call
def test_plain_values_are_read_as_they_are(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol), NAMES) == value


@given(st.binary(max_size=60))
def test_any_bytes_are_refused_or_read(data: bytes) -> None:
    with contextlib.suppress(ValueError):
        read(b"\x80\x04" + data + b".", NAMES)
