"""An island's nodes keep copies of each other's files: a ring, in which each node's go to the next one."""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from checkpoints import fast
from checkpoints.channel import Peer, make_token
from checkpoints.peers import Caller, Served
from parallelism.control import Control

_START_SECONDS = 60.0  # for a keeper to import what it needs from a busy file system


@dataclass
class _Node:
    """What the first rank of a node tells the others."""

    host: str = ""
    port: int = 0  # of its keeper; 0: there is none
    held: Mapping[str, Sequence[str]] = field(default_factory=dict)  # by attempt: files that are there


class Peers:
    """All ranks call every method. What fails is told in a rank's log, and there are fewer copies."""

    def __init__(self, control: Control, tier: Path | None, wanted: bool) -> None:
        """`tier`: this node's copies. With `wanted`, and on two nodes or more, the first rank of each (the
        one whose LOCAL_RANK is 0; a node's ranks are neighbours) starts the node's keeper."""
        self.neighbour: Peer | None = None
        self._tier = tier
        self._keeper: subprocess.Popen[bytes] | None = None
        self._callers: list[tuple[Caller, Mapping[str, Sequence[str]]]] = []
        first = os.environ.get("LOCAL_RANK", "0") == "0"
        firsts = control.gather(first) if wanted else []
        token = control.from_leader(lambda: _token(control)) if sum(firsts) > 1 else ""
        if token:
            told = control.gather(self._start(token) if first and tier else _Node())
            nodes = [node for node, leads in zip(told, firsts, strict=True) if leads]
            self._meet(nodes, sum(firsts[: control.rank + 1]) - 1, token)

    def copies(self, attempt: str) -> list[Served]:
        """What other nodes had of an attempt when this incarnation began."""
        return [Served(caller, attempt, held[attempt]) for caller, held in self._callers if attempt in held]

    def close(self) -> None:
        """The node is left as it was found, but for what its own ranks have written."""
        for caller, _ in self._callers:
            caller.close()
        if self._keeper is not None:
            with self._keeper:  # waits, and closes its output
                self._keeper.kill()
            assert self._tier is not None
            fast.forget(self._tier)

    def _meet(self, nodes: Sequence[_Node], own: int, token: str) -> None:
        peers = [Peer(node.host, node.port, token) if node.port else None for node in nodes]
        self.neighbour = peers[(own + 1) % len(nodes)]
        # beginning with the next, so that not all ask the same one
        for number in (*range(own + 1, len(nodes)), *range(own)):
            if (peer := peers[number]) is not None:
                self._callers.append((Caller(peer), nodes[number].held))

    def _start(self, token: str) -> _Node:
        assert self._tier is not None
        try:
            host = _own_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
            command = [sys.executable, "-P", "-m", "checkpoints.keeper", str(os.getpid())]
            command += [str(self._tier), token, host]
            self._keeper = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
            return _Node(host, _port(self._keeper), fast.held(self._tier))
        except OSError as error:
            sys.stderr.write(f"checkpoint.peers: nothing is kept for other nodes here: {error}\n")
            return _Node()


def _token(control: Control) -> str:
    """Path of this incarnation's token: a new name, since a file system may remember another's contents."""
    path = control.paths.root / f"peers-{secrets.token_hex(4)}.token"
    try:
        for old in path.parent.glob("peers-*.token"):
            old.unlink(missing_ok=True)
        make_token(path)
    except OSError as error:
        sys.stderr.write(f"checkpoint.peers is not used: {error}\n")
        return ""
    return str(path)


def _own_address(master: str, port: int) -> str:
    """The address of this node by which it reaches the master, itself included. Nothing is sent."""
    family, kind, protocol, _, address = socket.getaddrinfo(master, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(address)
        return str(probe.getsockname()[0])


def _port(keeper: subprocess.Popen[bytes]) -> int:
    """That it tells when it listens. Raises OSError when it does not."""
    assert keeper.stdout is not None
    readable, _, _ = select.select([keeper.stdout], [], [], _START_SECONDS)
    line = keeper.stdout.readline() if readable else b""
    if not line:
        keeper.kill()
        raise OSError(f"its keeper did not start within {_START_SECONDS:.0f} s, or has ended")
    return int(json.loads(line)["port"])
