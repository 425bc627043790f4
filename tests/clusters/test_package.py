"""The agent as a file: always the same bytes, for every Python from 3.9, without anything installed."""

from __future__ import annotations

import ast
import io
import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from clusters import package
from clusters.agent import FRAME, PROTOCOL
from clusters.segment import Segment
from tests.clusters.fake_slurm import FakeSlurm

ANY_PYTHON = sorted(
    {str(p.resolve()) for p in Path.home().glob(".pyenv/versions/*/bin/python")} | {"/usr/bin/python3"}
)


def version(python: str) -> tuple[int, ...]:
    code = "import sys; print('%d %d' % sys.version_info[:2])"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    return tuple(map(int, done.stdout.split()))


def interpreters(old: bool) -> list[str]:
    """Those on this machine that are too old, or not."""
    there = [p for p in [*ANY_PYTHON, sys.executable] if shutil.which(p)]
    return [p for p in there if (version(p) < package.MINIMUM) == old]


@pytest.fixture
def agent(tmp_path: Path) -> Path:
    built = package.build()
    path = tmp_path / built.name
    path.write_bytes(built.content)
    return path


def ask(python: str, agent: Path, *operations: object, **popen: object) -> subprocess.CompletedProcess[str]:
    request = {"protocol": PROTOCOL, "scratch": str(agent.parent), "operations": operations}
    command = [python, "-E", "-s", "-S", str(agent)]  # -S: not even what is installed beside this Python
    return subprocess.run(
        command, input=json.dumps(request), capture_output=True, text=True, check=False, **popen
    )  # type: ignore[call-overload,no-any-return]


def results(done: subprocess.CompletedProcess[str]) -> list[dict[str, object]]:
    assert done.stderr == ""
    _, header, answer = done.stdout.split("\n", 2)
    assert header.split()[0] == FRAME
    found = json.loads(answer)["results"]
    assert isinstance(found, list)
    return found


def test_it_has_the_same_bytes_every_time() -> None:
    first = package.build()
    package.build.cache_clear()
    assert package.build() == first
    assert len(first.content) < 300_000
    assert first.name.startswith("agent-")


def test_another_content_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    first = package.build()
    monkeypatch.setattr(package, "_MAIN", package._MAIN + "\n")
    package.build.cache_clear()
    assert package.build().name != first.name
    monkeypatch.undo()
    package.build.cache_clear()


def test_it_holds_what_the_agent_imports_and_no_tests() -> None:
    names = zipfile.ZipFile(io.BytesIO(package.build().content)).namelist()
    assert {
        "clusters/agent.py",
        "clusters/slurm_verdict.py",
        "submitit/core/_submit.py",
        "cloudpickle/__init__.py",
    } <= set(names)
    assert not [n for n in names if "test_" in n or "connection" in n or "guard" in n]
    assert any(n.startswith("licences/submitit/") for n in names)


@pytest.mark.parametrize("name", sorted(n for n in package.sources() if n.endswith(".py")))
def test_every_file_is_python_3_9(name: str) -> None:
    ast.parse(package.sources()[name], name, feature_version=package.MINIMUM)


@pytest.mark.parametrize("python", interpreters(old=False))
def test_it_answers_without_anything_installed(agent: Path, python: str) -> None:
    (result,) = results(ask(python, agent, {"op": "jobs", "keys": ["k"]}))
    assert result == {"ok": True, "jobs": {"k": {"state": "absent", "heartbeat_age": None}}}


@pytest.mark.parametrize("python", interpreters(old=False))
def test_it_submits_without_anything_installed(
    agent: Path, python: str, segment: Segment, fake_slurm: FakeSlurm
) -> None:
    operation = {"op": "submit", "scheduler": "slurm", "segment": segment.to_json(), "python": "/site/python"}
    (result,) = results(ask(python, agent, operation))
    assert (result["ok"], result.get("job_id")) == (True, "42")
    assert any("watched /site/python -u -m submitit.core._submit" in line for line in fake_slurm.script)


@pytest.mark.parametrize("python", interpreters(old=True))
def test_a_python_that_is_too_old_is_told_so_in_one_line(agent: Path, python: str) -> None:
    done = ask(python, agent)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "is too old, 3.9 or newer is needed" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_another_protocol_is_one_line(agent: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(agent)], input='{"protocol": 7}', capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"eurotrain agent: bad request: the agent speaks protocol {PROTOCOL}, the controller 7\n"
    )
