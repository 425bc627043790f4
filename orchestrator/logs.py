"""What ranks and supervisors wrote, as far as it has come home: runs/<run>/logs/<site>/<segment>/*.log."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

from orchestrator.home import RunFolder

_POLL_SECONDS = 0.5


def lines(
    folder: RunFolder, site: str | None, rank: int | None, ended: Callable[[], bool] | None
) -> Iterator[str]:
    """Lines with segment and file before them; with `ended`, also those to come until the run has ended.

    Raises ValueError when there is no such log.
    """
    positions: dict[Path, int] = {}
    while True:
        last = ended is None or ended()
        yield from _new(folder, site, rank, positions, torn=last)
        if last:
            break
        time.sleep(_POLL_SECONDS)
    if not positions:
        raise ValueError(f"{folder.root / 'logs'}: no logs of {_wanted(site, rank)} yet")


def _new(
    folder: RunFolder, site: str | None, rank: int | None, positions: dict[Path, int], *, torn: bool
) -> Iterator[str]:
    """What the files have gained; with `torn`, also a last line that nobody may ever finish."""
    name = "*" if rank is None else f"rank-{rank:04d}"
    for path in sorted((folder.root / "logs").glob(f"{site or '*'}/*/{name}.log")):
        with path.open("rb") as stream:
            stream.seek(positions.get(path, 0))
            block = stream.read()
        whole = block if torn else block[: block.rfind(b"\n") + 1]
        positions[path] = positions.get(path, 0) + len(whole)
        label = f"{path.parent.name} {path.stem}"
        yield from (f"{label} | {line}" for line in whole.decode(errors="replace").splitlines())


def _wanted(site: str | None, rank: int | None) -> str:
    return f"site {site or 'any'}, rank {'any' if rank is None else rank}"
