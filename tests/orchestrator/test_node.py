"""What a further node does with Ray, with a stand-in for it; the real one: test_segments_on_nodes.py."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from orchestrator.node import Told, answers, command, without_stop_signals

ROOT = Path(__file__).parents[2]
# `orchestrator.node` with another command than Ray's: a process that notes whether it hears SIGTERM.
_NODE = """
import sys
from orchestrator import node
node.SILENCE_SECONDS = float(sys.argv[2])
node.command = lambda told, address, runtime: [
    sys.executable, "-c",
    "import os, signal, sys, time; print(signal.pthread_sigmask(0, []), flush=True);"
    "[time.sleep(0.01) for _ in iter(lambda: os.path.exists(sys.argv[1]), True)]; sys.exit(7)",
    sys.argv[1],
]
sys.exit(node.main())
"""


@pytest.fixture
def head() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening


def address_of(head: socket.socket) -> str:
    host, port = head.getsockname()
    return f"{host}:{port}"


class Node:
    """A node that has been told where the head is."""

    def __init__(self, folder: Path, head: socket.socket, silence: float = 600.0) -> None:
        self.over, self.head = folder / "over", address_of(head)
        self.told = Told(self.head, "a-secret", "rank@cn2", 2)
        environment = {**os.environ, "EUROTRAIN_RUNTIME": str(folder), "GLOO_SOCKET_IFNAME": "lo"}
        words = [sys.executable, "-P", "-c", _NODE, str(self.over), str(silence)]
        self.process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT,
            env={**environment, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(self.told.to_line()[:9])
        self.process.stdin.flush()
        self.process.stdin.write(self.told.to_line()[9:])  # a line may come in pieces
        self.process.stdin.flush()
        self.mask = self.process.stdout.readline().decode()


@pytest.fixture
def node(tmp_path: Path, head: socket.socket, request: pytest.FixtureRequest) -> Iterator[Node]:
    made = Node(tmp_path, head, getattr(request, "param", 600.0))
    yield made
    children = psutil.Process(made.process.pid).children() if made.process.poll() is None else []
    for process in (*children, made.process):
        process.kill()
    made.over.touch()  # ends a stand-in that has outlived the node, as the guard would
    made.process.wait(10)
    made.process.stdout.close()


def cut(node: Node, _: socket.socket) -> None:
    assert node.process.stdin is not None
    node.process.stdin.close()


def terminate(node: Node, _: socket.socket) -> None:
    node.process.terminate()


def test_when_ray_ends_so_does_the_node(node: Node) -> None:
    node.over.touch()
    assert node.process.wait(20) == 7


@pytest.mark.parametrize("ask", [cut, terminate])
def test_asked_to_end_it_ends_when_nobody_answers_at_the_head(
    node: Node, head: socket.socket, ask: Callable[[Node, socket.socket], None]
) -> None:
    ask(node, head)
    with pytest.raises(subprocess.TimeoutExpired):
        node.process.wait(1.5)  # the supervisor lets the ranks save
    head.close()
    assert node.process.wait(20) == 0


@pytest.mark.parametrize("node", [0.5], indirect=True)
def test_unasked_it_ends_when_nobody_has_answered_for_a_while(node: Node, head: socket.socket) -> None:
    with pytest.raises(subprocess.TimeoutExpired):
        node.process.wait(1.5)
    head.close()
    assert node.process.wait(20) == 0


def test_unasked_it_stays_though_nobody_answers_now(node: Node, head: socket.socket) -> None:
    head.close()
    with pytest.raises(subprocess.TimeoutExpired):
        node.process.wait(1.5)


def test_the_token_is_in_a_file_of_the_user_alone(node: Node, tmp_path: Path) -> None:
    assert (tmp_path / "token").read_text() == "a-secret"
    assert oct((tmp_path / "token").stat().st_mode) == "0o100600"


def test_ray_does_not_hear_slurms_sigterm(node: Node) -> None:
    assert "SIGTERM" in node.mask


def test_without_a_word_it_says_so(tmp_path: Path) -> None:
    words = [sys.executable, "-P", "-m", "orchestrator.node"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    popen = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 20}
    end = subprocess.run(words, cwd=ROOT, check=False, env=environment, **popen)
    assert end.returncode == 1
    assert end.stderr.endswith("ValueError: the supervisor has told this node nothing\n")


def test_what_ray_is_asked(tmp_path: Path) -> None:
    told = Told("10.0.0.1:6379", "a-secret", "rank@cn2", 4)
    words = command(told, "10.0.0.2", tmp_path)
    assert "a-secret" not in " ".join(words)
    assert words[1:4] == ["-m", "ray.scripts.scripts", "start"]
    options = dict(word.removeprefix("--").split("=", 1) for word in words if "=" in word)
    assert (options["address"], options["node-ip-address"]) == ("10.0.0.1:6379", "10.0.0.2")
    assert json.loads(options["resources"]) == {"rank@cn2": 4}
    assert options["temp-dir"] == f"{tmp_path}/ray"
    assert "--block" in words


def test_a_signal_that_came_meanwhile_comes_afterwards() -> None:
    heard: list[float] = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(time.monotonic()))
    try:
        with without_stop_signals():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # the runner has other threads
            time.sleep(0.05)
            assert heard == []
            over = time.monotonic()
        assert heard
        assert heard[0] >= over
    finally:
        signal.signal(signal.SIGTERM, before)


def test_whether_somebody_listens(head: socket.socket) -> None:
    where = address_of(head)
    assert answers(where)
    head.close()
    assert not answers(where)
