"""One run's coordinator: asks the sites, logs what they tell, decides, acts; until nothing is left to do.

Kill it at any moment: all it knows is in the event log, every action is logged before it is taken or can
be repeated without harm, and the next coordinator goes on from there (laws 1 and 2).
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from clusters.connection import Connection, Unreachable
from clusters.events import GARBLED
from clusters.site import Site
from clusters.submission import limits_question
from orchestrator import choices, decide, kinds
from orchestrator.actions import Actor
from orchestrator.admission import LIMITS_LAST_SECONDS, place_of
from orchestrator.exclusion import to_exclude
from orchestrator.fold import apply
from orchestrator.home import RunFolder
from orchestrator.lease import Lease
from orchestrator.ledger import Ledger
from orchestrator.poll import Answer, Poller, Question
from orchestrator.state import Event, RunState, waits_for
from orchestrator.store import Store
from orchestrator.summary import write_summary
from orchestrator.tensorboard import Curves

_TICK_SECONDS = 1.0  # how often requests of the operator are noticed
_RETRY_SECONDS = 2.0  # before an action that found its site unreachable is tried again

Listener = Callable[[Event, RunState], None]


@dataclass
class Campaign:
    """The coordinator of one run. `listener` hears every event, old ones first."""

    run: str
    store: Store
    ledger: Ledger
    folder: RunFolder
    sites: Mapping[str, Site]
    listener: Listener = lambda _event, _state: None
    state: RunState = field(init=False)
    _seen: int = field(default=0, init=False)
    _stop_requested: bool = field(default=False, init=False)
    _absent: dict[str, tuple[float, float]] = field(default_factory=dict, init=False)  # first, last denial
    _logs: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict, init=False)
    _not_before: dict[choices.Action, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        self.state = RunState(self.run)
        self._curves = Curves(self.folder.tensorboard)
        home = self.folder.root.parent.parent
        connections: dict[str, Connection] = {name: site.connect(home) for name, site in self.sites.items()}
        self._poller = Poller(connections, {name: site.poll_seconds for name, site in self.sites.items()})
        self._actor = Actor(self.run, self.store, self.ledger, self.folder, self.sites, connections)

    def request_stop(self) -> None:
        """Ask the islands to checkpoint and exit. Safe in a signal handler: the log is written later."""
        self._stop_requested = True

    def until_the_end(self, lease: Lease) -> RunState:
        """Coordinate until the run has an outcome. Raises LeaseLost when another coordinator took over."""
        try:
            self._catch_up()
            while self.state.outcome is None:
                lease.renew()
                self.turn()
        finally:
            self.close()
        write_summary(self.folder.summary, self.state)
        return self.state

    def turn(self) -> None:
        """Take the actions that are due; where there is none, hear what the sites tell, for a second."""
        if not self._seen:
            self._catch_up()
        self._heed_the_operator()
        if not self._act():
            self._listen()

    def close(self) -> None:
        self._poller.close()
        self._curves.close()

    def _heed_the_operator(self) -> None:
        if self._stop_requested and not self.state.stop_requested:
            self.store.record(self.run, kinds.STOP_REQUESTED)
            self._catch_up()

    # ---- the log

    def _catch_up(self) -> None:
        """Take in what the log has gained: by this coordinator, or by an operator's command."""
        for event in self.store.events(self.run, after=self._seen):
            self._seen = event.id
            apply(self.state, event)
            self._curves.add(event)
            self.listener(event, self.state)

    # ---- the sites

    def _listen(self) -> None:
        """Ask every site that has something to tell, and take in what comes back."""
        for site, facts in self.sites.items():
            if self._poller.may_ask(site) and (keys := self._open_keys(site)):
                self._poller.ask(site, self._question(facts, keys))
        for site, answer in self._poller.answers(_TICK_SECONDS).items():
            if isinstance(answer, Unreachable):
                self._alert(f"{site}: {answer}")
            else:
                self._take_in(site, answer)
        self._curves.flush()
        self._catch_up()

    def _question(self, site: Site, keys: list[str]) -> Question:
        return Question(
            streams=self.store.cursors_of(site.name, keys),
            logs={key: self._log_sizes(site.name, key) for key in keys},
            wait_seconds=site.watch_seconds,
            scheduler="slurm" if site.is_slurm else "local",
            limits=self._limits_question(site, keys),
        )

    def _take_in(self, site: str, answer: Answer) -> None:
        failed = [result["error"] for result in answer if not result["ok"]]
        if failed:
            self._alert(f"{site}: {failed[0]}")
            return
        _, jobs, events, logs, *limits = answer
        if limits:
            self._actor.learned(site, limits[0], self.state)
        for event in self.store.ingest_site(self.run, site, events["events"]):
            if event.kind == GARBLED:
                text = str(event.facts["text"])[:80]
                self._alert(f"{site}: {event.segment} wrote a line that is no event: {text!r}")
        for key, files in logs["logs"].items():
            self._keep_logs(site, key, files)
        unread = {key for key, found in (*events["events"].items(), *logs["logs"].items()) if found}
        for key, job in jobs["jobs"].items():
            self._observe(site, key, job, everything_read=key not in unread)

    def _observe(self, site: str, key: str, job: dict[str, Any], *, everything_read: bool) -> None:
        """Log a job's new state; its end only after an answer with nothing more of its events and logs."""
        if job["state"] == "absent":
            now = time.monotonic()
            self._absent[key] = (self._absent.get(key, (now, now))[0], now)
            return
        self._absent.pop(key, None)
        known = self.state.segment(key).job
        old = known["state"]
        if (job["state"] == old and waits_for(job) == waits_for(known)) or (
            job["state"] == "ended" and not everything_read
        ):
            return
        if job["state"] == "unknown" and old != "intended":
            return  # what was known stays until the site knows better (law 2)
        self.store.record(self.run, kinds.JOB_OBSERVED, site=site, key=key, **job)

    def _log_sizes(self, site: str, key: str) -> dict[str, int]:
        """What is here of each log; only this coordinator adds to it."""
        if (site, key) not in self._logs:
            found = self.folder.logs(site, key).glob("*.log")
            self._logs[site, key] = {path.name: path.stat().st_size for path in found}
        return self._logs[site, key]

    def _keep_logs(self, site: str, key: str, files: Mapping[str, str]) -> None:
        if not files:
            return
        folder, sizes = self.folder.logs(site, key), self._log_sizes(site, key)
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            with (folder / name).open("ab") as stream:
                stream.write(base64.b64decode(data))
                sizes[name] = stream.tell()

    # ---- decisions

    def _act(self) -> bool:
        """Take the actions that are due; False when there was nothing to do."""
        now = time.monotonic()
        facts = decide.Facts(
            now=time.time(),
            absent={key: last - first for key, (first, last) in self._absent.items()},
            lag={name: site.lag_seconds for name, site in self.sites.items()},
            ahead={name: site.ahead for name, site in self.sites.items()},
            places={name: place_of(site) for name, site in self.sites.items()},
            limits_age={name: now - when for name, when in self._actor.asked.items()},
            exclude={
                name: to_exclude(self.state.islands[name], site.own.exclude, time.time())
                for name, site in self.sites.items()
                if site.is_slurm
            },
        )
        due = [a for a in decide.decide(self.state, facts) if self._not_before.get(a, 0.0) <= now]
        for action in due:
            self._take(action)
            self._catch_up()
        return bool(due)

    def _take(self, action: choices.Action) -> None:
        try:
            again_after = self._actor.take(action, self.state)
        except Unreachable as error:
            again_after = _RETRY_SECONDS
            self._alert(f"{type(action).__name__.lower()} {getattr(action, 'site', '')}: {error}")
        if isinstance(action, choices.Submit):
            self._absent.pop(action.key, None)
        self._not_before[action] = time.monotonic() + again_after

    def _open_keys(self, site: str) -> list[str]:
        return [s.key for s in self.state.islands[site].segments if not s.over]

    def _limits_question(self, site: Site, keys: list[str]) -> dict[str, Any] | None:
        """Within an exchange that takes place anyway, now and then."""
        asked = self._actor.asked.get(site.name, -math.inf)
        if not site.is_slurm or time.monotonic() - asked < LIMITS_LAST_SECONDS:
            return None
        return limits_question(site, keys)

    def _alert(self, text: str) -> None:
        """Log a warning once; the same one again says nothing new."""
        if text not in self.state.alerts:
            self.store.record(self.run, kinds.ALERT, text=text)
