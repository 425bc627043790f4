"""The bundle that a site's segments run from: made of wheels, or an interpreter of the operator's own."""

from __future__ import annotations

import hashlib
import json
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.specifiers import SpecifierSet

from clusters import probe
from clusters.bundles import ABSENT, FAILED, INTERRUPTED, MAKING, READY
from clusters.pieces import StagedFile
from clusters.site import Site
from orchestrator import own_wheel, wheelhouse
from orchestrator.stage import Stager
from orchestrator.wheelhouse import Target

_MAKINGS = 3  # a login node may be rebooted under our hands
_POLL_SECONDS = 3.0


def stage(site: Site, stager: Stager, wheels: Path, poll: float = _POLL_SECONDS) -> dict[str, Any]:
    """Have the site's bundle ready and in its record; what it is. `wheels` keeps what pip collects.

    Raises ValueError, one line, when there can be none; OSError where the site does not answer.
    """
    if site.own.container:
        raise ValueError(f"{site.name} in sites.toml: segments do not run in a container yet: leave it out")
    told = _registered(site, stager) if site.python else _made(site, stager, wheels, poll)
    record = stager.stock.load(site.name)
    record.bundle = told
    stager.stock.save(site.name, record)
    return told


def _interpreter(site: Site, stager: Stager, python: str, key: str) -> dict[str, Any]:
    """What an interpreter at the site tells of itself. Raises ValueError when it is too old."""
    operation = {"op": "interpreter", "python": python, "modules": list(site.own.modules)}
    facts: dict[str, Any] = stager.ask(operation)["facts"]
    needed = SpecifierSet(str(metadata.metadata("eurotrain")["Requires-Python"]))
    if not needed.contains(facts["version"], prereleases=True):
        raise ValueError(
            f"{site.name}: {python} there is Python {facts['version']}, and eurotrain needs {needed}: "
            f"name another as {key} in sites.toml, and the modules that it takes"
        )
    return facts


# ---- an interpreter of the operator's own


def _registered(site: Site, stager: Stager) -> dict[str, Any]:
    assert site.python
    facts = _interpreter(site, stager, site.python, "python")
    if not facts["code"]:
        raise ValueError(
            f"{site.name}: {site.python} there has no eurotrain: install it, or name no python in sites.toml "
            "and a bundle is made of wheels"
        )
    if facts["code"] != probe.code_digest():
        stager.listener.say(f"{site.name}: the eurotrain of {site.python} there has other code than this one")
    name = _digest([site.python, facts["version"], facts["code"], facts["packages"]])
    stager.ask({"op": "register", "name": name, "python": site.python, "facts": facts})
    return {"id": name, "kind": "interpreter", "words": site.python, "bytes": 0, "code": facts["code"]}


# ---- a bundle of wheels


def _made(site: Site, stager: Stager, wheels: Path, poll: float) -> dict[str, Any]:
    facts = _interpreter(site, stager, site.own.base_python, "base_python")
    target = Target.from_facts(facts)
    stager.listener.say(f"{site.name}: collecting wheels for {target.words}")
    found = wheelhouse.collect(wheelhouse.requirements(), target, site.own.pip, wheels)
    code, pip = own_wheel.eurotrain(wheels / "own"), own_wheel.pip(wheels / "own")
    sources = {path.name: path for path in (*found, code, pip)}
    files = [
        StagedFile.from_json({**file.to_json(), "path": f"wheels/{file.sha256[:16]}/{file.path}"})
        for file in stager.stock.measure(sources)
    ]
    name = _digest([target.python, sorted([file.path, file.sha256] for file in files)])
    total = sum(file.size for file in files)
    told = {
        "id": name, "kind": "wheels", "words": target.words, "bytes": total,
        "code": probe.code_digest(),
    }  # fmt: skip
    there = stager.ask({"op": "bundle", "name": name})
    if there["state"] == READY:
        if stager.old is not None and there["age"] >= stager.old:
            stager.ask({"op": "renew", "name": name})
            stager.listener.say(f"{site.name}: bundle {name} was near the age of purging: made young again")
        return told
    size, count = wheelhouse.unpacked(sources.values())
    stager.check_room(total + size, len(files) + count)
    stager.bring(files, {file.path: sources[Path(file.path).name] for file in files})
    (tool,) = [file for file in files if Path(file.path).name == pip.name]
    order = {
        "python": site.own.base_python, "version": target.python, "modules": list(site.own.modules),
        "wheels": [[f.path, f.sha256] for f in files if f is not tool], "pip": tool.path,
        "code": told["code"],
    }  # fmt: skip
    _make(site, stager, name, order, poll)
    return told


def _make(site: Site, stager: Stager, name: str, order: dict[str, Any], poll: float) -> None:
    """Raises ValueError with the site's reason."""
    stager.listener.say(f"{site.name}: making the environment {name} of {len(order['wheels'])} wheels")
    told = stager.ask({"op": "make", "name": name, "order": order})
    makings = 1
    while told["state"] != READY:
        if told["state"] == FAILED or makings > _MAKINGS:
            log = f"; {told['log']}" if "log" in told else ""
            raise ValueError(f"{site.name}: the bundle cannot be made there: {told['why']}{log}")
        if told["state"] == MAKING:
            time.sleep(poll)
            told = stager.ask({"op": "bundle", "name": name})
        else:
            assert told["state"] in (INTERRUPTED, ABSENT), told
            makings += 1
            told = stager.ask({"op": "make", "name": name, "order": order})


def _digest(facts: Any) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
