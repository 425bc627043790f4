"""The algorithm between sites: DiLoCo (Douillard et al., arXiv 2311.08105), as seen by one rank.

Every island trains by itself; now and then it contributes its difference from the common base, and
applies whatever round the controller has closed since:

    D_s  =  Q(base - theta_s)                   for every site s, when it contributes; Q quantises
    g    =  sum over s of w_s D_s               w_s = tokens_s / sum of tokens, in site-name order
    m    =  momentum m + g                      Nesterov, as torch.optim.SGD(nesterov=True)
    base =  base - learning_rate (g + momentum m)
    theta = base + (what this island trained that the new base does not hold)

The last line lets an island train on while its contribution travels, be late, or miss a round. What it
trained since `base` is base - theta; what the round holds of it is the D that the island itself sent, or
nothing. Both are differences from the same base, so an island that sent all it had and has not trained
since ends exactly on the new base, also when it reads the contribution back after a restart.

It is the error feedback of quantisation as well: what Q lost was trained and is not in the base, so theta
keeps it and the next difference holds it (error reset: Xie et al., CSER, arXiv 2007.13221). Checkpoints
need no third copy for it. After the last round theta leaves it behind: all islands end as one model.

All of it is elementwise in fp32 with every product rounded before it is added (a fused multiply-add would
make the result depend on where a shard begins), so that all layouts agree bitwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from checkpoints.formats import QUANTISED, QUANTISERS
from checkpoints.quantised import CutMaxima, cut_maxima
from checkpoints.reader import QuantisedShard, Reader, Shard
from checkpoints.update import STATE, Header
from clusters.rounds import ClosedRound, Contribution, genesis
from clusters.segment import Rounds
from parallelism.drift import Sketch, sketch
from parallelism.updates import check_header


@dataclass(frozen=True)
class Average:
    """A closed round, read and checked, for the shards of one rank."""

    closed: ClosedRound
    differences: list[torch.Tensor]  # g above
    own: list[torch.Tensor]  # D as this island sent it; empty when the round is without it
    own_tokens: int
    state: list[Shard] = field(default_factory=list)  # all `state_shards` anew, where the round resets them


class Outer:
    """Base, momentum and place in the chain of rounds, for the shards of one rank.

    Memory: two fp32 copies of the shards, and two more while a round is applied, four when it resets the
    state. `round` (the last one applied), `chain` (its identity), `reset_from` (whose state the next round
    brings), `tokens` and `open` may be read by the loop, which adds to `tokens` what it trains and sets
    `open` when its contribution is committed.
    """

    def __init__(self, shards: list[Shard], owned: list[Shard], rounds: Rounds, run: str, site: str) -> None:
        """`shards` are all that the rank holds, their tensors (fp32) the live parameters, equal to round
        0's base; `owned` those of them that it, and no replica of it, writes. Raises ValueError."""
        assert all(shard.tensor.dtype == torch.float32 for shard in shards)
        if rounds.quantise not in QUANTISERS:
            raise ValueError(
                f"rounds.quantise is {rounds.quantise!r}: must be one of {', '.join(QUANTISERS)}"
            )
        self.shards = shards
        self.rounds = rounds
        self.run = run
        self.site = site
        self.round = 0
        self.chain = genesis(run)
        self.reset_from = ""
        self.tokens = 0  # trained, and not yet in the base
        self.open = False  # contributed to the next round
        self._owned = {(shard.name, shard.offset) for shard in owned}
        self._base = [shard.tensor.detach().clone() for shard in shards]
        self._momentum = [torch.zeros_like(base) for base in self._base]

    def cuts(self) -> list[CutMaxima]:
        """What other ranks need to know of this one's difference: of all ranks together, `contribution`
        needs it. Raises ValueError when the difference is not finite."""
        form = QUANTISED.get(QUANTISERS[self.rounds.quantise])
        if form is None:
            return []
        return [
            cut
            for shard in self._differences()
            for cut in cut_maxima(shard.name, shard.global_shape, shard.offset, shard.tensor, form)
        ]

    def contribution(self, cuts: list[CutMaxima]) -> Iterator[Shard]:
        """What is written: the difference of the owned shards, one at a time, and the state where it is
        asked for. Raises ValueError when the difference is not finite."""
        form = QUANTISERS[self.rounds.quantise]
        for shard in self._differences():
            if form in QUANTISED:
                yield QuantisedShard(shard.name, shard.global_shape, shard.offset, shard.tensor, form, cuts)
            else:
                yield shard
        if self._gives_state:
            yield from self.owned_state_shards()

    def header(self, step: int, sketch: Sketch) -> Header:
        """What the file of the next contribution says of itself; `sketch` of all ranks together. There
        must be `tokens` to contribute."""
        assert self.tokens > 0
        place = {"run": self.run, "site": self.site, "round": self.round + 1, "base": self.chain}
        what = {"quantiser": self.rounds.quantise, "state": self._gives_state, "sketch": sketch}
        return Header(**place, **what, tokens=self.tokens, step=step)  # type: ignore[arg-type]

    def sketch(self) -> Sketch:
        """Of the base, as far as this rank owns it."""
        pairs = zip(self.shards, self._base, strict=True)
        return sketch(_like(shard, shard.name, base) for shard, base in pairs if self._owns(shard))

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
        state: list[Shard] = []
        for contribution in closed.contributions:
            is_own = contribution.site == self.site
            own_tokens += contribution.tokens if is_own else 0
            reader = open_update(contribution.site)
            check_header(reader.path, reader.manifest, closed, contribution, self.reset_from)
            for so_far, difference in zip(sums, self._read(reader, contribution), strict=True):
                so_far.add_(difference * (contribution.tokens / total))
                if is_own:
                    own.append(difference)
            if contribution.site == self.reset_from:
                state = [_read(reader, contribution, _empty(shard)) for shard in self.state_shards()]
        return Average(closed, sums, own, own_tokens, state)

    def advance(self, average: Average, *, last: bool = False) -> float:
        """Move base and parameters to the round; returns the sum of squares of the base's movement over
        the owned shards, to be added up over the ranks (its root is the update's norm). After the `last`
        round of a run an island with nothing left to contribute lands on the base."""
        discarded = self.site in average.closed.discarded
        self.tokens = 0 if discarded else self.tokens - average.own_tokens
        lands = discarded or (last and self.tokens == 0)
        squares = 0.0
        for index, shard in enumerate(self.shards):
            base, momentum, live = self._base[index], self._momentum[index], shard.tensor.detach()
            untold = live - base  # what theta has beyond the base, and the round has not
            if average.own:
                untold += average.own[index]
            if average.state:
                base.copy_(average.state[index].tensor)
                momentum.copy_(average.state[len(self.shards) + index].tensor)
            movement = self._nesterov(momentum, average.differences[index])
            base.sub_(movement)
            live.copy_(base if lands else base + untold)
            if self._owns(shard):
                squares += float(movement.double().square().sum())
        self.round, self.chain = average.closed.number, average.closed.identity
        self.reset_from = average.closed.reset_from
        self.open = False
        return squares

    def state_shards(self) -> list[Shard]:
        """Base and momentum of all shards, to be filled from a checkpoint; then `restore` its facts."""
        kinds = {"base": self._base, "momentum": self._momentum}
        return [
            _like(shard, f"{STATE}{kind}.{shard.name}", tensor)
            for kind, tensors in kinds.items()
            for shard, tensor in zip(self.shards, tensors, strict=True)
        ]

    def owned_state_shards(self) -> list[Shard]:
        """Those of `state_shards` that this rank writes."""
        owned = [self._owns(shard) for shard in self.shards]
        return [shard for shard, is_owned in zip(self.state_shards(), owned * 2, strict=True) if is_owned]

    def facts(self) -> dict[str, Any]:
        """What a checkpoint must remember beside the tensors."""
        return {name: getattr(self, name) for name in _FACTS}

    def restore(self, facts: Mapping[str, Any]) -> None:
        """Take up the place that `facts` of a checkpoint tells. Raises ValueError."""
        if set(facts) != set(_FACTS) or any(type(facts[key]) is not kind for key, kind in _FACTS.items()):
            raise ValueError(f"not the facts of an outer update ({', '.join(_FACTS)}): {dict(facts)}")
        for name in _FACTS:
            setattr(self, name, facts[name])

    @property
    def _gives_state(self) -> bool:
        return self.reset_from == self.site

    def _differences(self) -> Iterator[Shard]:
        """base - theta of the owned shards, one at a time."""
        for shard, base in zip(self.shards, self._base, strict=True):
            if self._owns(shard):
                difference = base - shard.tensor.detach()
                _require_finite(difference, self.site, shard.name)
                yield _like(shard, shard.name, difference)

    def _nesterov(self, momentum: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        momentum.mul_(self.rounds.outer_momentum).add_(gradient)
        return (gradient + momentum * self.rounds.outer_momentum) * self.rounds.outer_learning_rate

    def _read(self, reader: Reader, contribution: Contribution) -> Iterator[torch.Tensor]:
        for shard in self.shards:
            yield _read(reader, contribution, _empty(shard)).tensor

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

    def _owns(self, shard: Shard) -> bool:
        return (shard.name, shard.offset) in self._owned


_FACTS = {"round": int, "chain": str, "reset_from": str, "tokens": int, "open": bool}


def _read(reader: Reader, contribution: Contribution, shard: Shard) -> Shard:
    reader.read(shard)
    _require_finite(shard.tensor, contribution.site, shard.name)
    return shard


def _require_finite(values: torch.Tensor, site: str, name: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise ValueError(f"the update of site {site} is not finite: tensor {name}")


def _empty(shard: Shard) -> Shard:
    return _like(shard, shard.name, torch.empty_like(shard.tensor, requires_grad=False))


def _like(shard: Shard, name: str, tensor: torch.Tensor) -> Shard:
    return Shard(name, shard.global_shape, shard.offset, tensor)
