"""What a segment's Ray finds on a node: a directory, a token and a configuration of its own."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clusters.guard import RUNTIME
from clusters.runtimes import make_runtime

OBJECT_STORE = 80 << 20  # bytes: nothing goes through it, and Ray accepts no less than 75 MiB

# CPU time of its idle processes with two slots, per minute: 2.1 s without
# these, 1.2 s with them and without the three processes that orchestrator.slots ends.
RAY_SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_memory_monitor_refresh_ms": "0",  # it would kill slots, but it is ranks that hold the memory
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray hides the GPUs from slots that reserve none
    # by default a lost node counts as alive for 14 s, and gets new slots meanwhile
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}


def configure_ray(directory: Path, token: str) -> None:
    """To be called before ray is imported. What the user's environment says to other Rays is forgotten.

    Whoever has the token can drive the segment's Ray. It lies in one file of each node, which its user alone
    can read, and is never on a command line, in an environment, or on a shared file system.
    """
    for name in [name for name in os.environ if name.startswith("RAY_")]:
        del os.environ[name]
    path = directory / "token"
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as stream:
        stream.write(token)
    os.environ.update(RAY_SETTINGS, RAY_AUTH_TOKEN_PATH=str(path))


@contextmanager
def runtime_directory() -> Iterator[Path]:
    """The guard's, which removes it; without a guard one of our own."""
    if RUNTIME in os.environ:
        yield Path(os.environ[RUNTIME])
        return
    own = make_runtime()
    try:
        yield own
    finally:
        shutil.rmtree(own, ignore_errors=True)
