"""One short-lived command at a site: many operations in, many answers out, nothing left running.

    python -P -m clusters.agent < request.json > answer.json

A request is `{"protocol": 1, "scratch": "...", "operations": [{"op": "jobs", "keys": [...]}, ...]}`; the
answer has one result per operation, in order, `{"ok": true, ...}` or `{"ok": false, "error": "one line"}`.
An operation that fails does not stop the next. Standard library only (submitit for a submission), and
Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Callable  # noqa: UP035 - Python 3.9 at the sites

from clusters import local
from clusters.events import URGENT, read_events
from clusters.paths import SegmentPaths, SitePaths, write_atomically
from clusters.segment import Segment

PROTOCOL = 1
_TICK_SECONDS = 0.1
_LOG_BYTES = 256 << 10


def submit(site: SitePaths, segment: str, python: str = sys.executable) -> dict[str, Any]:
    """Submit a segment, once; answers what `jobs` would."""
    parsed = Segment.from_json(segment)
    paths = site.segment(parsed.key)
    if paths.segment.exists() and paths.segment.read_text() != segment:
        raise ValueError(f"segment {parsed.key} is here already, with other contents")
    write_atomically(paths.segment, segment)
    return local.submit(parsed, paths, python)


def jobs(site: SitePaths, keys: list[str]) -> dict[str, Any]:
    """What became of each key, and the age of its heartbeat in seconds (None without one)."""
    return {"jobs": {key: {**local.look_up(site.segment(key)), **_heartbeat(site, key)} for key in keys}}


def _heartbeat(site: SitePaths, key: str) -> dict[str, float | None]:
    try:
        return {"heartbeat_age": round(time.time() - site.segment(key).heartbeat.stat().st_mtime, 3)}
    except FileNotFoundError:
        return {"heartbeat_age": None}


def events(site: SitePaths, since: dict[str, dict[str, int]]) -> dict[str, Any]:
    """Events of each key's streams after the given byte offsets."""
    return {"events": {key: _streams(site.segment(key), offsets) for key, offsets in since.items()}}


def _streams(paths: SegmentPaths, offsets: dict[str, int]) -> dict[str, Any]:
    streams = {}
    for path in sorted(paths.events.glob("*.jsonl")):
        lines, offset = read_events(path, offsets.get(path.stem, 0))
        if lines:
            streams[path.stem] = {"lines": lines, "offset": offset}
    return streams


def logs(site: SitePaths, since: dict[str, dict[str, int]]) -> dict[str, Any]:
    """What each key's log files hold after the given offsets, base64, at most 256 KiB a file."""
    return {"logs": {key: _log_files(site.segment(key).logs, sizes) for key, sizes in since.items()}}


def _log_files(folder: Path, offsets: dict[str, int]) -> dict[str, str]:
    found = {}
    for path in sorted(folder.glob("*.log")):
        with path.open("rb") as stream:
            stream.seek(offsets.get(path.name, 0))
            text = stream.read(_LOG_BYTES)
        if text:
            found[path.name] = base64.b64encode(text).decode()
    return found


def watch(site: SitePaths, since: dict[str, dict[str, int]], seconds: float) -> dict[str, Any]:
    """Wait until a key has something urgent to tell, or ended, but no longer than asked.

    Saves the controller of a local site from polling ten times a second; never used on login nodes.
    """
    deadline = time.monotonic() + seconds
    parent = os.getppid()
    seen = {key: dict(offsets) for key, offsets in since.items()}
    ended = {key for key in since if site.segment(key).exit.exists()}
    while time.monotonic() < deadline and os.getppid() == parent:
        if any(_news(site.segment(key), offsets) for key, offsets in seen.items()):
            break
        if any(site.segment(key).exit.exists() for key in since if key not in ended):
            break
        time.sleep(_TICK_SECONDS)
    return {}


def _news(paths: SegmentPaths, offsets: dict[str, int]) -> bool:
    found = False
    for name, stream in _streams(paths, offsets).items():
        offsets[name] = stream["offset"]
        found = found or any(event["kind"] in URGENT for event in stream["lines"])
    return found


def stop(site: SitePaths, key: str) -> dict[str, Any]:
    """Ask a segment to checkpoint and exit."""
    site.segment(key).stop.touch()
    return {}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function for function in (submit, jobs, events, logs, watch, stop)
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request. Raises ValueError when it is of another protocol."""
    if request.get("protocol") != PROTOCOL:
        raise ValueError(f"the agent speaks protocol {PROTOCOL}, the controller {request.get('protocol')}")
    site = SitePaths(Path(request["scratch"]))
    results = [_carry_out(site, dict(operation)) for operation in request["operations"]]
    return {"protocol": PROTOCOL, "time": time.time(), "results": results}


def _carry_out(site: SitePaths, operation: dict[str, Any]) -> dict[str, Any]:
    name = operation.pop("op", None)
    if name not in OPERATIONS:
        return {"ok": False, "error": f"unknown operation {name!r}; known: {', '.join(OPERATIONS)}"}
    try:
        return {"ok": True, **OPERATIONS[name](site, **operation)}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {"ok": False, "error": f"{name}: {str(error) or type(error).__name__}"}


def main() -> int:
    try:
        result = answer(json.loads(sys.stdin.read()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sys.stderr.write(f"eurotrain agent: bad request: {error}\n")
        return 2
    json.dump(result, sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
