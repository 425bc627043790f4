"""The catalogue: one file per machine, every fact in it with its source."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

from clusters.facts import Fact, Reader, Source, check_known, facts_of, read_sources
from clusters.groups import (
    Billing,
    Charge,
    Device,
    Energy,
    FileSystem,
    Launch,
    Limits,
    Login,
    Network,
    Node,
    Partition,
    Scheduler,
    Software,
)

SHIPPED = Path(__file__).parent / "catalogue"
_HEAD = ("title", "operator", "read", "sources")  # of a file: what is no fact


@dataclass(frozen=True)
class Machine:
    """Everything known of a machine. `name` is the file's; `where` leads to it."""

    name: str
    where: str
    title: str
    operator: str
    sources: Mapping[str, Source]
    state: Fact[str] | None = None
    scheduler: Scheduler = field(default_factory=Scheduler)
    partition: Mapping[str, Partition] = field(default_factory=dict)
    qos: Mapping[str, Limits] = field(default_factory=dict)
    node: Node = field(default_factory=Node)
    device: Device = field(default_factory=Device)
    launch: Launch = field(default_factory=Launch)
    environment: Mapping[str, Fact[str]] = field(default_factory=dict)
    network: Network = field(default_factory=Network)
    login: Login = field(default_factory=Login)
    filesystem: Mapping[str, FileSystem] = field(default_factory=dict)
    billing: Billing = field(default_factory=Billing)
    charge: Mapping[str, Charge] = field(default_factory=dict)
    energy: Energy = field(default_factory=Energy)
    software: Software = field(default_factory=Software)
    notes: tuple[Fact[str], ...] = ()

    def facts(self) -> Iterator[tuple[str, Fact[Any]]]:
        return facts_of({name: getattr(self, name) for name in _groups()})

    def charges(self, partition: str | None) -> dict[str, Charge]:
        """By unit: what a job in a partition burns; more than one where budgets are drawn on at once."""
        named = {k: c for k, c in self.charge.items() if c.partitions and partition in c.partitions.value}
        rest = {k: c for k, c in self.charge.items() if not c.partitions}
        return {charge.unit.value: charge for charge in (named or rest).values()}


def load_machine(path: Path) -> Machine:
    """Raises ValueError, one line: what is wrong in the file, where, what is allowed."""
    try:
        table = tomllib.loads(path.read_text(), parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: not TOML: {error}") from None
    where, groups = str(path), _groups()
    for key in table:
        check_known(where, key, [*_HEAD, *groups])
    for key in ("title", "operator"):
        if not isinstance(table.get(key), str):
            raise ValueError(f"{where} lacks {key}, a text")
    reader = Reader(where, read_sources(where, table.get("sources", {}), table.get("read")))
    told = reader.fields(Machine, {key: table[key] for key in table if key not in _HEAD}, "", only=groups)
    machine = Machine(path.stem, where, table["title"], table["operator"], reader.sources, **told)
    _check(machine)
    return machine


def _groups() -> list[str]:
    """The tables of a file: the fields of Machine that need not be there."""
    fields = dataclasses.fields(Machine)
    return [f.name for f in fields if not f.default is f.default_factory is dataclasses.MISSING]


def _check(machine: Machine) -> None:
    for key, charge in machine.charge.items():
        charge.formula(f"{machine.where}: [charge.{key}]")
        for name in charge.partitions.value if charge.partitions else ():
            check_known(f"{machine.where}: charge.{key}.partitions", name, machine.partition)
    used = {fact.source.key for _, fact in machine.facts()}
    unused = sorted(set(machine.sources) - used)
    if unused:
        raise ValueError(f"{machine.where}: [sources] {unused[0]} is the source of no fact")


@dataclass(frozen=True)
class Catalogue:
    """Folders of machines' files; the same name in an earlier folder hides that in a later one."""

    folders: tuple[Path, ...] = (SHIPPED,)

    def names(self) -> list[str]:
        return sorted({path.stem for folder in self.folders for path in folder.glob("*.toml")})

    def load(self, name: str) -> Machine:
        """Raises ValueError when there is no such machine, or its file is not right."""
        check_known("catalogue", name, self.names())
        candidates = (folder / f"{name}.toml" for folder in self.folders)
        return load_machine(next(path for path in candidates if path.exists()))
