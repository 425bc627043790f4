"""The event log: nothing lost, nothing doubled, one coordinator, whatever is killed when."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clusters.events import EventWriter, read_events
from orchestrator.database import StoreError
from orchestrator.store import CONTROLLER, Event, Store

FORK = multiprocessing.get_context("fork")


def line(offset: int, kind: str = "step", time: float = 1.0, **facts: Any) -> dict[str, Any]:
    return {"offset": offset, "kind": kind, "time": time, **facts}


def said(lines: Sequence[Mapping[str, Any]], offset: int) -> dict[str, Any]:
    return {"lines": lines, "offset": offset}


def in_processes(functions: Sequence[Callable[[], None]]) -> None:
    """Run each in a process of its own, all released at once; fail if one of them does."""
    gate = FORK.Barrier(len(functions))

    def enter(function: Callable[[], None]) -> None:
        gate.wait()
        function()

    started = [FORK.Process(target=enter, args=(function,)) for function in functions]
    for process in started:
        process.start()
    for process in started:
        process.join(60)
    assert [process.exitcode for process in started] == [0] * len(started)


# ---- events


def test_the_controllers_own_events(store: Store) -> None:
    before = time.time()
    first = store.record("r", "run.created", run="facts may have any name", kind=1, site="s")
    second = store.record("r", "run.ended")
    other = store.record("q", "run.created")
    assert [(e.run, e.stream, e.offset, e.site, e.segment) for e in (first, second, other)] == [
        ("r", CONTROLLER, 0, "", ""), ("r", CONTROLLER, 1, "", ""), ("q", CONTROLLER, 0, "", ""),
    ]  # fmt: skip
    assert first.facts == {"run": "facts may have any name", "kind": 1, "site": "s"}
    assert abs(first.time - before) < 5
    assert first.time == first.received
    assert store.events("r") == [first, second]
    assert store.runs() == ["r", "q"]


def test_events_after_an_id_and_of_some_kinds(store: Store) -> None:
    made = [store.record("r", kind) for kind in ("a", "b", "a", "c")]
    assert store.events("r", after=made[1].id) == made[2:]
    assert store.events("r", kinds=["a", "c"]) == [made[0], made[2], made[3]]
    assert store.events("r", after=made[0].id, kinds={"a"}) == [made[2]]
    assert store.events("nobody") == []


def test_a_batch_is_taken_once(store: Store) -> None:
    batch = {"ranks": said([line(0, loss=2.0), line(10, loss=math.nan), line(25)], 40)}
    new = store.ingest("r", "s", "key", batch)
    assert [(e.offset, e.kind, e.site, e.segment, e.stream) for e in new] == [
        (offset, "step", "s", "key", "ranks") for offset in (0, 10, 25)
    ]
    assert math.isnan(new[1].facts["loss"])
    assert store.ingest("r", "s", "key", batch) == []
    assert store.cursors("s", "key") == {"ranks": 40}
    stored = store.events("r")
    assert math.isnan(stored[1].facts["loss"])
    assert [e.id for e in stored] == [e.id for e in new]
    assert stored[0] == new[0]


def test_an_overlapping_batch_adds_its_end(store: Store) -> None:
    store.ingest("r", "s", "key", {"ranks": said([line(0), line(10)], 20)})
    new = store.ingest("r", "s", "key", {"ranks": said([line(10), line(20), line(30)], 40)})
    assert [e.offset for e in new] == [20, 30]
    late = store.ingest("r", "s", "key", {"ranks": said([line(0)], 10)})
    assert late == []
    assert store.cursors("s", "key") == {"ranks": 40}


def test_streams_segments_and_sites_are_apart(store: Store) -> None:
    for run, site, segment in (("r", "a", "k1"), ("r", "a", "k2"), ("r", "b", "k1"), ("q", "c", "k1")):
        assert len(store.ingest(run, site, segment, {"ranks": said([line(0)], 10)})) == 1
    assert store.cursors("a", "k1") == {"ranks": 10}
    assert store.cursors("a", "k3") == {}
    assert len(store.events("r")) == 3


def test_a_hole_is_refused_and_nothing_is_kept(store: Store) -> None:
    store.ingest("r", "s", "key", {"ranks": said([line(0)], 10)})
    batch = {"supervisor": said([line(0)], 10), "ranks": said([line(30)], 40)}
    with pytest.raises(ValueError, match="ranks: nothing is known of bytes 10 to 30; ask again"):
        store.ingest("r", "s", "key", batch)
    assert store.cursors("s", "key") == {"ranks": 10}
    assert len(store.events("r")) == 1


def test_lines_out_of_order_are_refused(store: Store) -> None:
    with pytest.raises(ValueError, match="ranks: lines after byte 0 are out of order"):
        store.ingest("r", "s", "key", {"ranks": said([line(0), line(20), line(10)], 30)})


def test_streams_are_merged_by_the_sites_clock(store: Store) -> None:
    ranks = [line(0, "a", 1.0), line(10, "b", 3.0), line(20, "c", 2.0), line(30, "d", 5.0)]
    supervisor = [line(0, "x", 2.5), line(10, "y", 4.0)]
    new = store.ingest("r", "s", "key", {"ranks": said(ranks, 40), "supervisor": said(supervisor, 20)})
    # c was written after b, whatever its clock said
    assert "".join(e.kind for e in new) == "axbcyd"
    assert [e.kind for e in store.events("r")] == [e.kind for e in new]


@pytest.mark.parametrize(
    "strange",
    [
        {"kind": "No Kind", "time": 1.0},
        {"kind": "\ud800", "time": 1.0},
        {"kind": "nul\x00", "time": 1.0},
        {"kind": "x" * 65, "time": 1.0},
        {"kind": "step", "time": "yesterday"},
        {"kind": "step", "time": math.nan},
        {"kind": "step", "time": 10**400},
        {"kind": "step", "time": -1},
        {"kind": "step"},
    ],
)
def test_a_strange_line_is_kept_as_garbled_and_stops_nothing(store: Store, strange: dict[str, Any]) -> None:
    lines = [line(0), {"offset": 10, "note": "\ud800\x00", **strange}, line(20)]
    store.ingest("r", "s", "key", {"ranks": said(lines, 30)})
    kinds = [e.kind for e in store.events("r")]
    assert kinds.count("garbled") == 1
    assert len(kinds) == 3
    garbled = store.events("r", kinds=["garbled"])[0]
    assert garbled.time == 0.0
    assert garbled.facts["text"].startswith('{"kind": ')


def test_facts_of_any_shape_come_back(store: Store) -> None:
    facts = {"text": "\ud800 \x00 ü €", "list": [1, [2.5, None]], "nested": {"a": {"b": True}}, "big": 2**70}
    store.record("r", "k", **facts)
    assert store.events("r")[0].facts == facts


def test_what_a_segment_writes_arrives(store: Store, tmp_path: Path) -> None:
    """With the contract's own writer and reader, in small reads, as a site's agent does it."""
    writer = EventWriter(tmp_path / "ranks.jsonl")
    for step in range(100):
        writer.emit("step", step=step, loss=1 / (step + 1))
    while True:
        at = store.cursors("s", "key").get("ranks", 0)
        lines, offset = read_events(tmp_path / "ranks.jsonl", at, limit=700)
        if not store.ingest("r", "s", "key", {"ranks": said(lines, offset)}):
            break
    assert [e.facts for e in store.events("r")] == [{"step": s, "loss": 1 / (s + 1)} for s in range(100)]


@settings(max_examples=15, deadline=None)
@given(data=st.data(), sizes=st.lists(st.integers(1, 50), min_size=1, max_size=25))
def test_any_repetition_and_overlap_gives_each_line_once(
    data: st.DataObject, sizes: list[int], tmp_path_factory: pytest.TempPathFactory
) -> None:
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    lines = [line(offset, n=n) for n, offset in enumerate(offsets)]
    store = Store(tmp_path_factory.mktemp("any") / "x.db")
    new: list[Event] = []
    known = 0  # lines that are in
    for _ in range(data.draw(st.integers(1, 8))):
        start = data.draw(st.integers(0, known))
        end = data.draw(st.integers(start, len(lines)))
        offset = offsets[end] if end < len(lines) else sum(sizes)
        new += store.ingest("r", "s", "key", {"ranks": said(lines[start:end], offset)})
        known = max(known, end)
        assert [e.facts["n"] for e in store.events("r")] == list(range(known)) == [e.facts["n"] for e in new]
    store.close()


# ---- killed


def _ingest_all(location: str, path: Path, telling: int) -> None:
    """A controller that takes in a stream by small reads, and tells when it is inside an ingest."""
    store = Store(location)
    while True:
        lines, offset = read_events(path, store.cursors("s", "key").get("ranks", 0), limit=2000)
        if not lines:
            return
        os.write(telling, b"(")
        store.ingest("r", "s", "key", {"ranks": said(lines, offset)})
        os.write(telling, b")")


def _killed_inside(process: BaseProcess, told: int, ingests: int, after: float) -> bool:
    """SIGKILL a process some time after it entered so many ingests; whether it was inside one."""
    trace = b""
    while trace.count(b"(") < ingests and (more := os.read(told, 1)):
        trace += more
    time.sleep(after)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    while more := os.read(told, 4096):  # the pipe ends with the process
        trace += more
    return process.exitcode == -signal.SIGKILL and trace.count(b"(") > trace.count(b")")


def test_kill_minus_9_during_ingest_loses_and_doubles_nothing(location: str, tmp_path: Path) -> None:
    path = tmp_path / "ranks.jsonl"
    path.write_text("".join(json.dumps({"kind": "step", "time": 1.0, "n": n}) + "\n" for n in range(4000)))
    Store(location).close()
    chance = random.Random(1)
    landed, half_way = 0, 0
    for _ in range(12):
        told, telling = os.pipe()
        process = FORK.Process(target=_ingest_all, args=(location, path, telling))
        process.start()
        os.close(telling)
        landed += _killed_inside(process, told, chance.randint(1, 9), chance.uniform(0, 0.008))
        os.close(told)
        store = Store(location)
        known = [e.facts["n"] for e in store.events("r")]
        assert known == list(range(len(known)))
        half_way += 0 < len(known) < 4000
        store.close()
    assert landed >= 3, "the kills missed: the test shows nothing"
    assert half_way >= 3
    told, telling = os.pipe()
    _ingest_all(location, path, telling)
    store = Store(location)
    assert [e.facts["n"] for e in store.events("r")] == list(range(4000))
    assert store.cursors("s", "key") == {"ranks": path.stat().st_size}
    store.close()
    os.close(told)
    os.close(telling)


# ---- several processes


def test_a_new_database_opened_by_many_at_once(location: str) -> None:
    def open_and_record() -> None:
        store = Store(location)
        store.record("r", "here", pid=os.getpid())
        store.close()

    in_processes([open_and_record] * 6)
    store = Store(location)
    assert len({e.facts["pid"] for e in store.events("r")}) == 6
    assert [e.offset for e in store.events("r")] == list(range(6))
    store.close()


def test_a_reader_that_follows_misses_nothing(location: str) -> None:
    """Ids become visible in their order, although several processes write at once."""

    def write() -> None:
        store = Store(location)
        for n in range(40):
            store.record("r", "n", writer=os.getpid(), n=n)
        store.close()

    def follow() -> None:
        store, seen, last = Store(location), [], 0
        deadline = time.monotonic() + 50
        while len(seen) < 120 and time.monotonic() < deadline:
            for event in store.events("r", after=last):
                seen.append((event.facts["writer"], event.facts["n"]))
                last = event.id
        assert len(set(seen)) == len(seen) == 120

    Store(location).close()
    in_processes([write, write, write, follow])


def test_two_controllers_that_ingest_the_same_lines(location: str) -> None:
    batches = [said([line(i * 100 + j * 10) for j in range(10)], (i + 1) * 100) for i in range(20)]

    def ingest() -> None:
        store = Store(location)
        for batch in batches:
            store.ingest("r", "s", "key", {"ranks": batch})
        store.close()

    Store(location).close()
    in_processes([ingest, ingest, ingest])
    store = Store(location)
    assert [e.offset for e in store.events("r")] == [n * 10 for n in range(200)]
    store.close()


# ---- the lease


def test_one_holder_at_a_time(store: Store) -> None:
    assert store.holder("r") is None
    assert store.acquire("r", "a", 60)
    assert store.acquire("r", "a", 60)  # again: the same process
    assert not store.acquire("r", "b", 60)
    assert store.acquire("q", "b", 60)  # another run
    assert store.holder("r") == "a"
    store.release("r", "b")  # not b's to give
    assert store.holder("r") == "a"
    assert store.renew("r", "a", 60)
    assert not store.renew("r", "b", 60)
    store.release("r", "a")
    assert store.holder("r") is None
    assert not store.renew("r", "a", 60)
    assert store.acquire("r", "b", 60)


def test_a_lease_ends_by_the_databases_clock(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)  # a laptop whose clock is wrong
    assert store.acquire("r", "a", 0.15)
    assert not store.acquire("r", "b", 60)
    time.sleep(0.2)
    assert store.holder("r") is None
    assert store.renew("r", "a", 0.15)  # late, and nobody has taken over
    time.sleep(0.2)
    assert store.acquire("r", "b", 60)
    assert not store.renew("r", "a", 60)
    assert store.holder("r") == "b"


def test_processes_that_race_for_a_lease(location: str) -> None:
    Store(location).close()

    def race() -> None:
        store = Store(location)
        for n in range(15):
            if store.acquire(f"run-{n}", str(os.getpid()), 60):
                store.record(f"run-{n}", "won")
        store.close()

    in_processes([race] * 5)
    store = Store(location)
    assert [len(store.events(f"run-{n}")) for n in range(15)] == [1] * 15
    store.close()


def test_processes_that_race_for_an_expired_lease(location: str) -> None:
    store = Store(location)
    for n in range(15):
        store.acquire(f"run-{n}", "dead", 0.0)
    store.close()

    def race() -> None:
        mine = Store(location)
        for n in range(15):
            if mine.acquire(f"run-{n}", str(os.getpid()), 60):
                mine.record(f"run-{n}", "won")
        mine.close()

    in_processes([race] * 5)
    store = Store(location)
    assert [len(store.events(f"run-{n}")) for n in range(15)] == [1] * 15
    store.close()


def test_a_store_error_is_no_value_error() -> None:
    """Bad input ends with exit code 2, a database that cannot work with 1."""
    assert not issubclass(StoreError, ValueError)
