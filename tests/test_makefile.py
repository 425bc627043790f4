"""`make` on a fresh machine, with a Python that only notes what it was asked to do."""

import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]

# Stands in for python3 and for the environment's own python. Fails where $BREAK occurs in its arguments.
PYTHON = """#!/bin/sh
echo "$@" >> "$LOG"
case "$*" in
    *"$BREAK"*) exit 1 ;;
    "-m venv --clear .venv") rm -rf .venv; mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
esac
"""


class Machine:
    """A clone's Makefile, and what it made Python do."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        for name in ("Makefile", "pyproject.toml", "constraints-cpu.txt"):
            shutil.copy(ROOT / name, folder)
        self.python = folder / "python3"
        self.python.write_text(PYTHON)
        self.python.chmod(0o755)

    def make(self, *words: str, broken: str = "never") -> subprocess.CompletedProcess[str]:
        self.log.write_text("")
        outer = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
        environment = {**outer, "LOG": str(self.log), "BREAK": broken}
        command = ["make", f"PYTHON={self.python}", *words]
        return subprocess.run(
            command, cwd=self.folder, env=environment, capture_output=True, text=True, check=False
        )

    @property
    def installed(self) -> list[str]:
        """What was made or installed since the last call of make, without pip's options."""
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("-m")]
        return [line.replace("-m pip install -qq --disable-pip-version-check ", "") for line in lines]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


EVERYTHING = ["-m venv --clear .venv", "-c constraints-cpu.txt torch", "-c constraints-cpu.txt -e .[dev]"]


def test_the_second_time_installs_nothing(machine: Machine) -> None:
    assert machine.make("setup").returncode == 0
    assert machine.installed == EVERYTHING
    machine.make("setup")
    assert machine.installed == []


def test_a_build_of_torch_that_brings_no_triton_gets_one(machine: Machine) -> None:
    machine.make("setup", broken="import triton")
    assert machine.installed == [*EVERYTHING, "--no-deps triton==3.9.0"]


def test_another_build_of_torch_can_be_asked_for(machine: Machine) -> None:
    machine.make("setup", "PIP_TORCH_ARGS=--index-url file:///wheels")
    assert machine.installed[1] == "-c constraints-cpu.txt --index-url file:///wheels torch"
    assert machine.installed[2] == EVERYTHING[2]


@pytest.mark.parametrize("step", ["venv", "torch", "[dev]"])
def test_what_was_cut_short_is_made_anew(machine: Machine, step: str) -> None:
    assert machine.make("setup", broken=step).returncode != 0
    assert machine.make("setup").returncode == 0
    assert machine.installed == EVERYTHING


def test_new_requirements_are_installed_into_what_is_there(machine: Machine) -> None:
    machine.make("setup")
    newer = machine.folder.joinpath(".venv/.stamp").stat().st_mtime + 5
    os.utime(machine.folder / "pyproject.toml", (newer, newer))
    assert machine.make("setup", broken="torch").returncode != 0
    assert machine.installed == EVERYTHING[1:2]
    machine.make("setup")
    assert machine.installed == EVERYTHING  # and after a failure, from the beginning


def test_an_old_python_is_refused_in_one_line(machine: Machine) -> None:
    done = machine.make("demo", broken="sys.version_info < (3, 11)")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == (
        "eurotrain needs Python 3.11 or newer; name one: make PYTHON=python3.12 demo"
    )
    assert machine.installed == []


def test_a_python_without_venv_is_refused_in_one_line(machine: Machine) -> None:
    done = machine.make("setup", broken="ensurepip")
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].endswith("apt install python3-venv")


def test_the_demo_passes_its_arguments_on(machine: Machine) -> None:
    done = machine.make("-n", "demo", "ARGS=--kill-a-rank")
    assert done.stdout.splitlines()[-1] == ".venv/bin/eurotrain demo --kill-a-rank"


def test_the_pinned_versions_are_within_the_ranges_and_miss_none() -> None:
    """megatron-core is pinned by pyproject itself, and triton by the Makefile."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [
        *project["dependencies"],
        *(need for extra in project["optional-dependencies"].values() for need in extra),
    ]
    ranges = {need.name: need.specifier for need in map(Requirement, asked)}
    lines = (
        line.partition("#")[0].strip() for line in (ROOT / "constraints-cpu.txt").read_text().splitlines()
    )
    pins = {pin.name: next(iter(pin.specifier)) for pin in map(Requirement, filter(None, lines))}
    assert set(ranges) - set(pins) == {"eurotrain", "megatron-core", "triton"}
    assert {pin.operator for pin in pins.values()} == {"=="}
    assert [name for name, pin in pins.items() if pin.version not in ranges[name]] == []
