"""Islands of different layouts, simulated in one process, and DiLoCo without any: for test_outer*.py."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from checkpoints.attempts import begin, commit
from checkpoints.ranges import Box
from checkpoints.reader import Reader, Shard
from checkpoints.store import write_shards
from checkpoints.update import Header
from clusters.paths import SitePaths
from clusters.rounds import ClosedRound, Contribution, genesis
from clusters.segment import Rounds
from parallelism.drift import added as sketches_added
from parallelism.outer import Outer
from parallelism.updates import commit_update

Tensors = dict[str, torch.Tensor]
RUN = "run-1"
ROUNDS = Rounds(inner_steps=10, quantise="none")
SHAPES = {  # odd enough for vectorised loops to begin and end elsewhere in every layout
    "embedding": (21, 38),
    "layers.0.up": (7, 26),
    "layers.1.up": (7, 26),
    "wide": (3, 650),  # of several groups, cut between two of their ends
    "norm": (19,),
    "scale": (),
}


def start() -> Tensors:
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def training(site: str, moment: int) -> Tensors:
    """What a site trains between two moments: any change will do, the same in all layouts."""
    generator = torch.Generator().manual_seed(1000 * moment + sum(site.encode()))
    return {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


# A layout tells what a rank holds of a tensor: where its part begins and ends per dimension, or nothing.
Layout = Callable[[str, int], tuple[slice, ...] | None]


def columns(name: str, rank: int) -> tuple[slice, ...] | None:
    """As TP2: matrices cut by columns, the rest on both ranks."""
    if len(SHAPES[name]) < 2:
        return tuple(slice(0, side) for side in SHAPES[name])
    rows, width = SHAPES[name]
    return (slice(0, rows), slice(rank * width // 2, (rank + 1) * width // 2))


def stages(name: str, rank: int) -> tuple[slice, ...] | None:
    """As PP2: whole tensors, each on one rank; "scale" on both, as a tied embedding."""
    held = {
        0: ("embedding", "layers.0.up", "scale"),
        1: ("layers.1.up", "wide", "norm", "scale"),
    }
    return tuple(slice(0, side) for side in SHAPES[name]) if name in held[rank] else None


def alone(name: str, rank: int) -> tuple[slice, ...] | None:
    return tuple(slice(0, side) for side in SHAPES[name]) if rank == 0 else None


@dataclass
class Island:
    """The ranks of a site, one after the other in this process, and the site's files."""

    site: str
    layout: Layout
    scratch: Path
    rounds: Rounds = ROUNDS
    ranks: list[Outer] = field(default_factory=list)
    moment: int = 0

    def __post_init__(self) -> None:
        written: set[str] = set()
        for rank in range(2):
            shards = list(self.cut(start(), rank))
            whole = [s for s in shards if s.tensor.numel() == math.prod(s.global_shape)]
            owned = [s for s in shards if s not in whole or s.name not in written]
            written |= {s.name for s in whole}
            self.ranks.append(Outer(shards, owned, self.rounds, RUN, self.site))

    def cut(self, tensors: Tensors, rank: int) -> Iterable[Shard]:
        for name, tensor in tensors.items():
            index = self.layout(name, rank)
            if index is not None:
                offset = tuple(s.start for s in index)
                yield Shard(name, tuple(tensor.shape), offset, tensor[index].clone())

    def train(self, tokens: int = 100) -> Tensors:
        change = training(self.site, self.moment)
        self.moment += 1
        for rank, outer in enumerate(self.ranks):
            outer.tokens += tokens
            for shard, part in zip(outer.shards, self.cut(change, rank), strict=True):
                shard.tensor.add_(part.tensor)
        return change

    @property
    def outbox(self) -> Path:
        return SitePaths(self.scratch).outbox(RUN, self.ranks[0].round + 1, self.site)

    def header(self, step: int = 0) -> Header:
        sketch = sketches_added(outer.sketch() for outer in self.ranks)
        return self.ranks[0].header(step, sketch)

    def parts(self) -> list[Iterator[Shard]]:
        """What each rank writes."""
        cuts = [cut for outer in self.ranks for cut in outer.cuts()]
        return [outer.contribution(cuts) for outer in self.ranks]

    def contribute(self, step: int = 0) -> Contribution:
        header = self.header(step)
        attempt = begin(self.outbox.parent, self.outbox.name)
        for rank, part in enumerate(self.parts()):
            write_shards(attempt, rank, part)
            self.ranks[rank].open = True
        manifest = commit_update(attempt, self.outbox, len(self.ranks), header)
        return Contribution(self.site, manifest.facts["tokens"], manifest.sha256)

    def apply(self, closed: ClosedRound, islands: list[Island], *, last: bool = False) -> float:
        found = {i.site: SitePaths(i.scratch).outbox(RUN, closed.number, i.site) for i in islands}
        averages = [outer.average(closed, lambda site: Reader(found[site])) for outer in self.ranks]
        moved = zip(self.ranks, averages, strict=True)
        return sum(outer.advance(average, last=last) for outer, average in moved) ** 0.5

    def save(self, step: int) -> Path:
        attempt = begin(self.scratch / "checkpoints", f"step-{step:08d}")
        for rank, outer in enumerate(self.ranks):
            write_shards(attempt, rank, outer.shards + outer.owned_state_shards())
        facts = {"step": step, "moment": self.moment, "outer": self.ranks[0].facts()}
        commit(attempt, 2, "checkpoint", facts)
        return attempt

    def restarted(self, checkpoint: Path, layout: Layout | None = None) -> Island:
        """Other processes at the same site, from a checkpoint."""
        reader = Reader(checkpoint)
        island = Island(self.site, layout or self.layout, self.scratch, self.rounds)
        island.moment = reader.facts["moment"]
        for outer in island.ranks:
            outer.restore(reader.facts["outer"])
            for shard in outer.shards + outer.state_shards():
                reader.read(shard)
        return island

    def tensors(self, kind: str) -> Tensors:
        """Global tensors of "live" parameters, "base" or "momentum"; replicas must agree."""
        whole: Tensors = {}
        for outer in self.ranks:
            states = {s.name: s for s in outer.state_shards()}
            for live in outer.shards:
                shard = live if kind == "live" else states[f"outer.{kind}.{live.name}"]
                target = whole.setdefault(live.name, torch.full(live.global_shape, torch.nan))
                part = target[shard.box.slices(Box((0,) * target.dim(), live.global_shape))]
                assert bool((part.isnan() | (part == shard.tensor)).all()), "replicas differ"
                part.copy_(shard.tensor)
        return whole


