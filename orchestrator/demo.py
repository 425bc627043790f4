"""`eurotrain demo`: the whole product once, on one machine: two sites, one model, real text, real ledger."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import click

from clusters import events as site_kinds
from clusters.processes import process
from orchestrator import console, demo_text, kinds, stage
from orchestrator.desk import Desk
from orchestrator.state import Event, RunState
from orchestrator.units import micro_units

SITES = {"local-a": "demo-a", "local-b": "demo-b"}  # site -> allocation
VOCABULARY = 4096
_UNIT = "core-hour"
_GRANT = "10"  # units; a demo reserves about 0.7 at each site and uses a tenth of that
STEPS = 60  # per island
_TOKENS_PER_STEP = 2 * 16 * 128  # of both islands: RUN_TOML below

RUN_TOML = """\
name = "demo"

[model]
preset = "llama-3m"

[data]
tokenizer = "data/tokenizer.json"
prefixes = ["data/europe"]

[training]
tokens = {tokens}             # over both islands
sequence_length = 128
global_batch = 16            # sequences per island and step
micro_batch = 8
learning_rate = 4e-3
warmup_steps = 10

[rounds]                     # DiLoCo: 15 inner steps, then one outer step over both islands
inner_steps = 15
outer_learning_rate = 0.7
outer_momentum = 0.9
deadline = "2min"

[checkpoint]
every_steps = 15

[[islands]]
site = "local-a"
allocation = "demo-a"
tp = 2
time_limit = "20min"

[[islands]]
site = "local-b"
allocation = "demo-b"
pp = 2
time_limit = "20min"
"""


def run(*, kill_a_rank: bool, steps: int | None) -> int:
    """Prepare text, sites and budgets, then launch; the exit code of the command."""
    desk = Desk.open()
    spec = prepare(desk, steps)
    plan, _ = desk.ready(spec, desk.plan(spec))
    console.show_plan(plan)
    name = desk.create(spec, plan)
    code = console.coordinate(desk, name, Assassin(desk, name) if kill_a_rank else None)
    tensorboard = Path(sys.executable).parent / "tensorboard"
    click.echo(f"curves:  {tensorboard} --logdir {desk.home.run(name).tensorboard}")
    return code


def prepare(desk: Desk, steps: int | None) -> Path:
    """Everything a demo needs; the run.toml. What is there already stays."""
    folder = desk.home.root / "demo"
    _sites(desk, folder)
    _grants(desk)
    make_data(folder / "data")
    spec = folder / "run.toml"
    spec.write_text(run_toml(steps))
    for site in SITES:
        stage.run_files(desk.stager(site, stage.Options(replace=True)), spec)
    return spec


def _sites(desk: Desk, folder: Path) -> None:
    """Enter the two local sites in sites.toml, below what the operator has there."""
    path = desk.home.sites
    known = desk.sites() if path.exists() else {}
    for site in SITES:
        if site not in known:
            with path.open("a") as stream:
                scratch = json.dumps(str(folder / site))
                stream.write(
                    f'[{site}]\ncatalogue = "local"\nscratch = {scratch}\naccount = "{SITES[site]}"\n\n'
                )


def _grants(desk: Desk) -> None:
    """Each allocation gets its budget once; when demos have used it up, the ledger says so."""
    for allocation in SITES.values():
        desk.ledger.grant(allocation, micro_units(_GRANT), _UNIT, "demo")


def run_toml(steps: int | None) -> str:
    """What the demo asks for."""
    return RUN_TOML.format(tokens=(steps or STEPS) * _TOKENS_PER_STEP)


def make_data(folder: Path) -> None:
    """Text, tokenizer and tokens; what is there and whole stays."""
    text, tokenizer, tokens = folder / "europe.jsonl", folder / "tokenizer.json", folder / "europe"
    if not text.exists():
        characters = demo_text.write(text)
        click.echo(f"text: {sum(characters.values()):,} characters in {len(characters)} languages of the EU")
    program = [sys.executable, "-P", "-m", "parallelism.tokenize"]
    if not tokenizer.exists():
        _step([*program, "train", "--vocabulary", str(VOCABULARY), "--output", str(tokenizer), str(text)])
    _step([*program, "encode", "--tokenizer", str(tokenizer), "--output", str(tokens), str(text)])


def _step(command: list[str]) -> None:
    """Run a preparation step. Raises ValueError with its last line when it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError((done.stderr.strip().splitlines() or [f"{command[3]} failed"])[-1])


@dataclass
class Assassin:
    """Kills one rank of an island with SIGKILL, once, in the middle of its training, and proves it."""

    desk: Desk
    run: str
    site: str = "local-b"
    rank: int = 1
    _done: bool = field(default=False, init=False)

    def __call__(self, event: Event, state: RunState) -> None:
        if self._done or event.kind != site_kinds.STEP or event.site != self.site:
            return
        island = state.islands[self.site]
        # between two checkpoints, so that steps are really lost
        if event.facts["step"] < state.plan_of(self.site)["steps"] * 0.55 or self.rank not in island.ranks:
            return
        self._done = True
        pid = island.ranks[self.rank]
        os.kill(pid, signal.SIGKILL)
        at = time.time()
        facts = {"site": self.site, "rank": self.rank, "pid": pid, "step": event.facts["step"], "at": at}
        what = f"SIGKILL to rank {self.rank} of {self.site}, pid {pid}"
        self.desk.store.record(self.run, kinds.FAULT_INJECTED, what=what, gone_after=_gone(pid), **facts)


def _gone(pid: int) -> float:
    """Seconds until a killed process is dead. Raises RuntimeError when it lives on."""
    began = time.monotonic()
    while time.monotonic() - began < 10:
        if process(pid) is None:
            return time.monotonic() - began
        time.sleep(0.001)
    raise RuntimeError(f"pid {pid} survived SIGKILL")
