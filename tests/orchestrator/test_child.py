"""A child process's JSON lines as they come, and its end in one line."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from orchestrator import child


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """A module of this source, for children to import."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(source: str) -> str:
        (tmp_path / "told_by_a_test.py").write_text("import sys, time\n" + source)
        return "told_by_a_test"

    return write


def test_lines_come_while_the_child_works_and_arguments_arrive(
    module: Callable[[str], str], tmp_path: Path
) -> None:
    go_on = tmp_path / "go-on"
    name = module(f"""
from pathlib import Path
print('{{"arguments": ' + repr(sys.argv[1:]).replace("'", '"') + '}}', flush=True)
while not Path({str(go_on)!r}).exists(): time.sleep(0.01)
print('{{"done": true}}')
""")
    lines = child.stream(name, ["a b", "--c"])
    assert next(lines) == {"arguments": ["a b", "--c"]}  # the child cannot have ended
    go_on.touch()
    assert list(lines) == [{"done": True}]


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("sys.exit('first\\nthe tensor is too large\\n')", OSError, "exit code 1: the tensor is too large"),
        ("sys.stderr.write('warning\\nno such file\\n\\n'); sys.exit(2)", ValueError, r"^no such file$"),
        ("sys.exit(3)", OSError, "failed with exit code 3: it said nothing of why"),
        ("import os; os.kill(os.getpid(), 9)", OSError, "was ended by SIGKILL"),
        ("print('hello')", OSError, "printed what is no JSON object: 'hello'"),
        ("print('[1]')", OSError, r"printed what is no JSON object: '\[1\]'"),
    ],
)
def test_ends_that_are_not_good(
    module: Callable[[str], str], source: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        list(child.stream(module(source), []))


def test_what_was_told_before_a_failure_is_yielded(module: Callable[[str], str]) -> None:
    lines = child.stream(module("print('{\"done\": 1}', flush=True); sys.exit(2)"), [])
    assert next(lines) == {"done": 1}
    with pytest.raises(ValueError, match="nothing of why"):
        next(lines)


def test_a_megabyte_of_warnings_blocks_nobody(module: Callable[[str], str]) -> None:
    assert list(child.stream(module("sys.stderr.write('x' * 2**20); print('{}')"), [])) == [{}]


@pytest.mark.parametrize("deaf", [False, True])
def test_a_caller_that_stops_takes_the_child_along(
    module: Callable[[str], str], deaf: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child, "_TERMINATION_SECONDS", 0.1)
    ignore = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if deaf else ""
    name = module(ignore + "import os; print('{\"pid\": %d}' % os.getpid(), flush=True); time.sleep(600)")
    lines = child.stream(name, [])
    pid = next(lines)["pid"]
    os.kill(pid, 0)
    lines.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
