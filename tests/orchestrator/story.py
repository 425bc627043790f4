"""A run told event by event, for tests: the plan of two small islands, and one example of every event."""

from __future__ import annotations

import functools
import io
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from clusters import events as site_kinds
from clusters.rounds import ClosedRound, Contribution
from clusters.site import Site, load_sites
from orchestrator import kinds
from orchestrator.fold import fold
from orchestrator.ledger import Ledger
from orchestrator.plan import make_plan
from orchestrator.spec import parse_run
from orchestrator.state import RunState
from orchestrator.store import Event, Store

RUN = "trial-abc234"
A, B = "local-a", "local-b"
CREATED = 1_000_000.0  # seconds since 1970
INNER_STEPS = 10
STEPS = 40
DEADLINE = 120.0  # seconds
BATCH_TOKENS = 4 * 32  # of a step of one island

RUN_TOML = f"""
name = "trial"
[model]
layers = 2
hidden_size = 64
ffn_hidden_size = 128
attention_heads = 4
query_groups = 2
vocabulary_size = 512
[data]
prefixes = ["data/text"]
[training]
tokens = {2 * STEPS * BATCH_TOKENS}
sequence_length = 32
global_batch = 4
micro_batch = 2
learning_rate = 1e-3
[checkpoint]
every_steps = 5
[rounds]
inner_steps = {INNER_STEPS}
deadline = "{DEADLINE:.0f}s"
[[islands]]
site = "{A}"
allocation = "demo-a"
time_limit = "30min"
tp = 2
[[islands]]
site = "{B}"
allocation = "demo-b"
time_limit = "30min"
pp = 2
"""
SITES_TOML = "".join(f'[{s}]\ncatalogue = "local"\nscratch = "/tmp/{s}"\naccount = "acc"\n' for s in (A, B))

