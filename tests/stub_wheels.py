"""Wheels with nothing in them but their names, for tests that must not fetch gigabytes."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

from packaging.requirements import Requirement


def stub(
    folder: Path, name: str, version: str = "1.0", tag: str = "py3-none-any", requires: Sequence[str] = (),
    python: str = "",
) -> Path:  # fmt: skip
    """A wheel of one empty module."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = name.replace("-", "_")
    info = f"{plain}-{version}.dist-info"
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Python: {python}"] if python else []
    lines += [f"Requires-Dist: {line}" for line in requires]
    path = folder / f"{plain}-{version}-{tag}.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for file, text in {
            f"{plain}.py": f"version = {version!r}\n",
            f"{info}/METADATA": "\n".join([*lines, ""]),
            f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag}\n",
            f"{info}/RECORD": f"{plain}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n",
        }.items():
            archive.writestr(zipfile.ZipInfo(file), text)
    return path


def stubs_of(requirements: Sequence[str], folder: Path) -> None:
    """A wheel for each requirement of this Python, of a version that it takes."""
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            (version, *_) = [s.version for s in requirement.specifier if s.operator in (">=", "==")]
            stub(folder, requirement.name, version)
