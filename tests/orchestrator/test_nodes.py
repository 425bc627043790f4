"""Steps on further nodes, with a stand-in for srun; with Slurm's own: test_segments_on_nodes.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator import nodes as module
from orchestrator.node import Told
from orchestrator.nodes import Lost, Nodes, NodesLost

# Notes what it is told, and ends with its input: quickly, or as `ends` in its folder says.
_SRUN = """#!/bin/sh
cd {folder}
for word; do case "$word" in --nodelist=*) node=${{word#--nodelist=}};; esac; done
echo "$@" > $node.words
read line; echo "$line" > $node.told.tmp; mv $node.told.tmp $node.told
if [ -e $node.ends ]; then exit $(cat $node.ends); fi
cat > /dev/null
touch $node.left
[ -e $node.hangs ] && sleep 600
exit 0
"""
TOLD = Told("10.0.0.1:6379", "a-very-secret-token", "rank@cn2", 4)


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    program = tmp_path / "srun"
    program.write_text(_SRUN.format(folder=tmp_path))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    nodes = Nodes(tmp_path / "segment", grace=45.0)
    yield nodes
    for process in nodes.steps.values():
        for child in psutil.Process(process.pid).children() if process.poll() is None else []:
            child.kill()
        process.kill()
        process.wait(5)


def wait_for(path: Path) -> str:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline, path
        time.sleep(0.01)
    return path.read_text()


def test_each_node_is_told_its_part_and_nobody_else_the_token(nodes: Nodes, tmp_path: Path) -> None:
    other = Told(TOLD.head, TOLD.token, "rank@cn3", 4)
    nodes.join({"cn2": TOLD, "cn3": other})
    assert Told(**json.loads(wait_for(tmp_path / "cn2.told"))) == TOLD
    assert Told(**json.loads(wait_for(tmp_path / "cn3.told"))) == other
    words = (tmp_path / "cn2.words").read_text().split()
    assert words[words.index("--node") + 1] == str(tmp_path / "segment")
    assert {"--grace=45.0", "--die-with-parent", "clusters.guard", sys.executable} <= {*words}
    assert words[-1] == "orchestrator.node"
    process = psutil.Process(nodes.steps["cn2"].pid)
    assert TOLD.token not in " ".join([*words, *process.environ().values()])
    assert nodes.ended() == []
    nodes.release([])
    assert (tmp_path / "cn2.left").exists()
    assert (tmp_path / "cn3.left").exists()


def test_a_step_that_ends_unasked_is_told_with_its_node(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "cn2.ends").write_text("3")
    nodes.join({"cn2": TOLD, "cn3": TOLD})
    assert nodes.steps["cn2"].wait(20) == 3
    assert nodes.ended() == [Lost("cn2", "its step ended (exit code 3)")]
    os.kill(nodes.steps["cn3"].pid, signal.SIGKILL)
    nodes.steps["cn3"].wait(20)
    assert nodes.ended()[1] == Lost("cn3", "its step ended (signal 9)")


def test_a_step_that_cannot_even_start_is_told_too(nodes: Nodes, tmp_path: Path) -> None:
    (tmp_path / "srun").write_text("#!/bin/sh\nexit 1\n")
    nodes.join({"cn2": TOLD})
    nodes.steps["cn2"].wait(20)
    assert nodes.ended() == [Lost("cn2", "its step ended (exit code 1)")]
    nodes.release([])


def test_a_lost_node_is_not_waited_for(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 120.0)
    (tmp_path / "cn2.hangs").touch()
    nodes.join({"cn2": TOLD, "cn3": TOLD})
    wait_for(tmp_path / "cn2.told"), wait_for(tmp_path / "cn3.told")
    asked = time.monotonic()
    nodes.release(["cn2"])
    assert time.monotonic() - asked < 60
    assert nodes.steps["cn3"].poll() == 0


def test_a_node_that_does_not_leave_is_not_waited_for_without_end(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_LEAVE_SECONDS", 0.2)
    (tmp_path / "cn2.hangs").touch()
    nodes.join({"cn2": TOLD})
    nodes.release([])
    assert nodes.steps["cn2"].poll() is None


def test_lost_nodes_are_named_in_one_line() -> None:
    loss = NodesLost([Lost("cn2", "no answer"), Lost("cn3", "its step ended")])
    assert str(loss) == "node cn2 was lost: no answer; node cn3 was lost: its step ended"
    assert [node.host for node in loss.nodes] == ["cn2", "cn3"]
