"""Carries out what decide.py chose. Each action can be cut off anywhere and taken again without harm."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from clusters.connection import Connection
from clusters.rounds import ClosedRound, Contribution
from clusters.segment import Segment
from clusters.site import Site
from clusters.submission import limits_question, submission
from orchestrator import choices, kinds, mover, readiness, rounds
from orchestrator.exclusion import to_exclude
from orchestrator.home import RunFolder
from orchestrator.ledger import Ledger, Overdraft
from orchestrator.plan import Plan
from orchestrator.segments import reservation, segment_for
from orchestrator.state import RunState
from orchestrator.store import Store

_ONCE = math.inf  # an action that this coordinator takes once; the next one may take it again
_AGAIN_SECONDS = 5.0  # after the site could not do what it was asked
_UNSTAGED_SECONDS = 60.0  # until a submission is tried again for which something was not there
_HELD_SECONDS = 120.0  # before sbatch is asked again whether there is room for one more job
_SUBMISSIONS = 3  # refusals by the site until the island is given up


@dataclass
class Actor:
    """What the coordinator does to the world: ledger, sites, log."""

    run: str
    store: Store
    ledger: Ledger
    folder: RunFolder
    sites: Mapping[str, Site]
    connections: Mapping[str, Connection]
    asked: dict[str, float] = field(default_factory=dict, init=False)  # when each site told its limits
    _refusals: dict[str, int] = field(default_factory=dict, init=False)
    _plan: Plan | None = field(default=None, init=False)

    @functools.singledispatchmethod
    def take(self, action: choices.Action, state: RunState) -> float:
        """Carry out an action; the seconds before it may be taken again. Raises Unreachable."""
        raise AssertionError(f"no way to {action} in {state.run}")

    @take.register
    def _intend(self, action: choices.Intend, state: RunState) -> float:
        """Reserve, log the key, submit: in this order (laws 1 and 3)."""
        segment = self._segment(state, action.site, action.sequence, action.time_limit)
        island = state.plan_of(action.site)
        reserved = reservation(segment.units_per_hour, segment.time_limit_seconds)
        try:
            self.ledger.reserve(island["allocation"], segment.key, reserved)
        except Overdraft as error:
            self.store.record(self.run, kinds.ISLAND_GIVEN_UP, site=action.site, reason=str(error))
            return _ONCE
        facts = {
            "site": action.site, "key": segment.key, "sequence": action.sequence, "after": action.after,
            "time_limit_seconds": action.time_limit, "begin": action.begin, "reason": action.reason,
        }  # fmt: skip
        self.store.record(self.run, kinds.SEGMENT_INTENDED, **facts, reserved=reserved)
        return self._send(segment, state, action.after, action.begin)

    @take.register
    def _submit(self, action: choices.Submit, state: RunState) -> float:
        known = state.segment(action.key)
        segment = self._segment(state, action.site, known.sequence, known.time_limit)
        return self._send(segment, state, known.after, known.begin)

    def _send(self, segment: Segment, state: RunState, after: str, begin: float) -> float:
        site, plan = self.sites[segment.site], state.plan_of(segment.site)
        away = to_exclude(state.islands[site.name], site.own.exclude, time.time()) if site.is_slurm else ()
        where = submission(site, plan["ranks"], plan["nodes"], after, away, begin)
        wants = readiness.needs(state.plan, segment.site, self.folder.spec)
        result = self._one(segment.site, {"op": "submit", "segment": segment.to_json(), **where, **wants})
        if result["ok"] and result.get("held"):
            self.store.record(self.run, kinds.SUBMISSION_HELD, site=segment.site, reason=result["held"])
            return _HELD_SECONDS
        if result["ok"]:
            job = {k: v for k, v in result.items() if k != "ok"}
            self.store.record(self.run, kinds.JOB_OBSERVED, site=segment.site, key=segment.key, **job)
            return _ONCE
        if result.get("unstaged"):
            text = f"{segment.site}: {result['error']}"
            if text not in state.alerts:  # the operator brings it again, and the run goes on
                self.store.record(self.run, kinds.ALERT, text=text)
            return _UNSTAGED_SECONDS
        count = self._refusals[segment.key] = self._refusals.get(segment.key, 0) + 1
        if count >= _SUBMISSIONS:
            reason = f"the site refused {segment.key} {count} times: {result['error']}"
            self.store.record(self.run, kinds.ISLAND_GIVEN_UP, site=segment.site, reason=reason)
        return 2.0**count

    @take.register
    def _hold(self, action: choices.Hold, state: RunState) -> float:  # noqa: ARG002
        self.store.record(self.run, kinds.SUBMISSION_HELD, site=action.site, reason=action.reason)
        return 0.0

    @take.register
    def _learn(self, action: choices.Learn, state: RunState) -> float:
        keys = [s.key for s in state.islands[action.site].segments if not s.over]
        self.learned(
            action.site, self._one(action.site, limits_question(self.sites[action.site], keys)), state
        )
        return 0.0

    def learned(self, site: str, result: dict[str, Any], state: RunState) -> None:
        """Log what a site allows, if it is news; one that cannot tell limits nothing."""
        self.asked[site] = time.monotonic()
        limits = result["limits"] if result["ok"] else {}
        if limits != state.islands[site].limits:
            self.store.record(self.run, kinds.SITE_LIMITS, site=site, limits=limits)

    @take.register
    def _settle(self, action: choices.Settle, state: RunState) -> float:
        """Book what the site's accounting says, rounded up to a micro-unit; law 3."""
        segment, island = state.segment(action.key), state.plan_of(action.site)
        job = segment.job
        used = max(0.0, job["ended"] - (job["started"] or job["ended"])) / 3600 * island["units_per_hour"]
        amount = math.ceil(used * 1e6)
        evidence = {k: job.get(k) for k in ("job_id", "submitted", "started", "ended", "outcome", "evidence")}
        self.ledger.settle(island["allocation"], action.key, amount, evidence)
        facts = {"site": action.site, "key": action.key, "amount": amount, "evidence": evidence}
        self.store.record(self.run, kinds.SEGMENT_SETTLED, **facts)
        return _ONCE

    @take.register
    def _release(self, action: choices.Release, state: RunState) -> float:
        self.ledger.release(state.plan_of(action.site)["allocation"], action.key)
        self.store.record(self.run, kinds.SEGMENT_RELEASED, site=action.site, key=action.key)
        return _ONCE

    @take.register
    def _drain(self, action: choices.Drain, state: RunState) -> float:  # noqa: ARG002
        return self._ask(action.site, {"op": "stop", "key": action.key})

    @take.register
    def _cancel(self, action: choices.Cancel, state: RunState) -> float:  # noqa: ARG002
        """Locally a job does not wait for long: it finds the marker when it starts."""
        if self.sites[action.site].is_slurm:
            return self._ask(action.site, {"op": "cancel", "keys": [action.key], "scheduler": "slurm"})
        return self._ask(action.site, {"op": "stop", "key": action.key})

    @take.register
    def _exclude(self, action: choices.Exclude, state: RunState) -> float:  # noqa: ARG002
        """Also after a submission that named them: it may have found the job of an earlier one."""
        facts = {"keys": [action.key], "nodes": list(action.nodes)}
        result = self._one(action.site, {"op": "exclude", "scheduler": "slurm", **facts})
        if not result["ok"] or not result["excluded"]:
            return _AGAIN_SECONDS
        told = {"site": action.site, "key": action.key, "nodes": facts["nodes"]}
        self.store.record(self.run, kinds.NODES_EXCLUDED, **told)
        return _ONCE

    @take.register
    def _give_up(self, action: choices.GiveUp, state: RunState) -> float:  # noqa: ARG002
        self.store.record(self.run, kinds.ISLAND_GIVEN_UP, site=action.site, reason=action.reason)
        return _ONCE

    # ---- rounds

    @take.register
    def _collect(self, action: choices.Collect, state: RunState) -> float:
        part = _contribution(state, action.number, action.site)
        folder = self.folder.update(action.number, action.site)
        named = state.closed[-1].reset_from if state.closed else ""
        place = {
            "run": self.run, "round": action.number, "base": state.base, "state": named == action.site,
        }  # fmt: skip
        facts: dict[str, Any] = {"number": action.number, "site": action.site}
        try:
            found = mover.collect(self.connections[action.site], part, place, folder)
        except mover.Refused as error:
            self.store.record(self.run, kinds.UPDATE_REFUSED, **facts, reason=str(error), discarded=False)
            return _ONCE
        reason = rounds.outlier(found.norm, state)
        if reason is None:
            self.store.record(self.run, kinds.UPDATE_COLLECTED, **facts, bytes=found.bytes, norm=found.norm)
        else:
            reason = f"{action.site}: {reason}"
            self.store.record(self.run, kinds.UPDATE_REFUSED, **facts, reason=reason, discarded=True)
        return _ONCE

    @take.register
    def _close(self, action: choices.Close, state: RunState) -> float:
        """Log the round before any island hears of it: what is logged can never be closed otherwise."""
        parts = tuple(_contribution(state, action.number, site) for site in sorted(action.sites))
        folders = {site: self.folder.update(action.number, site) for site in action.sites}
        drift = rounds.drift({site: mover.sketch(folder) for site, folder in folders.items()})
        discarded = tuple(site for number, site in state.discarded if number == action.number)
        reset_from = rounds.reset_from(state, action.sites, drift)
        closed = ClosedRound(self.run, action.number, state.base, parts, discarded, reset_from)
        facts = {
            "manifest": closed.to_json(),
            "missing": list(action.missing),
            "drift": asdict(drift) if drift else None,
            "drift_exceeded": rounds.exceeds(drift, state),
        }
        self.store.record(self.run, kinds.ROUND_CLOSED, **facts)
        return _ONCE

    @take.register
    def _deliver(self, action: choices.Deliver, state: RunState) -> float:
        closed = state.closed[action.number - 1]
        folders = {c.site: self.folder.update(closed.number, c.site) for c in closed.contributions}
        note = self.folder.update(closed.number, "closed.json")
        carried = mover.deliver(self.connections[action.site], closed, action.site, folders, note)
        facts = {"number": closed.number, "site": action.site, "bytes": carried}
        self.store.record(self.run, kinds.ROUND_DELIVERED, **facts)
        return _ONCE

    @take.register
    def _end(self, action: choices.End, state: RunState) -> float:  # noqa: ARG002
        self.store.record(self.run, kinds.RUN_ENDED, outcome=action.outcome, reason=action.reason)
        return _ONCE

    # ---- helpers

    def _segment(self, state: RunState, site: str, sequence: int, time_limit: float) -> Segment:
        if self._plan is None:
            self._plan = Plan.from_json(state.plan)
        return segment_for(self._plan, self.run, site, sequence, str(self.sites[site].scratch), time_limit)

    def _ask(self, site: str, operation: dict[str, Any]) -> float:
        """Ask for something that may be asked again; when."""
        return _ONCE if self._one(site, operation)["ok"] else _AGAIN_SECONDS

    def _one(self, site: str, operation: dict[str, Any]) -> dict[str, Any]:
        return self.connections[site].exchange([operation])[0]


def _contribution(state: RunState, number: int, site: str) -> Contribution:
    told = state.islands[site].contributions[number]
    return Contribution(site, told["tokens"], told["sha256"])
