"""Real ranks that train and save as fast as they can, and are killed at random: for test_campaign.py.

An island of two ranks, each with its writer process, in lock-step as a collective would keep them. All
elements of a step are a number that tells step and incarnation, so that no mix of two saves goes unseen.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import struct
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoints.attempts import Retention, candidates, survey, unused_number
from checkpoints.reader import Reader, Shard
from checkpoints.saver import Saver
from checkpoints.writer import Commit
from tests.checkpoints.saving import ROWS, WIDE, State, attempt_of, state_of, wait_until
from tests.parallelism.forked import Ranks

RANKS = 2
TARGETS = ("a rank", "the leader", "all", "a writer", "the leader's writer")


class Board:
    """Numbers that all processes see."""

    FIELDS = ("step 0", "step 1", "writer 0", "writer 1", "saved")

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, 4096)

    def __getitem__(self, name: str) -> int:
        return int(struct.unpack_from("q", self._memory, 8 * self.FIELDS.index(name))[0])

    def __setitem__(self, name: str, value: int) -> None:
        struct.pack_into("q", self._memory, 8 * self.FIELDS.index(name), value)


def rank(directory: Path, incarnation: int, first: int, board: Board) -> None:
    """Train and save every other step, until killed."""
    own = int(os.environ["RANK"])
    state, saver = State(own, RANKS), Saver(own, str(incarnation), WIDE)
    step = first
    while True:
        step += 1
        while min(board[f"step {n}"] for n in range(RANKS)) < step - 1 and step > first + 1:
            time.sleep(0.0002)
        value = 100 * step + incarnation % 100
        state.train(value)
        if step % 2 == 0:
            facts = {"step": step, "value": value}
            lead = Commit(RANKS, facts, WIDE, Retention(3)) if own == 0 else None
            saver.save(attempt_of(directory, step, incarnation), state.shards(), lead)
        good = [outcome for outcome in saver.watch() if outcome.problem is None]
        if own == 0:
            board["saved"] += len(good)
        board[f"writer {own}"] = saver.pid or 0
        board[f"step {own}"] = step


def check(directory: Path) -> tuple[int, int]:
    """Step and incarnation of the newest, after every byte of all checkpoints has been read."""
    found = survey(directory)
    assert found.damaged == []
    for path in candidates(directory):
        reader = Reader(path)
        reader.verify()
        for name in ("w", "m"):
            values = torch.full((RANKS * ROWS,), -1.0)
            reader.read(Shard(name, (RANKS * ROWS,), (0,), values))
            assert bool((values == reader.facts["value"]).all()), f"{path}: a mix of two saves"
    newest = found.facts[found.intact[0]]
    return newest["step"], newest["value"] % 100


@dataclass
class Campaign:
    """Incarnations one after the other, each set back to the newest checkpoint."""

    directory: Path
    ranks: Ranks
    chance: random.Random
    kills: Counter[str] = field(default_factory=Counter)
    within: int = 0  # kills that fell into a save

    def round(self, target: str) -> None:
        """One incarnation, which ends with a kill of `target`."""
        first = check(self.directory)[0] if candidates(self.directory) else 0
        incarnation, board = unused_number(self.directory), Board()
        board["step 0"] = board["step 1"] = first
        self.ranks.start(RANKS, rank, self.directory, incarnation, first, board)
        pids = {number: pid for pid, number in self.ranks.running.items()}
        wait_until(lambda: board["saved"] >= 2, "nothing is saved")
        time.sleep(self.chance.uniform(0, 0.05))
        self._kill(target, pids, board)
        for pid in pids.values():  # the supervisor replaces all of an island; its writers go with it
            _kill(pid)
        ends = self.ranks.wait()
        assert set(ends.values()) == {-signal.SIGKILL}
        writers = [board["writer 0"], board["writer 1"]]
        wait_until(lambda: all(state_of(pid) in "Z" for pid in writers), "a writer outlives its rank")
        newest, by = check(self.directory)
        assert newest > first, "an incarnation's checkpoint is gone"
        assert by == incarnation % 100
        self.kills[target] += 1

    def _kill(self, target: str, pids: dict[int, int], board: Board) -> None:
        victims = {
            "a rank": [pids[1]],
            "the leader": [pids[0]],
            "all": [*pids.values(), board["writer 0"], board["writer 1"]],
            "a writer": [board["writer 1"]],
            "the leader's writer": [board["writer 0"]],
        }[target]
        self.chance.shuffle(victims)
        self.within += bool(survey(self.directory).uncommitted)
        for pid in victims:
            _kill(pid)
        if "writer" in target:  # the ranks go on, and the next checkpoints come
            saved = board["saved"]
            words = f"no checkpoint after the death of {target}"
            wait_until(lambda: board["saved"] >= saved + 4, words, more=lambda: self._describe(pids, board))
            assert victims[0] not in (board["writer 0"], board["writer 1"]), "the kill did not land"

    def _describe(self, pids: dict[int, int], board: Board) -> str:
        """Everything that could tell what it hangs on."""
        newest = sorted(self.directory.iterdir())[-4:]
        files = {path.name: sorted(inner.name for inner in path.iterdir()) for path in newest}
        numbers = {name: board[name] for name in Board.FIELDS}
        states = {pid: state_of(pid) for pid in (*pids.values(), board["writer 0"], board["writer 1"])}
        return f"{numbers} {states} {files} {[self.ranks.log(n) for n in pids]}"


def _kill(pid: int) -> None:
    if state_of(pid):
        os.kill(pid, signal.SIGKILL)
