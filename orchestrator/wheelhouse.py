"""Wheels for a site's interpreter, collected here by pip: nothing at the site needs a network.

pip is the operator's own, with their PIP_* settings and configuration, and more words from sites.toml. Where
the site is like this machine (architecture, Python, a C library no older) wheels may be built here; elsewhere
only published ones serve. What was collected is kept, and is complete before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name, parse_wheel_filename

_LEGACY = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}  # PEP 600's names for glibc 2.x


@dataclass(frozen=True)
class Target:
    """A site's interpreter, as far as wheels care: from clusters.probe.facts."""

    python: str  # "3.11"
    machine: str  # "x86_64", "aarch64"
    libc: str  # "glibc 2.28"
    markers: Mapping[str, str]

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any]) -> Target:
        markers = facts["markers"]
        return cls(facts["python"], markers["platform_machine"], facts["libc"], markers)

    @property
    def platforms(self) -> list[str]:
        """Platform tags that its interpreter takes, newest first."""
        kind, _, version = self.libc.partition(" ")
        if kind != "glibc":
            return [f"musllinux_1_{minor}_{self.machine}" for minor in (2, 1, 0)]
        found = []
        for minor in range(int(version.split(".")[1]), 4, -1):
            found.append(f"manylinux_2_{minor}_{self.machine}")
            if minor in _LEGACY:
                found.append(f"{_LEGACY[minor]}_{self.machine}")
        return found

    @property
    def tags(self) -> set[Tag]:
        """All that a wheel may have; `linux_` is what is built here."""
        version = [int(part) for part in self.python.split(".")]
        platforms = [*self.platforms, f"linux_{self.machine}"]
        interpreter = f"cp{version[0]}{version[1]}"
        own = cpython_tags(version, [interpreter], platforms)
        return {*own, *compatible_tags(version, interpreter, platforms)}

    @property
    def is_like_here(self) -> bool:
        """Whether what is built on this machine runs there."""
        same = (self.python, self.machine) == (
            platform.python_version().rpartition(".")[0],
            platform.machine(),
        )
        here, there = os.confstr("CS_GNU_LIBC_VERSION") or "", self.libc
        return same and here[:6] == there[:6] == "glibc " and _minor(here) <= _minor(there)

    @property
    def words(self) -> str:
        return f"Python {self.python}, {self.machine}, {self.libc}"


def requirements() -> list[str]:
    """What eurotrain itself says it needs, extras not counted."""
    return metadata.requires("eurotrain") or []


def collect(wanted: Sequence[str], target: Target, arguments: Sequence[str], folder: Path) -> list[Path]:
    """Wheels of everything that `wanted` requires at the target; `folder` keeps one collection of each kind.

    Raises ValueError with pip's reason, or naming what a wheel requires that is not among them.
    """
    needed = [_bare(r) for line in wanted if _applies(r := Requirement(line), target, "")]
    settings = sorted((k, v) for k, v in os.environ.items() if k.startswith("PIP_"))
    facts = [needed, target.python, target.machine, target.libc, list(arguments), settings]
    collected = folder / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    if not collected.exists():
        attempt = collected.with_suffix(f".{os.getpid()}.tmp")
        shutil.rmtree(attempt, ignore_errors=True)
        attempt.mkdir(parents=True)
        if needed:
            _pip([*_verb(target, attempt), *arguments, *needed])
        check(sorted(attempt.glob("*.whl")), needed, target)
        attempt.rename(collected)
    return sorted(collected.glob("*.whl"))


def _verb(target: Target, folder: Path) -> list[str]:
    if target.is_like_here:
        return ["wheel", "--wheel-dir", str(folder)]
    words = ["download", "--dest", str(folder), "--only-binary=:all:", "--implementation", "cp"]
    words += ["--python-version", target.python]
    for abi in (f"cp{target.python.replace('.', '')}", "abi3", "none"):
        words += ["--abi", abi]
    return [*words, *(word for tag in target.platforms for word in ("--platform", tag))]


def _pip(words: Sequence[str]) -> None:
    """Raises ValueError with the line of pip's that says why."""
    command = [sys.executable, "-m", "pip", *words, "--no-input", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        why = lines[-1].removeprefix("ERROR: ") if lines else f"exit code {done.returncode}"
        raise ValueError(f"pip {words[0]}: {why}; `pip` in sites.toml takes more words for it")


def check(wheels: Iterable[Path], wanted: Sequence[str], target: Target) -> None:
    """Whether wheels are all that is needed and fit: pip judges markers by the Python that it runs in.

    Raises ValueError, one line.
    """
    tags, found = target.tags, {}
    for wheel in wheels:
        name, version, _, fits = parse_wheel_filename(wheel.name)
        if not fits & tags:
            raise ValueError(f"{wheel.name} does not run there: {target.words}")
        found[name] = (version, _metadata(wheel))
    asked = [(Requirement(line), "eurotrain") for line in wanted]
    done: set[tuple[str, frozenset[str]]] = set()
    while asked:
        requirement, by = asked.pop()
        name = canonicalize_name(requirement.name)
        if name not in found or not requirement.specifier.contains(found[name][0], prereleases=True):
            has = f"{name} {found[name][0]}" if name in found else "no wheel of it"
            raise ValueError(f"{by} requires {requirement}, and there is {has} for {target.words}")
        extras = frozenset(requirement.extras)
        if (name, extras) not in done:
            done.add((name, extras))
            asked += [(r, name) for r in _requires(found[name][1], extras, target)]
            _check_python(found[name][1], name, target)


def _requires(text: str, extras: Iterable[str], target: Target) -> Iterator[Requirement]:
    for line in HeaderParser().parsestr(text).get_all("Requires-Dist") or ():
        requirement = Requirement(line)
        if any(_applies(requirement, target, extra) for extra in ("", *extras)):
            yield requirement


def _check_python(text: str, name: str, target: Target) -> None:
    allowed = SpecifierSet(HeaderParser().parsestr(text).get("Requires-Python") or "")
    full = target.markers["python_full_version"]
    if not allowed.contains(full, prereleases=True):
        raise ValueError(f"{name} requires Python {allowed}, and there is {full}")


def _applies(requirement: Requirement, target: Target, extra: str) -> bool:
    environment = {**default_environment(), **target.markers, "extra": extra}
    return requirement.marker is None or requirement.marker.evaluate(environment)  # type: ignore[arg-type]


def _bare(requirement: Requirement) -> str:
    """Without its marker, which was judged for the site."""
    extras = f"[{','.join(sorted(requirement.extras))}]" if requirement.extras else ""
    return f"{requirement.name}{extras}{requirement.specifier}"


def _metadata(wheel: Path) -> str:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", n)]
        return archive.read(name).decode()


def unpacked(wheels: Iterable[Path]) -> tuple[int, int]:
    """Bytes and files of an environment of these wheels; compiled modules double those of Python."""
    size = count = 0
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                twice = 2 if entry.filename.endswith(".py") else 1
                size, count = size + twice * entry.file_size, count + twice
    return size, count


def _minor(libc: str) -> int:
    return int(libc.split(".")[1])
