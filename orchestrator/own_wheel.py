"""Wheels of what is installed here: eurotrain's own code, and pip, which unpacks wheels at a site.

The same bytes whoever makes them of the same files. No build backend is needed, and no source tree: an
installed eurotrain has neither.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Mapping
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from clusters.probe import ROOMS, room_files

_NEVER = (1980, 1, 1, 0, 0, 0)  # a zip's first day
_TAG = "py3-none-any"
_WHEEL = f"Wheel-Version: 1.0\nGenerator: eurotrain\nRoot-Is-Purelib: true\nTag: {_TAG}\n"
_KEPT = ("METADATA", "entry_points.txt", "top_level.txt")


def eurotrain(folder: Path) -> Path:
    """A wheel of this installation's own code, editable or not."""
    files: dict[str, bytes] = {}
    for room in ROOMS:
        spec = find_spec(room)
        assert spec is not None
        assert spec.submodule_search_locations
        for name, path in room_files(room, next(iter(spec.submodule_search_locations))):
            files[name] = Path(path).read_bytes()
    return _write(metadata.distribution("eurotrain"), files, folder)


def pip(folder: Path) -> Path:
    """A wheel of this environment's pip. Raises ValueError where it has none."""
    try:
        distribution = metadata.distribution("pip")
    except metadata.PackageNotFoundError:
        raise ValueError(
            "staging a bundle needs pip beside eurotrain: python -m ensurepip, or uv pip install pip"
        ) from None
    listed = [f for f in distribution.files or () if f.parts[0] == "pip" and f.suffix != ".pyc"]
    return _write(distribution, {str(f): Path(f.locate()).read_bytes() for f in listed}, folder)


def _write(distribution: metadata.Distribution, files: Mapping[str, bytes], folder: Path) -> Path:
    name = distribution.metadata["Name"].replace("-", "_")
    info = f"{name}-{distribution.version}.dist-info"
    told = {f"{info}/{kept}": distribution.read_text(kept) for kept in _KEPT}
    content = {**files, **{path: text.encode() for path, text in told.items() if text}}
    content[f"{info}/WHEEL"] = _WHEEL.encode()
    lines = [f"{path},sha256={_digest(data)},{len(data)}" for path, data in sorted(content.items())]
    content[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    target = folder / f"{name}-{distribution.version}-{_TAG}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = target.with_suffix(f".{os.getpid()}.tmp")
    with zipfile.ZipFile(temporary, "w") as archive:
        for path, data in sorted(content.items()):
            entry = zipfile.ZipInfo(path, _NEVER)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, data)
    temporary.replace(target)
    return target


def _digest(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