# Every event of clusters/events.py and orchestrator/kinds.py with exactly the facts documented there.
FACTS: dict[str, dict[str, Any]] = {
    kinds.RUN_RESUMED: {"holder": "host/boot/1/2"},
    kinds.STOP_REQUESTED: {},
    kinds.RUN_ENDED: {"outcome": "completed", "reason": "all islands trained all their steps"},
    kinds.SEGMENT_INTENDED: {"site": A, "key": f"{RUN}.{A}.0000", "sequence": 0, "reserved": 1_000_000,
                             "after": "", "time_limit_seconds": 0.0, "begin": 0.0, "reason": ""},
    kinds.SUBMISSION_HELD: {"site": A, "reason": "full"},
    kinds.SITE_LIMITS: {"site": A, "limits": {"closed": ""}},
    kinds.SEGMENT_RELEASED: {"site": A, "key": f"{RUN}.{A}.0000"},
    kinds.JOB_OBSERVED: {"site": A, "key": f"{RUN}.{A}.0000", "state": "running", "job_id": "71",
                         "submitted": CREATED, "started": CREATED + 1, "heartbeat_age": 0.2},
    kinds.SEGMENT_SETTLED: {"site": A, "key": f"{RUN}.{A}.0000", "amount": 250_000, "evidence": {}},
    kinds.NODES_EXCLUDED: {"site": A, "key": f"{RUN}.{A}.0000", "nodes": ["n1"]},
    kinds.NODE_TRUSTED: {"site": A, "node": "n1"},
    kinds.ISLAND_GIVEN_UP: {"site": A, "reason": "too bad"},
    kinds.ROUND_DELIVERED: {"number": 1, "site": A, "bytes": 700},
    kinds.UPDATE_COLLECTED: {"number": 1, "site": A, "bytes": 500, "norm": 2.0},
    kinds.UPDATE_REFUSED: {"number": 1, "site": A, "reason": "damaged", "discarded": False},
    kinds.FAULT_INJECTED: {"what": "rank 1 killed", "proof": "signal 9"},
    kinds.ALERT: {"text": "beware"},
    site_kinds.SEGMENT_CLAIMED: {"incarnation": {"job": "71"}, "host": "n1", "pid": 70},
    site_kinds.RUNTIME_READY: {"seconds": 6.25},
    site_kinds.RANKS_STARTED: {"generation": 0, "pids": [81, 82], "hosts": ["n1", "n1"]},
    site_kinds.RANK_DIED: {"generation": 0, "rank": 1, "pid": 82, "exit_code": None, "signal": 9},
    site_kinds.NODE_LOST: {"host": "n1", "reason": "no heartbeat"},
    site_kinds.SEGMENT_DRAINING: {"reason": "time limit"},
    site_kinds.SEGMENT_ENDED: {"outcome": "completed", "reason": "", "units": 0.25},
    site_kinds.TRAINING_READY: {"generation": 0, "step": 0, "checkpoint": None, "parameters": 123,
                                "seconds": 1.5},
    site_kinds.STEP: {"step": 1, "loss": 6.5, "grad_norm": 1.25, "learning_rate": 1e-3,
                      "tokens": BATCH_TOKENS, "seconds": 0.5},
    site_kinds.CHECKPOINT_SAVED: {"step": 5, "path": "/x/step-00000005.0001", "bytes": 2_500_000,
                                  "seconds": 0.1, "stall_seconds": 0.01},
    site_kinds.CHECKPOINT_FAILED: {"step": 10, "path": "/x/step-00000010.0001",
                                   "reason": "writer 1: No space left on device"},
    site_kinds.CHECKPOINT_DAMAGED: {"path": "/x/step-00000005.0001", "reason": "crc32c"},
    site_kinds.ROUND_CONTRIBUTED: {"round": 1, "step": 10, "tokens": 1280, "sha256": "ab" * 32, "bytes": 9},
    site_kinds.ROUND_APPLIED: {"round": 1, "step": 10, "update_norm": 0.125, "included": True,
                               "waited_seconds": 2.0},
    site_kinds.ROUND_OPEN: {"round": 1, "step": 10, "waited_seconds": 120.0},
    site_kinds.TRAINING_ENDED: {"outcome": "completed", "step": STEPS},
}  # fmt: skip


@functools.cache
def sites() -> dict[str, Site]:
    """The operator's sites by name."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sites.toml"
        path.write_text(SITES_TOML)
        return load_sites(path)


@functools.cache
def plan() -> dict[str, Any]:
    """The plan that `eurotrain launch` would log."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder) / "eurotrain.db")
        ledger = Ledger(store)
        for allocation in ("demo-a", "demo-b"):
            ledger.grant(allocation, 100_000_000, "core-hour", "first")
        made = make_plan(parse_run(RUN_TOML, "run.toml"), sites(), ledger).to_json()
        store.close()
    return made


def key(site: str, sequence: int = 0) -> str:
    return f"{RUN}.{site}.{sequence:04d}"