def close(previous: ClosedRound | None, *contributions: Contribution) -> ClosedRound:
    base, number = (previous.identity, previous.number + 1) if previous else (genesis(RUN), 1)
    return ClosedRound(RUN, number, base, tuple(sorted(contributions, key=lambda c: c.site)))


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """Bitwise, up to the sign of zero."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@dataclass
class Plain:
    """DiLoCo on whole tensors, with its arithmetic spelled out."""

    quantise: str = "none"
    base: Tensors = field(default_factory=start)
    momentum: Tensors = field(default_factory=lambda: {n: torch.zeros(s) for n, s in SHAPES.items()})

    def round(self, parts: list[tuple[int, Tensors]]) -> float:
        """`parts`: tokens and parameters of each island, in the order of their names."""
        total, squares = sum(tokens for tokens, _ in parts), 0.0
        for name, base in self.base.items():
            sent = [(t, coarse(base - theta[name], self.quantise)) for t, theta in parts]
            gradient = sum(difference * (tokens / total) for tokens, difference in sent)
            self.momentum[name] = self.momentum[name] * 0.9 + gradient
            self.base[name] = base - (gradient + self.momentum[name] * 0.9) * 0.7
            squares += float((self.base[name] - base).double().square().sum())
        return squares**0.5


def coarse(values: torch.Tensor, quantise: str) -> torch.Tensor:
    """What is left of a whole tensor when it was sent: each group's values as multiples of its scale."""
    if quantise == "none":
        return values
    group, levels = {"int8": (256, 127), "int4": (64, 7)}[quantise]
    rows = values.reshape(-1, values.shape[-1] if values.dim() else 1)
    found = rows.clone()
    for row in found:
        for part in row.split(group):
            scale = (part.abs().max() / levels).bfloat16().float()
            if scale > 0:
                part.copy_((part / scale).round().clamp(-levels, levels) * scale)
    return found.view(values.shape)


def added(a: Tensors, b: Tensors) -> Tensors:
    return {name: a[name] + b[name] for name in a}
