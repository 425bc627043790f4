"""The agent as a file: always the same bytes, for every Python from 3.9, without anything installed."""

from __future__ import annotations

import ast
import io
import json
import re
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


def install(python: str, path: Path, content: bytes, brought: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [python, "-Es", *package.install_words(str(path), content)]
    return subprocess.run(command, input=brought, capture_output=True, check=False)


@pytest.mark.parametrize("python", interpreters(old=False))
def test_an_installed_agent_is_compiled_for_its_python_and_works_with_others(
    tmp_path: Path, python: str
) -> None:
    built, path = package.build(), tmp_path / "scratch" / "agent" / "agent.pyz"
    done = install(python, path, built.content, built.content)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert [p.name for p in path.parent.iterdir()] == ["agent.pyz"]
    with zipfile.ZipFile(path) as archive:
        assert "clusters/agent.pyc" in archive.namelist()
    for other in {python, sys.executable}:
        (result,) = results(ask(other, path, {"op": "jobs", "keys": ["k"]}))
        assert result["ok"]


def test_the_compiled_code_is_what_runs(tmp_path: Path) -> None:
    built, path = package.build(), tmp_path / "agent.pyz"
    install(sys.executable, path, built.content, built.content)
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile(tmp_path / "broken.pyz", "w") as broken:
        for name in whole.namelist():
            broken.writestr(name, whole.read(name) if name.endswith(".pyc") else b"this is not Python")
    (result,) = results(ask(sys.executable, tmp_path / "broken.pyz", {"op": "jobs", "keys": ["k"]}))
    assert result["ok"]


def test_an_agent_that_arrives_cut_short_is_not_installed(tmp_path: Path) -> None:
    built, path = package.build(), tmp_path / "agent.pyz"
    done = install(sys.executable, path, built.content, built.content[:1000])
    assert done.returncode == 1
    assert done.stderr == b"ValueError: the agent did not arrive whole: 1000 bytes\n"
    assert list(tmp_path.iterdir()) == []


def test_no_word_of_the_installation_means_anything_to_a_shell() -> None:
    code, *words = package.install_words("/scratch/agent.pyz", b"")[1:]
    assert code == "import base64,sys;exec(base64.b64decode(sys.argv[1]));exec(base64.b64decode(sys.argv[2]))"
    assert all(re.fullmatch(r"[A-Za-z0-9+/=.]+", word) for word in words)


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
    called = ask(python, agent)
    installed = install(python, agent.with_name("new"), b"", b"")
    assert called.returncode == installed.returncode == 2
    assert called.stdout == ""
    assert "is too old, 3.9 or newer is needed" in called.stderr
    assert called.stderr == installed.stderr.decode()
    assert len(called.stderr.splitlines()) == 1


def test_another_protocol_is_one_line(agent: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(agent)], input='{"protocol": 7}', capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert (
        done.stderr
        == f"eurotrain agent: bad request: the agent speaks protocol {PROTOCOL}, the controller 7\n"
    )
