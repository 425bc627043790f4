"""Wheels of what is installed here: whole, installable, and the same whoever makes them."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from clusters.probe import ROOMS, code_digest
from orchestrator import own_wheel


def test_the_same_bytes_every_time(tmp_path: Path) -> None:
    first, second = own_wheel.eurotrain(tmp_path / "a"), own_wheel.eurotrain(tmp_path / "b")
    assert first.read_bytes() == second.read_bytes()
    assert [path.name for path in (tmp_path / "a").iterdir()] == [first.name]


def test_it_holds_all_rooms_and_what_belongs_to_them(tmp_path: Path) -> None:
    with zipfile.ZipFile(own_wheel.eurotrain(tmp_path)) as archive:
        names = archive.namelist()
        (info,) = {name.partition("/")[0] for name in names if ".dist-info/" in name}
        assert f"Version: {metadata.version('eurotrain')}" in archive.read(f"{info}/METADATA").decode()
        record = archive.read(f"{info}/RECORD").decode().splitlines()
    assert {name.partition("/")[0] for name in names} == {*ROOMS, info}
    assert "clusters/catalogue/lumi.toml" in names
    assert "orchestrator/presets/llama-3m.toml" in names
    assert not [name for name in names if "__pycache__" in name]
    assert sorted(line.partition(",")[0] for line in record) == sorted(names)


def test_pip_takes_it_and_it_is_this_code(tmp_path: Path) -> None:
    """pip as it will run at a site: out of a wheel of itself, with hashes."""
    code, pip = own_wheel.eurotrain(tmp_path), own_wheel.pip(tmp_path)
    digest = hashlib.sha256(code.read_bytes()).hexdigest()
    (tmp_path / "r.txt").write_text(f"{code.as_uri()} --hash=sha256:{digest}\n")
    words = [
        "install",
        "-q",
        "--no-index",
        "--no-deps",
        "--require-hashes",
        "--target",
        str(tmp_path / "site"),
    ]
    subprocess.run(
        [sys.executable, f"{pip}/pip", "--isolated", *words, "-r", str(tmp_path / "r.txt")], check=True
    )
    program = "import clusters.probe as p; print(p.__file__, p.code_digest())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", program], capture_output=True, text=True, check=True, cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.stdout.split() == [f"{tmp_path}/site/clusters/probe.py", code_digest()]


def test_an_environment_without_pip_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", absent)
    with pytest.raises(ValueError, match="needs pip beside eurotrain: python -m ensurepip"):
        own_wheel.pip(tmp_path)
