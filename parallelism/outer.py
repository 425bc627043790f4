"""The algorithm between sites: DiLoCo (Douillard et al., arXiv 2311.08105), as seen by one rank.

Every island trains by itself; now and then it contributes its difference from the common base, and
applies whatever round the controller has closed since:

    D_s  =  base - theta_s                      for every site s, when it contributes
    g    =  sum over s of w_s D_s               w_s = tokens_s / sum of tokens, in site-name order
    m    =  momentum m + g                      Nesterov, as torch.optim.SGD(nesterov=True)
    base =  base - learning_rate (g + momentum m)
    theta = base + (what this island trained that the new base does not hold)

The last line lets an island train on while its contribution travels, be late, or miss a round. What it
trained since `base` is D_now = base - theta; what the round holds of it is the D that the island itself
contributed, or nothing. Both are differences from the same base, so an island that has not trained since
its contribution ends exactly on the new base, also when it reads the contribution back after a restart.

All of it is elementwise in fp32 with every product rounded before it is added (a fused multiply-add would
make the result depend on where a shard begins), so that all layouts agree bitwise.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checkpoints.attempts import commit
from checkpoints.manifest import MANIFEST, Manifest
from checkpoints.reader import Reader, Shard
from clusters.paths import sync_directory
from clusters.rounds import ClosedRound, Contribution, genesis
from clusters.segment import Rounds


@dataclass(frozen=True)
class Average:
    """A closed round, read and checked, for the shards of one rank."""

    closed: ClosedRound
    differences: list[torch.Tensor]  # g above
    own: list[torch.Tensor]  # D as this island contributed it; empty when the round is without it
    own_tokens: int


class Outer:
    """Base, momentum and place in the chain of rounds, for the shards of one rank.

    Memory: two fp32 copies of the shards, and two more while a round is applied. `round` (the last one
    applied), `chain` (its identity), `tokens` and `open` may be read by the loop, which adds to `tokens`
    what it trains and sets `open` when its contribution is committed.
    """

    def __init__(self, shards: list[Shard], owned: list[Shard], rounds: Rounds, run: str, site: str) -> None:
        """`shards` are all that the rank holds, their tensors (fp32) the live parameters, equal to round
        0's base; `owned` those of them that it, and no replica of it, writes."""
        assert all(shard.tensor.dtype == torch.float32 for shard in shards)
        self.shards = shards
        self.rounds = rounds
        self.run = run
        self.site = site
        self.round = 0
        self.chain = genesis(run)
        self.tokens = 0  # trained, and not yet in the base
        self.open = False  # contributed to the next round
        self._owned = {(shard.name, shard.offset) for shard in owned}
        self._base = [shard.tensor.detach().clone() for shard in shards]
        self._momentum = [torch.zeros_like(base) for base in self._base]

    def contribution(self) -> Iterator[Shard]:
        """The difference of the owned shards, one at a time. Raises ValueError when it is not finite."""
        for shard, base in zip(self.shards, self._base, strict=True):
            if self._owns(shard):
                difference = base - shard.tensor.detach()
                _require_finite(difference, self.site, shard.name)
                yield _like(shard, shard.name, difference)

    def update_facts(self, step: int) -> dict[str, Any]:
        """What the file of the next contribution says of itself. There must be `tokens` to contribute."""
        assert self.tokens > 0
        return {**self._place(self.site), "tokens": self.tokens, "step": step}

    def average(self, closed: ClosedRound, open_update: Callable[[str], Reader]) -> Average:
        """Read a closed round. Nothing changes, so the ranks can agree before any of them advances.

        Raises ValueError when the round does not follow this base, or an update is not the one that it
        lists, or is not finite; Damaged (a ValueError) or Missing as the readers do.
        """
        self._check_follows(closed)
        total = sum(contribution.tokens for contribution in closed.contributions)
        sums = [torch.zeros_like(base) for base in self._base]
        own: list[torch.Tensor] = []
        own_tokens = 0
        for contribution in sorted(closed.contributions, key=lambda c: c.site):
            is_own = contribution.site == self.site
            own_tokens += contribution.tokens if is_own else 0
            values = self._differences(contribution, open_update(contribution.site))
            for so_far, difference in zip(sums, values, strict=True):
                so_far.add_(difference * (contribution.tokens / total))
                if is_own:
                    own.append(difference)
        return Average(closed, sums, own, own_tokens)

    def advance(self, average: Average) -> float:
        """Move base and parameters to the round; returns the sum of squares of the base's movement over
        the owned shards, to be added up over the ranks (its root is the update's norm)."""
        squares = 0.0
        nothing = [None] * len(self.shards)
        for shard, base, momentum, gradient, own in zip(
            self.shards, self._base, self._momentum, average.differences, average.own or nothing, strict=True
        ):
            live = shard.tensor.detach()
            untold = live - base if own is None else own - (base - live)
            movement = self._nesterov(momentum, gradient)
            base.sub_(movement)
            live.copy_(base + untold)
            if self._owns(shard):
                squares += float(movement.double().square().sum())
        self.round, self.chain = average.closed.number, average.closed.identity
        self.tokens -= average.own_tokens
        self.open = False
        return squares

    def apply(self, closed: ClosedRound, open_update: Callable[[str], Reader]) -> float:
        """`average`, then `advance`: for an island whose other ranks need not be asked."""
        return self.advance(self.average(closed, open_update))

    def state_shards(self) -> list[Shard]:
        """Base and momentum of all shards, to be filled from a checkpoint; then `restore` its facts."""
        kinds = {"base": self._base, "momentum": self._momentum}
        return [
            _like(shard, f"outer.{kind}.{shard.name}", tensor)
            for kind, tensors in kinds.items()
            for shard, tensor in zip(self.shards, tensors, strict=True)
        ]

    def owned_state_shards(self) -> list[Shard]:
        """Those of `state_shards` that this rank writes."""
        owned = [self._owns(shard) for shard in self.shards]
        return [shard for shard, is_owned in zip(self.state_shards(), owned * 2, strict=True) if is_owned]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must remember beside the tensors."""
        return {"round": self.round, "chain": self.chain, "tokens": self.tokens, "open": self.open}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take up the place that `facts` of a checkpoint tells. Raises ValueError."""
        types = {"round": int, "chain": str, "tokens": int, "open": bool}
        if set(facts) != set(types) or any(type(facts[key]) is not kind for key, kind in types.items()):
            raise ValueError(f"not the facts of an outer update (round, chain, tokens, open): {dict(facts)}")
        self.round, self.chain = facts["round"], facts["chain"]
        self.tokens, self.open = facts["tokens"], facts["open"]

    def _nesterov(self, momentum: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        momentum.mul_(self.rounds.outer_momentum).add_(gradient)
        return (gradient + momentum * self.rounds.outer_momentum) * self.rounds.outer_learning_rate

    def _differences(self, contribution: Contribution, reader: Reader) -> Iterator[torch.Tensor]:
        self._check_listed(contribution, reader)
        for shard in self.shards:
            values = torch.empty_like(shard.tensor, requires_grad=False)
            reader.read(_like(shard, shard.name, values))
            _require_finite(values, contribution.site, shard.name)
            yield values

    def _check_follows(self, closed: ClosedRound) -> None:
        what = f"closed round {closed.number} of run {closed.run}"
        if closed.run != self.run:
            raise ValueError(f"{what}: this is run {self.run}")
        if closed.number != self.round + 1:
            raise ValueError(f"{what}: cannot follow round {self.round}")
        if closed.base != self.chain:
            raise ValueError(f"{what}: its base is {closed.base[:12]}, this island's {self.chain[:12]}")
        sites = [contribution.site for contribution in closed.contributions]
        if not sites or len(set(sites)) != len(sites):
            raise ValueError(f"{what}: must list at least one site and each once, not {sites}")
        if any(contribution.tokens <= 0 for contribution in closed.contributions):
            raise ValueError(f"{what}: lists an update of no tokens")

    def _check_listed(self, contribution: Contribution, reader: Reader) -> None:
        sha256 = reader.manifest.sha256
        if sha256 != contribution.sha256:
            listed = contribution.sha256[:12]
            raise ValueError(
                f"{reader.path}: its manifest has sha256 {sha256[:12]}, the round lists {listed}"
            )
        expected = {**self._place(contribution.site), "tokens": contribution.tokens}
        _check_facts(reader.path, reader.manifest, expected)

    def _place(self, site: str) -> dict[str, Any]:
        return {"run": self.run, "site": site, "round": self.round + 1, "base": self.chain}

    def _owns(self, shard: Shard) -> bool:
        return (shard.name, shard.offset) in self._owned


def committed_update(outbox: Path, facts: Mapping[str, Any]) -> Manifest | None:
    """The contribution that lies in `outbox`; None when there is none. One process calls it.

    Raises ValueError when it is not of the run, site, round and base that `facts` tells, or is damaged.
    """
    if not (outbox / MANIFEST).exists():
        return None
    manifest = Reader(outbox).manifest
    _check_facts(outbox, manifest, {key: facts[key] for key in ("run", "site", "round", "base")})
    return manifest


def commit_update(attempt: Path, outbox: Path, writers: int, facts: Mapping[str, Any]) -> Manifest:
    """Make what the writers left in `attempt` (`begin(outbox.parent, outbox.name)`) this round's one
    contribution, and return what counts. One process calls it.

    A contribution never changes once it is committed, because it may have been carried away already: when
    an earlier incarnation has left one, that one stays and the attempt is removed. Raises as `commit` and
    `committed_update` do.
    """
    if committed_update(outbox, facts) is None:
        commit(attempt, writers, "update", facts)
        attempt.rename(outbox)
        sync_directory(outbox.parent)
    else:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(attempt)
    manifest = committed_update(outbox, facts)
    assert manifest is not None
    return manifest


def _check_facts(path: Path, manifest: Manifest, expected: Mapping[str, Any]) -> None:
    if manifest.kind != "update":
        raise ValueError(f"{path}: a {manifest.kind}, not an update")
    for key, value in expected.items():
        if manifest.facts.get(key) != value:
            raise ValueError(f"{path}: its {key} is {manifest.facts.get(key)!r}, not {value!r}")


def _require_finite(values: torch.Tensor, site: str, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the update of site {site} is not finite: tensor {name}")


def _like(shard: Shard, name: str, tensor: torch.Tensor) -> Shard:
    return Shard(name, shard.global_shape, shard.offset, tensor)
