"""What a job burns: the sites' billing rules as a few named formulas, in exact arithmetic.

Every rule is a rate: units per hour of what a job holds, times its hours. `max` and rounding up act on the
resources, never on the time, so that bills of consecutive jobs add up to the bill of one long job.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from clusters.facts import check_known


@dataclass(frozen=True)
class Resources:
    """What a job holds, as Slurm counts it (a GPU of LUMI is a GCD); None is not known."""

    nodes: int
    gpus: Fraction
    cores: Fraction | None = None
    threads: Fraction | None = None
    memory_gib: Fraction | None = None

    def of(self, name: str) -> Fraction:
        """Raises ValueError when a rule needs what is not known."""
        amount = getattr(self, name)
        if amount is None:
            raise ValueError(f"billing needs the {name.replace('_gib', '')} of a node, which are not known")
        return Fraction(amount)


class Rule(ABC):
    """Units of an allocation that resources burn."""

    @abstractmethod
    def per_hour(self, held: Resources) -> Fraction:
        """Raises ValueError when it needs what is not known of the resources."""

    def units(self, held: Resources, hours: Fraction) -> Fraction:
        return self.per_hour(held) * hours


@dataclass(frozen=True)
class WholeNodes(Rule):
    """`per_node_hour` x nodes: what part of a node the job uses makes no difference."""

    per_node_hour: Fraction

    def per_hour(self, held: Resources) -> Fraction:
        return self.per_node_hour * held.nodes


@dataclass(frozen=True)
class Slices(Rule):
    """`per_slice_hour` x the largest of the job's shares, counted in slices of a node.

    A slice is so many GPUs, cores and GiB of memory; with `whole_slices` each share is rounded up.
    """

    per_slice_hour: Fraction
    gpus_per_slice: Fraction | None = None
    cores_per_slice: Fraction | None = None
    memory_gib_per_slice: Fraction | None = None
    whole_slices: bool = False

    def per_hour(self, held: Resources) -> Fraction:
        sizes = {name: getattr(self, f"{name}_per_slice") for name in ("gpus", "cores", "memory_gib")}
        shares = [held.of(name) / size for name, size in sizes.items() if size is not None]
        assert shares, "a slice without a size"
        return self.per_slice_hour * max(Fraction(math.ceil(s)) if self.whole_slices else s for s in shares)


@dataclass(frozen=True)
class Weights(Rule):
    """The sum of Slurm's TRESBillingWeights: per GPU, per CPU (a hardware thread), per GiB of memory."""

    per_gpu_hour: Fraction = Fraction(0)
    per_thread_hour: Fraction = Fraction(0)
    per_memory_gib_hour: Fraction = Fraction(0)

    def per_hour(self, held: Resources) -> Fraction:
        weights = {n: getattr(self, f"per_{n}_hour") for n in ("gpu", "thread", "memory_gib")}
        names = {"gpu": "gpus", "thread": "threads"}
        amounts = (w * held.of(names.get(n, n)) for n, w in weights.items() if w)
        return sum(amounts, Fraction(0))


RULES: Mapping[str, type[Rule]] = {"nodes": WholeNodes, "slices": Slices, "weights": Weights}


def make_rule(where: str, name: str, parameters: Mapping[str, Any]) -> Rule:
    """A rule by its name in the catalogue. Raises ValueError naming what is unknown, missing or zero."""
    check_known(f"{where} rule", name, RULES)
    fields = {f.name: f for f in dataclasses.fields(RULES[name])}  # type: ignore[arg-type]
    for key, value in parameters.items():
        check_known(f"{where} rule {name!r}", key, fields)
        if key.endswith("_per_slice") and not value:
            raise ValueError(f"{where} {key} is 0; a slice holds more than nothing")
    missing = [n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in parameters]
    if missing:
        raise ValueError(f"{where} rule {name!r} lacks {missing[0]}")
    if name == "slices" and not any(key.endswith("_per_slice") for key in parameters):
        raise ValueError(f"{where} rule 'slices' lacks the size of a slice, such as gpus_per_slice")
    exact = {k: v if isinstance(v, bool) else Fraction(v) for k, v in parameters.items()}
    return RULES[name](**exact)
