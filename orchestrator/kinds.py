"""Kinds of the controller's own events; those of the sites stand in clusters/events.py."""

RUN_CREATED = "run.created"  # plan
RUN_RESUMED = "run.resumed"  # holder
STOP_REQUESTED = "run.stop_requested"
RUN_ENDED = "run.ended"  # outcome: completed, stopped, failed; reason
# Before submission; reserved in micro-units; reason: why its times are not as planned.
SEGMENT_INTENDED = "segment.intended"  # site key sequence after reserved time_limit_seconds begin reason
SUBMISSION_HELD = "submission.held"  # site, reason: what the next segment waits for
SITE_LIMITS = "site.limits"  # site, limits: as clusters/slurm_limits.py tells, whenever they change
SEGMENT_RELEASED = "segment.released"  # site, key: it was never submitted, its reservation is free again
JOB_OBSERVED = "job.observed"  # site, key and what clusters.agent.jobs answers, whenever the state changes
SEGMENT_SETTLED = "segment.settled"  # site, key, amount (micro-units), evidence
NODES_EXCLUDED = "nodes.excluded"  # site, key, nodes: which its job keeps away from since then
NODE_TRUSTED = "node.trusted"  # site, node: an operator's word against the evidence
ISLAND_GIVEN_UP = "island.given_up"  # site, reason
# manifest (ClosedRound as JSON text), missing: sites closed without, drift: null or value (relative), tensor,
# sites; drift_exceeded
ROUND_CLOSED = "round.closed"
ROUND_DELIVERED = "round.delivered"  # number, site, bytes
UPDATE_COLLECTED = "update.collected"  # number, site, bytes, norm
UPDATE_REFUSED = "update.refused"  # number, site, reason: the round closes without it; discarded: for ever
FAULT_INJECTED = "fault.injected"  # what, and the proof that it landed
ALERT = "alert"  # text
