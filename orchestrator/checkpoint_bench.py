"""`eurotrain bench checkpoint`: saving, loading and resharding, beside named peers in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orchestrator.child import stream
from orchestrator.spread import spread

if TYPE_CHECKING:
    from rich.table import Table

Row = Mapping[str, float]


@dataclass(frozen=True)
class Ratio:
    """A figure of one repetition, what it says, and what is aimed at."""

    name: str
    of: Callable[[Row], float]
    meaning: str
    aim: str


RATIOS = (
    Ratio("stall_over_memcpy", lambda r: r["stall"] / r["memcpy"],
          "a step's stall / copying the same bytes in memory", "<= 2"),
    Ratio("dcp_stall_over_memcpy", lambda r: r["dcp_stall"] / r["memcpy"],
          "the same of torch's DCP, asynchronous, writing process, stager used again", "context"),
    Ratio("write_over_direct", lambda r: r["direct"] / r["ours"],
          "durable GB/s, commit included / dd past the page cache", ">= 0.8"),
    Ratio("write_over_dcp", lambda r: min(r["dcp"], r["dcp_async"]) / r["ours"],
          "durable GB/s / the faster of dcp.save and dcp.async_save", ">= 1.5"),
    Ratio("write_over_safetensors", lambda r: r["safetensors"] / r["ours"],
          "durable GB/s / safetensors with fsync", ">= 1.5"),
    Ratio("caller_slowdown", lambda r: r["slowdown"] - 1.0,
          "how much longer the median step takes while a save is under way", "<= 0.05"),
    Ratio("verify_share", lambda r: r["checksums"] / r["load_warm"],
          "checksums / loading from the page cache", "<= 0.1"),
    Ratio("reshard_over_load", lambda r: r["reshard_warm"] / r["load_warm"],
          "loading by columns what was saved by rows / loading it by rows", "<= 1.5"),
    Ratio("reshard_over_load_cold", lambda r: r["reshard_cold"] / r["load_cold"],
          "the same from the disk", "<= 1.5"),
    Ratio("files_per_node", lambda r: r["files"], "files of one checkpoint", "<= 8"),
)  # fmt: skip
_ARMS = ("ours", "dcp", "dcp_async", "safetensors", "direct")


def repetitions(directory: Path, ranks: int, size: int, count: int) -> Iterator[dict[str, Any]]:
    """Rows of checkpoints.bench as they come; `size` in bytes per rank. The first one is cold.

    Raises ValueError for too small a size, OSError where the disk is too full.
    """
    options = {"ranks": ranks, "bytes": size, "repetitions": count + 1}
    words = [f"--{name}={value}" for name, value in options.items()]
    yield from stream("checkpoints.bench", [str(directory), *words])


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """Ratios, GB/s and CPU seconds with their spread; the first repetition is told apart."""
    first, *rest = rows
    return {
        "bytes": int(first["bytes"]),
        "repetitions": len(rest),
        "ratios": {ratio.name: spread([ratio.of(row) for row in rest]) for ratio in RATIOS},
        "first": {ratio.name: ratio.of(first) for ratio in RATIOS},
        "gigabytes_per_second": {a: spread([row["bytes"] / row[a] / 1e9 for row in rest]) for a in _ARMS},
        "cpu_seconds": {a: spread([row[f"{a}_cpu"] for row in rest]) for a in _ARMS},
    }


def table(facts: Mapping[str, Any]) -> Table:
    """As people read it."""
    from rich.table import Table

    drawn = Table()
    for column in ("ratio", "median (min-max)", "aim", "first", "what it is"):
        drawn.add_column(column)
    for ratio in RATIOS:
        found = facts["ratios"][ratio.name]
        cells = f"{found['median']:.3g} ({found['min']:.3g}-{found['max']:.3g})"
        drawn.add_row(ratio.name, cells, ratio.aim, f"{facts['first'][ratio.name]:.3g}", ratio.meaning)
    rates = ", ".join(f"{arm} {found['median']:.2f}" for arm, found in facts["gigabytes_per_second"].items())
    work = ", ".join(f"{arm} {found['median']:.2f}" for arm, found in facts["cpu_seconds"].items())
    drawn.caption = (
        f"{facts['repetitions']} repetitions after a first, cold one; {facts['bytes'] / 1e9:.2f} GB;"
        f" durable GB/s: {rates}; CPU seconds: {work}"
    )
    return drawn
