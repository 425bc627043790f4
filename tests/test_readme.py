"""README keeps its word: its commands exist, its files are accepted, its targets can be made."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
EUROTRAIN = str(Path(sys.executable).with_name("eurotrain"))


def block(kind: str, having: str) -> str:
    return next(text for language, text in BLOCKS if language == kind and having in text)


def shell_lines() -> list[str]:
    lines = [
        line.split("#")[0].strip()
        for language, text in BLOCKS
        if language == "sh"
        for line in text.splitlines()
    ]
    return [line for line in lines if line]


def run(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "EUROTRAIN_HOME": str(home)}
    return subprocess.run(words, capture_output=True, text=True, env=environment, check=False)


def test_the_two_commands_come_first() -> None:
    assert shell_lines()[:2] == ["make demo", "make test"]


@pytest.mark.parametrize("line", [line for line in shell_lines() if line.startswith("make ")])
def test_what_is_made_can_be_made(line: str) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert line.split()[1] in targets


def test_there_are_commands_to_test() -> None:
    assert len([line for line in shell_lines() if line.startswith("eurotrain ")]) >= 7


@pytest.mark.parametrize("line", sorted({line for line in shell_lines() if line.startswith("eurotrain ")}))
def test_a_command_exists_with_its_options(line: str, tmp_path: Path) -> None:
    words = line.split()[1:]
    path = [words[0]]
    asked = run(tmp_path, EUROTRAIN, *path, "--help")
    assert asked.returncode == 0, asked.stderr
    for option in (word for word in words if word.startswith("-")):
        assert option.split("=")[0] in asked.stdout, f"{line}: no such option"


def test_every_command_named_in_the_text_exists(tmp_path: Path) -> None:
    named = set(re.findall(r"`(?:\.venv/bin/)?eurotrain ([a-z]+)", README))
    assert named
    for name in named:
        assert run(tmp_path, EUROTRAIN, name, "--help").returncode == 0, name


def test_its_run_can_be_planned(tmp_path: Path) -> None:
    """sites.toml, grant and run.toml, as printed."""
    (tmp_path / "sites.toml").write_text(
        block("toml", "catalogue = ").replace("/scratch/me/a", str(tmp_path))
    )
    (tmp_path / "run.toml").write_text(block("toml", "[training]"))
    granted = next(line for line in shell_lines() if line.startswith("eurotrain grant"))
    words = re.findall(r'"[^"]*"|\S+', granted)[1:]
    assert run(tmp_path, EUROTRAIN, *(word.strip('"') for word in words)).returncode == 0
    planned = run(tmp_path, EUROTRAIN, "plan", str(tmp_path / "run.toml"), "--json")
    assert planned.returncode == 0, planned.stderr


def test_its_toml_is_toml() -> None:
    for language, text in BLOCKS:
        if language == "toml":
            tomllib.loads(text)


def test_its_slurm_site_is_accepted(tmp_path: Path) -> None:
    (site,) = re.findall(r"^   ```toml\n(.*?)^   ```", README, re.DOTALL | re.MULTILINE)
    (tmp_path / "sites.toml").write_text(textwrap.dedent(site))
    listed = run(tmp_path, EUROTRAIN, "sites", "--json")
    assert listed.returncode == 0, listed.stderr
    assert '"leonardo"' in listed.stdout
    run_toml = block("toml", "[training]").replace("local-a", "leonardo").replace("demo-a", "grant")
    (tmp_path / "run.toml").write_text(run_toml)
    granted = run(tmp_path, EUROTRAIN, "grant", "grant", "100", "--unit", "core-hour", "--reference", "x")
    assert granted.returncode == 0, granted.stderr
    planned = run(tmp_path, EUROTRAIN, "plan", str(tmp_path / "run.toml"))
    assert planned.returncode == 0, planned.stderr
    assert "before a launch: leonardo: data/europe.bin has not been staged: type `eurotrain" in planned.stdout
    (tmp_path / "run.toml").write_text(run_toml + "dp = 8\n")
    refused = run(tmp_path, EUROTRAIN, "plan", str(tmp_path / "run.toml"))
    assert refused.returncode == 2, "README says that segments of several nodes are not there yet"
