"""One short-lived command at a site: many operations in, many answers out, nothing left running.

    python -P -m clusters.agent < request.json > answer.json

A request is `{"protocol": 1, "scratch": "...", "operations": [{"op": "jobs", "keys": [...]}, ...]}`; the
answer has one result per operation, in order, `{"ok": true, ...}` or `{"ok": false, "error": "one line"}`.
An operation that fails does not stop the next. `"scheduler": "slurm"` in an operation means Slurm's jobs
rather than local ones; all operations of a request share one squeue and one sacct.

At a site the agent is a file (clusters/package.py), and its answer is framed: a login shell prints what it
likes before it, and a connection that breaks must not leave half an answer that looks whole.
Standard library only (submitit for a submission), and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable  # noqa: UP035 - Python 3.9 at the sites

from clusters import bundles, local, quota, slurm, slurm_limits, staging
from clusters.events import URGENT, read_events
from clusters.paths import SegmentPaths, SitePaths, sha256_of, sync_directory, write_atomically
from clusters.segment import Segment
from clusters.slurm_queue import Queue

PROTOCOL = 1
FRAME = "eurotrain-answer"
_TICK_SECONDS = 0.1
_LOG_BYTES = 256 << 10


@dataclass(frozen=True)
class Here(SitePaths):
    """The site's files, and its Slurm as this request sees it."""

    queue: Queue


