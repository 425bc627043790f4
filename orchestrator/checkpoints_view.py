"""Checkpoints as rows (for --json) and as tables (for people): of a directory, of an attempt, of a run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from checkpoints import manifest as form
from checkpoints.attempts import is_attempt, survey
from checkpoints.blocks import damages
from checkpoints.manifest import Damaged, Manifest, Piece
from clusters.events import CHECKPOINT_SAVED
from clusters.paths import SitePaths
from orchestrator.desk import Desk
from orchestrator.units import format_bytes, format_count
from parallelism.layout import Layout

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table

# What a row says of an attempt. The last is of a site that this machine sees no files of.
INTACT, DAMAGED, UNCOMMITTED, REPORTED = "intact", "damaged", "uncommitted", "reported"


@dataclass(frozen=True)
class Place:
    """A directory of attempts, or one attempt; of a site where a run was named."""

    path: Path
    site: str | None = None

    @property
    def attempts(self) -> list[Path]:
        """Committed attempts, damaged ones included, newest first."""
        if is_attempt(self.path):
            return [self.path]
        found = survey(self.path)
        return found.intact + [damage.path for damage in found.damaged]


def places(name: str, site: str | None) -> list[Place]:
    """Where the checkpoints of a directory, an attempt or a run (all its local sites, or one) lie.

    Raises ValueError when there is no such place, or it is at a site that this machine sees no files of.
    """
    path = Path(name)
    if path.is_dir():
        if site is not None:
            raise ValueError(f"--site {site}: {name} is a directory; a site goes with the name of a run")
        return [Place(path)]
    return [place for place in _of_run(name, site) if _seen(place, required=site is not None)]


def _of_run(name: str, site: str | None) -> Iterator[Place]:
    desk = Desk.open()
    run, islands = desk.islands(name, site)
    known = desk.sites()
    for island in islands if site is None else [site]:
        if island not in known:
            raise ValueError(f"{desk.home.sites}: knows no site {island}, which run {run} uses")
        here = not known[island].own.host
        yield Place(SitePaths(known[island].scratch).checkpoints(run, island) if here else Path(), island)


def _seen(place: Place, *, required: bool) -> bool:
    remote = place.path == Path()
    if remote and required:
        raise ValueError(f"site {place.site}: its files are not on this machine; run eurotrain there")
    return not remote


# ---- list


def listing(name: str, site: str | None) -> list[dict[str, Any]]:
    """One row per attempt: of files here by their manifests, of remote sites by what they told."""
    if Path(name).is_dir():
        return [row for place in places(name, site) for row in _rows(place)]
    rows: list[dict[str, Any]] = []
    for place in _of_run(name, site):
        assert place.site is not None
        rows += _rows(place) if place.path != Path() else _reported(Desk.open(), name, place.site)
    return rows


def _rows(place: Place) -> Iterator[dict[str, Any]]:
    if is_attempt(place.path):
        yield _row(place, place.path)
        return
    found = survey(place.path)
    for path in (*found.intact, *(damage.path for damage in found.damaged), *found.uncommitted):
        yield _row(place, path)


def _row(place: Place, path: Path) -> dict[str, Any]:
    row = {"site": place.site, "path": str(path), "name": path.name, "state": INTACT, "reason": None}
    try:
        manifest = form.load(path)
        form.check_files(path, manifest)
    except FileNotFoundError:
        return {**row, "state": UNCOMMITTED, **_unknown()}
    except Damaged as damage:
        return {**row, "state": DAMAGED, "reason": damage.reason, **_unknown()}
    facts = manifest.facts
    told = {"step": facts.get("step"), "tokens": facts.get("tokens"), "layout": facts.get("layout")}
    return {**row, **told, "bytes": manifest.bytes, "files": len(manifest.files)}


def _unknown() -> dict[str, None]:
    return dict.fromkeys(("step", "tokens", "layout", "bytes", "files"))


def _reported(desk: Desk, run: str, site: str) -> list[dict[str, Any]]:
    """What a site told of its saves, newest first; older ones may have been pruned since."""
    told = [event.facts for event in desk.store.events(run, kinds=[CHECKPOINT_SAVED]) if event.site == site]
    return [
        {**_unknown(), "site": site, "path": facts["path"], "name": Path(facts["path"]).name,
         "state": REPORTED, "reason": None, "step": facts["step"], "bytes": facts["bytes"]}
        for facts in reversed(told)
    ]  # fmt: skip


# ---- show


def shown(name: str, site: str | None) -> dict[str, Any]:
    """The manifest of an attempt, or of the newest intact one. Raises ValueError when there is none."""
    found = places(name, site)
    paths = [path for place in found for path in place.attempts]
    if len(found) > 1 and len(paths) > 1:
        raise ValueError(f"{name} has several sites: choose one with --site")
    if not paths:
        raise ValueError(f"{name}: no committed checkpoint")
    manifest = _committed(paths[0])
    return {
        "path": str(paths[0]),
        "kind": manifest.kind,
        "sha256": manifest.sha256,
        "bytes": manifest.bytes,
        "files": dict(manifest.files),
        "facts": dict(manifest.facts),
        "tensors": _tensors(manifest),
    }


def newest(path: Path) -> Path:
    """An attempt, or the newest intact one of a directory. Raises ValueError when there is none."""
    if is_attempt(path):
        return path
    found = survey(path).intact
    if not found:
        raise ValueError(f"{path}: no committed checkpoint")
    return found[0]


def _tensors(manifest: Manifest) -> list[dict[str, Any]]:
    pieces: dict[str, list[Piece]] = defaultdict(list)
    for piece in manifest.pieces:
        pieces[piece.name].append(piece)
    return [
        {"name": name, "dtype": cut[0].dtype, "shape": list(cut[0].global_shape), "pieces": len(cut),
         "bytes": sum(piece.bytes for piece in cut)}
        for name, cut in sorted(pieces.items())
    ]  # fmt: skip


def _committed(path: Path) -> Manifest:
    try:
        return form.load(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: was never committed") from None


# ---- verify


def verified(paths: Iterable[Path], was_read: Callable[[int], object]) -> list[dict[str, Any]]:
    """Read every byte of some attempts; one row each, with what is damaged in it."""
    rows: list[dict[str, Any]] = []
    for path in paths:
        try:
            manifest = _committed(path)
        except Damaged as damage:
            rows.append({"path": str(path), "bytes": None, "damage": [damage.reason]})
            continue
        found = [damage.reason for damage in damages(path, manifest, was_read)]
        rows.append({"path": str(path), "bytes": manifest.bytes, "damage": found})
    return rows


def to_read(paths: Iterable[Path]) -> int:
    """Bytes of tensors in those of some attempts whose manifest can be read."""
    total = 0
    for path in paths:
        try:
            total += sum(piece.bytes for piece in form.load(path).pieces)
        except (Damaged, FileNotFoundError):
            continue
    return total


# ---- tables


def list_table(rows: list[dict[str, Any]]) -> Table:
    drawn = _table("site", "checkpoint", "state", "step", "tokens", "layout", "size", "files")
    for row in rows:
        drawn.add_row(
            row["site"] or "",
            row["path"],
            row["state"] + (f": {row['reason']}" if row["reason"] else ""),
            "" if row["step"] is None else str(row["step"]),
            "" if row["tokens"] is None else format_count(row["tokens"]),
            _layout(row["layout"]),
            "" if row["bytes"] is None else format_bytes(row["bytes"]),
            "" if row["files"] is None else str(row["files"]),
        )
    if any(row["state"] == REPORTED for row in rows):
        drawn.caption = "reported: told by a remote site when it saved; pruned since, perhaps"
    return drawn


def show_tables(facts: dict[str, Any], *, tensors: bool) -> Group:
    from rich.console import Group

    about = _table("", facts["path"])
    about.add_row("kind", facts["kind"])
    about.add_row("manifest sha256", facts["sha256"])
    kept = Counter(tensor["dtype"] for tensor in facts["tensors"])
    about.add_row("tensors", ", ".join(f"{count} {dtype}" for dtype, count in sorted(kept.items())))
    about.add_row("size", f"{format_bytes(facts['bytes'])} in {len(facts['files'])} files")
    for key, value in facts["facts"].items():
        about.add_row(key, _layout(value) if key == "layout" else _plain(value))
    if not tensors:
        return Group(about)
    listed = _table("tensor", "dtype", "shape", "pieces", "size")
    for tensor in facts["tensors"]:
        shape = " x ".join(map(str, tensor["shape"])) or "scalar"
        listed.add_row(
            tensor["name"], tensor["dtype"], shape, str(tensor["pieces"]), format_bytes(tensor["bytes"])
        )
    return Group(about, listed)


def verify_table(rows: list[dict[str, Any]]) -> Table:
    drawn = _table("checkpoint", "size", "damage")
    for row in rows:
        size = "" if row["bytes"] is None else format_bytes(row["bytes"])
        drawn.add_row(row["path"], size, "\n".join(row["damage"]) or "none")
    return drawn


def reshard_table(facts: dict[str, Any]) -> Table:
    drawn = _table("checkpoint", "layout", "size", "files", "read", "seconds")
    drawn.add_row(
        facts["path"],
        _layout(facts["layout"]),
        format_bytes(facts["bytes"]),
        str(facts["files"]),
        format_bytes(facts["read_bytes"]),
        f"{facts['seconds']:.1f}",
    )
    return drawn


def _layout(sizes: Any) -> str:
    return str(Layout.from_mapping(sizes)) if isinstance(sizes, Mapping) else ""


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return "" if value is None else str(value)


def _table(*columns: str) -> Table:
    from rich.table import Table

    drawn = Table()
    for name in columns:
        drawn.add_column(name, overflow="fold")
    return drawn
