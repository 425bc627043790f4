"""What segments run from, at a site: bundles, named by what they are made of.

    bundles/<id>/bundle.json          the mark of a bundle that can be used, renamed into place last
                 attempts/<n>/        one making: order.json, heartbeat, install.log, venv/, or `failed`
    wheels/<sha256>/<name>.whl        what environments are made of: from here alone, never from an index

An environment is made by a process of its own on the login node (clusters/making.py): a segment's first step
would burn the units of a whole allocation to unpack files, and a failure would show after the queue.
An interpreter that the operator names is no less a bundle: it is asked what it is, and that is written down.
Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import json
import os
import pkgutil
import secrets
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Mapping, Sequence  # noqa: UP035 - Python 3.9 at the sites

import clusters
from clusters.paths import SitePaths, write_atomically

READY, MAKING, FAILED, INTERRUPTED, ABSENT = "ready", "making", "failed", "interrupted", "absent"
BEAT_SECONDS = 5.0  # between two signs of life of a making
_DEAD_SECONDS = 60.0  # without one: it was killed, or its machine was
_PROBE_SECONDS = 120.0  # an interpreter's first start from a cold file system


def interpreter(site: SitePaths, python: str, modules: Sequence[str] = ()) -> dict[str, Any]:
    """What an interpreter here is: clusters.probe.facts. Raises ValueError, one line, when it is none."""
    del site
    return {"facts": probe(python, modules)}


def probe(python: str, modules: Sequence[str] = ()) -> dict[str, Any]:
    """Raises ValueError, one line, when the interpreter does not start."""
    source = pkgutil.get_data("clusters", "probe.py")
    assert source is not None
    command = [*prefix(modules), python, "-c", source.decode()]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, cwd="/", timeout=_PROBE_SECONDS,
            stdin=subprocess.DEVNULL, env=environment(),
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{python} does not start: {error}") from None
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
        assert isinstance(facts, dict)
    except (ValueError, IndexError, AssertionError):
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ValueError(f"{python} does not start: {why[:300]}") from None
    return facts


def prefix(modules: Sequence[str]) -> list[str]:
    """Words before a command that needs modules: a login shell knows what `module` is."""
    if not modules:
        return []
    loads = " && ".join(f"module load {shlex.quote(name)}" for name in modules)
    return ["bash", "-lc", f'{loads} && exec "$@"', "bash"]


def environment() -> dict[str, str]:
    """Nothing of the operator's own Python or pip at the site."""
    return {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PIP_", "VIRTUAL_ENV"))}


# ---- what is there


def find(site: SitePaths, name: str) -> dict[str, Any] | None:
    """A bundle's record; None when there is none that can be used."""
    try:
        record = json.loads((_folder(site, name) / "bundle.json").read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) else None


def wrong(record: Mapping[str, Any] | None) -> str:
    """Why a bundle cannot be used; empty when it can.

    Its witnesses are looked for: the interpreter, and one file of each distribution. A purge takes old files
    of all of them alike, and to look for all 30,000 of an environment takes seconds.
    """
    if record is None:
        return "is not there"
    for path, size in record["witnesses"]:
        try:
            if Path(path).stat().st_size != size:
                return f"is not as it was made: {path} has changed"
        except OSError:
            return f"is not as it was made: {path} is gone"
    return ""


def write_record(site: SitePaths, name: str, record: Mapping[str, Any], witnesses: Sequence[Path]) -> None:
    """The bundle can be used from now on."""
    seen = [[str(path), path.stat().st_size] for path in witnesses]
    facts = {**record, "id": name, "made": time.time(), "witnesses": seen}
    write_atomically(_folder(site, name) / "bundle.json", json.dumps(facts, indent=1))


def register(site: SitePaths, name: str, python: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write down an interpreter of the operator's own, with what it told of itself."""
    write_record(
        site, name, {"kind": "interpreter", "python": python, "facts": facts}, [Path(facts["executable"])]
    )
    return bundle(site, name)


def bundle(site: SitePaths, name: str) -> dict[str, Any]:
    """State of a bundle: ready (with its interpreter), making, failed (with why), interrupted, absent."""
    record = find(site, name)
    why = wrong(record)
    if record and not why:
        age = round(time.time() - record["made"])
        return {"state": READY, "python": record["python"], "facts": record.get("facts", {}), "age": age}
    attempts = sorted(_folder(site, name).glob("attempts/*"), key=lambda path: path.stat().st_mtime)
    told = _attempt(attempts[-1]) if attempts else None
    return told or {"state": ABSENT, "why": why}


def _attempt(attempt: Path) -> dict[str, Any] | None:
    """How far a making is; None when it has ended well, whatever became of that since."""
    if (attempt / "failed").exists():
        return {"state": FAILED, "why": (attempt / "failed").read_text(), "log": str(attempt / "install.log")}
    try:
        age = time.time() - (attempt / "heartbeat").stat().st_mtime
    except FileNotFoundError:
        return None
    if age < _DEAD_SECONDS:
        return {"state": MAKING, "why": _last_line(attempt / "install.log")}
    return {
        "state": INTERRUPTED,
        "why": f"no sign of life for {age:.0f} s",
        "log": str(attempt / "install.log"),
    }


def _last_line(log: Path) -> str:
    try:
        lines = log.read_text(errors="replace").strip().splitlines()
    except OSError:
        return ""
    return lines[-1][:200] if lines else ""


def renew(site: SitePaths, name: str) -> dict[str, Any]:
    """Make all of a bundle young again for a purge that goes by age."""
    record = find(site, name)
    if record is None:
        raise ValueError(f"bundle {name} is not there")
    for base, folders, files in os.walk(_folder(site, name)):
        for entry in (*folders, *files):
            os.utime(Path(base, entry), follow_symlinks=False)
    write_atomically(
        _folder(site, name) / "bundle.json", json.dumps({**record, "made": time.time()}, indent=1)
    )
    return bundle(site, name)


# ---- making one


def make(site: SitePaths, name: str, order: Mapping[str, Any]) -> dict[str, Any]:
    """Begin to make an environment, unless it is there or being made; answers as `bundle`.

    `order`: fields of clusters.making.Order. What earlier attempts left is removed.
    """
    told = bundle(site, name)
    if told["state"] in (READY, MAKING):
        return told
    attempts = _folder(site, name) / "attempts"
    shutil.rmtree(attempts, ignore_errors=True)
    attempts.mkdir(parents=True)
    new = attempts.with_name(f"new-{secrets.token_hex(4)}")
    new.mkdir()
    (new / "heartbeat").touch()
    write_atomically(new / "order.json", json.dumps({**order, "bundle": name}))
    attempt = new.rename(attempts / new.name)
    root = str(Path(clusters.__file__).parents[1])  # the agent's own file, or this tree
    with (attempt / "install.log").open("wb") as log:
        subprocess.Popen(
            [sys.executable, "-m", "clusters.making", str(site.scratch), str(attempt)],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
            env={**environment(), "PYTHONPATH": root},
        )  # fmt: skip
    return {"state": MAKING, "why": ""}


def _folder(site: SitePaths, name: str) -> Path:
    assert name
    assert "/" not in name
    return site.scratch / "bundles" / name