class Story:
    """Events in the order they became known. Every one comes a second after the one before."""

    def __init__(self, **changes: Any) -> None:
        """`changes` to the plan, such as rounds=None."""
        self.events: list[Event] = []
        self.clock = CREATED - 1.0
        self.add(kinds.RUN_CREATED, plan={**plan(), **changes})

    @property
    def state(self) -> RunState:
        return fold(RUN, self.events)

    def add(
        self, kind: str, *, at: str = "", segment: int = 0, time: float | None = None, **facts: Any
    ) -> Event:
        """An event with the facts of the example above but these; `at` a site and of its segment."""
        self.clock += 1.0
        number = len(self.events) + 1
        event = Event(
            id=number,
            run=RUN,
            site=at,
            segment=key(at, segment) if at else "",
            stream="ranks" if at else "controller",
            offset=number,
            time=self.clock if time is None else time,
            received=self.clock,
            kind=kind,
            facts={**FACTS.get(kind, {}), **facts},
        )
        self.events.append(event)
        return event

    # ---- what the controller logs

    def intend(self, *sites: str, sequence: int = 0) -> Story:
        for site in sites:
            self.add(kinds.SEGMENT_INTENDED, site=site, key=key(site, sequence), sequence=sequence)
        return self

    def job(self, site: str, state: str, sequence: int = 0, **facts: Any) -> Story:
        job = {"job_id": f"7{sequence}", "started": self.clock if state != "pending" else 0.0}
        if state == "ended":
            job |= {"ended": self.clock + 36.0, "outcome": "completed", "exit_code": 0}
        self.add(kinds.JOB_OBSERVED, site=site, key=key(site, sequence), **{**job, **facts, "state": state})
        return self

    def settle(self, site: str, sequence: int = 0, amount: int = 250_000) -> Story:
        self.add(kinds.SEGMENT_SETTLED, site=site, key=key(site, sequence), amount=amount)
        return self

    def collect(self, *sites: str, number: int = 1, **facts: Any) -> Story:
        for site in sites:
            self.add(kinds.UPDATE_COLLECTED, number=number, site=site, **facts)
        return self

    def close(
        self,
        *sites: str,
        missing: tuple[str, ...] = (),
        reset_from: str = "",
        drift: dict[str, Any] | None = None,
        exceeded: bool = False,
    ) -> Story:
        state = self.state
        number = len(state.closed) + 1
        told = {site: state.islands[site].contributions[number] for site in sites}
        parts = tuple(Contribution(site, told[site]["tokens"], told[site]["sha256"]) for site in sorted(told))
        closed = ClosedRound(RUN, number, state.base, parts, reset_from=reset_from)
        told_of_drift = {"drift": drift, "drift_exceeded": exceeded}
        self.add(kinds.ROUND_CLOSED, manifest=closed.to_json(), missing=list(missing), **told_of_drift)
        return self

    # ---- what sites tell

    def start(self, *sites: str, sequence: int = 0) -> Story:
        """Segments from their intention to ranks that train."""
        for site in sites:
            self.intend(site, sequence=sequence).job(site, "pending", sequence).job(site, "running", sequence)
            for kind in (site_kinds.SEGMENT_CLAIMED, site_kinds.RUNTIME_READY, site_kinds.RANKS_STARTED):
                self.add(kind, at=site, segment=sequence)
            self.add(site_kinds.TRAINING_READY, at=site, segment=sequence)
        return self

    def train(self, site: str, first: int, last: int, sequence: int = 0, **facts: Any) -> Story:
        for step in range(first, last + 1):
            self.add(
                site_kinds.STEP, at=site, segment=sequence, **{"loss": 7 - step / 10, **facts, "step": step}
            )
        return self

    def contribute(self, *sites: str, number: int = 1, sequence: int = 0, **facts: Any) -> Story:
        for site in sites:
            self.add(site_kinds.ROUND_CONTRIBUTED, at=site, segment=sequence, **{"round": number, **facts})
        return self

    def end(self, site: str, sequence: int = 0, outcome: str = "completed") -> Story:
        """A segment's last events, its accounting not yet."""
        self.add(site_kinds.TRAINING_ENDED, at=site, segment=sequence, outcome=outcome)
        self.add(site_kinds.SEGMENT_ENDED, at=site, segment=sequence, outcome=outcome)
        return self.job(site, "ended", sequence, outcome=outcome)


def tell(store: Store, story: Story) -> None:
    """Put a story into the log: the controller's own events, and what sites told."""
    for event in story.events:
        if event.site:
            known = store.cursors(event.site, event.segment).get(event.stream, 0)
            line = {**event.facts, "time": event.time, "kind": event.kind, "offset": known}
            streams = {event.stream: {"lines": [line], "offset": known + 1}}
            store.ingest(RUN, event.site, event.segment, streams)
        else:
            store.record(RUN, event.kind, **event.facts)


def drawn(table: Any, width: int = 120) -> str:
    """What a table looks like on a terminal of so many columns."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()