def submit(
    site: Here,
    segment: str,
    python: str = sys.executable,
    scheduler: str = "local",
    request: dict[str, Any] | None = None,
    needs: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Submit a segment, once; answers what `jobs` would. `request`: fields of clusters.slurm.Request.

    Raises clusters.staging.NotStaged where something of its `needs` is not there (law 5).
    """
    parsed = Segment.from_json(segment)
    if needs:
        python = staging.staged(site, needs).get("python", python)
    paths = site.segment(parsed.key)
    if paths.segment.exists() and paths.segment.read_text() != segment:
        raise ValueError(f"segment {parsed.key} is here already, with other contents")
    write_atomically(paths.segment, segment)
    if _is_slurm(scheduler):
        return slurm.submit(parsed, paths, python, slurm.Request.from_json(request or {}), site.queue)
    return local.submit(parsed, paths, python)


def jobs(site: Here, keys: list[str], scheduler: str = "local") -> dict[str, Any]:
    """What became of each key, and the age of its heartbeat in seconds (None without one)."""
    look_up = site.queue.look_up if _is_slurm(scheduler) else lambda key: local.look_up(site.segment(key))
    return {"jobs": {key: {**look_up(key), **_heartbeat(site, key)} for key in keys}}


def limits(site: Here, account: str, partition: str, qos: str, keys: list[str]) -> dict[str, Any]:
    """What Slurm lets this operator's jobs do; `keys` are not counted: clusters/slurm_limits.py."""
    told = site.queue.ask(slurm_limits.commands(account))
    return {"limits": slurm_limits.read(told, account, partition, qos, keys)}


def cancel(site: Here, keys: list[str], scheduler: str) -> dict[str, Any]:
    """End jobs, waiting or running; answers their numbers."""
    if not _is_slurm(scheduler):
        raise ValueError("only Slurm's jobs can be cancelled; others are asked to stop")
    return {"cancelled": slurm.cancel(keys, site.queue)}


def exclude(site: Here, keys: list[str], nodes: list[str], scheduler: str) -> dict[str, Any]:
    """Keep waiting jobs away from these nodes and no others; answers their numbers."""
    if not _is_slurm(scheduler):
        raise ValueError("only Slurm's jobs have nodes to keep away from")
    return {"excluded": slurm.exclude(keys, nodes, site.queue)}


def _is_slurm(scheduler: str) -> bool:
    if scheduler not in ("local", "slurm"):
        raise ValueError(f"unknown scheduler {scheduler!r}; known: local, slurm")
    return scheduler == "slurm"


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
    while time.monotonic() < deadline and os.getppid() == parent:
        if any(_news(site.segment(key), offsets) for key, offsets in seen.items()):
            break
        if any(site.segment(key).exit.exists() for key in since):
            break  # also one that had ended before: then only its last words are to be read
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


def read(site: SitePaths, path: str, limit: int) -> dict[str, Any]:
    """Size and SHA-256 of a file under scratch; itself too, base64, if it is no longer than `limit`."""
    file = site.scratch / path
    size = file.stat().st_size
    content = {"content": base64.b64encode(file.read_bytes()).decode()} if size <= limit else {}
    return {"size": size, "sha256": sha256_of(file), **content}


def expect(site: SitePaths, part: str) -> dict[str, Any]:
    """Make room for a file that is about to be brought; the bytes that are there of an earlier attempt."""
    file = site.scratch / part
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    return {"size": file.stat().st_size}


def receive(
    site: SitePaths, target: str, sha256: str, part: str = "", content: str | None = None
) -> dict[str, Any]:
    """Put a file in its place, if it is whole: `content`, base64, or what was brought as `part`."""
    file = site.scratch / target
    source = site.scratch / part if content is None else file.with_name(f".{file.name}.{os.getpid()}.tmp")
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is not None:
        source.write_bytes(base64.b64decode(content))
    if sha256_of(source) != sha256:
        source.unlink()
        raise ValueError(f"{target} has arrived damaged; what came was thrown away")
    with source.open("rb+") as stream:
        os.fsync(stream.fileno())
    source.replace(file)
    sync_directory(file.parent)
    return {"size": file.stat().st_size}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    function.__name__: function
    for function in (
        *(submit, jobs, limits, cancel, exclude, events, logs, watch, stop, read, expect, receive),
        *(staging.take, staging.adopt, staging.doubt, staging.refresh, staging.staged),
        *(bundles.interpreter, bundles.register, bundles.bundle, bundles.make, bundles.renew, quota.room),
    )
}


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Carry out a request. Raises ValueError when it is of another protocol."""
    if request.get("protocol") != PROTOCOL:
        raise ValueError(f"the agent speaks protocol {PROTOCOL}, the controller {request.get('protocol')}")
    paths, operations = SitePaths(Path(request["scratch"])), request["operations"]
    site = Here(paths.scratch, Queue(paths, slurm_keys(operations)))
    results = [_carry_out(site, dict(operation)) for operation in operations]
    return {"protocol": PROTOCOL, "time": time.time(), "results": results}


def slurm_keys(operations: list[dict[str, Any]]) -> list[str]:
    """Every key that the operations ask Slurm about, so that it is asked once."""
    keys: list[Any] = []
    for operation in operations:
        if operation.get("scheduler") == "slurm":
            try:
                keys += _keys_of(operation)
            except (ValueError, KeyError, TypeError):
                continue  # the operation itself will say what is wrong with it
    return [key for key in dict.fromkeys(map(str, keys)) if key]


def _keys_of(operation: dict[str, Any]) -> list[Any]:
    if operation["op"] != "submit":
        return list(operation["keys"])
    after = (operation.get("request") or {}).get("after", ())
    return [json.loads(operation["segment"])["key"], *after]


def _carry_out(site: Here, operation: dict[str, Any]) -> dict[str, Any]:
    name = operation.pop("op", None)
    if name not in OPERATIONS:
        return {"ok": False, "error": f"unknown operation {name!r}; known: {', '.join(OPERATIONS)}"}
    try:
        return {"ok": True, **OPERATIONS[name](site, **operation)}
    except staging.NotStaged as error:
        return {"ok": False, "error": str(error), "unstaged": True}
    except (OSError, ValueError, TypeError, KeyError) as error:
        return {"ok": False, "error": f"{name}: {str(error) or type(error).__name__}"}


def main(framed: bool = False) -> int:
    """Answer the request on standard input. The request's own `timeout` ends an agent that hangs."""
    try:
        request = json.loads(sys.stdin.read())
        if request.get("timeout"):
            signal.alarm(math.ceil(request["timeout"]))
        result = json.dumps(answer(request))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        sys.stderr.write(f"eurotrain agent: bad request: {error}\n")
        return 2
    sys.stdout.write(frame(result) if framed else result)
    return 0


def frame(text: str) -> str:
    """An answer that can be told from what surrounds it, and whose loss shows."""
    whole = text.encode()
    return f"\n{FRAME} {len(whole)} {hashlib.sha256(whole).hexdigest()}\n{text}\n"


if __name__ == "__main__":
    sys.exit(main())
