"""The agent as one file: everything it needs, submitit inside, so that a site needs no installation.

The file is named after its contents and has the same bytes whoever builds it from the same sources, so
that it is carried to a site once. `python3 agent-….pyz < request > answer` needs Python 3.9 there, and
says so in one line to an older one.
"""

from __future__ import annotations

import ast
import base64
import functools
import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

MINIMUM = (3, 9)
_ENTRY = "clusters.agent"
_STARTED = ("clusters.making", "clusters.probe")  # as programs, never imported
_LIBRARIES = ("submitit", "cloudpickle", "typing_extensions")
_NEVER = (1980, 1, 1, 0, 0, 0)  # a zip's first day
# Written for every Python there is: an old one must be able to read the line that turns it away.
_OLD_ENOUGH = f"""\
import sys

if sys.version_info < {MINIMUM}:
    sys.stderr.write(
        "eurotrain agent: Python %d.%d at %s is too old, {MINIMUM[0]}.{MINIMUM[1]} or newer is needed: "
        "name one as `python` of this site in sites.toml\\n"
        % (sys.version_info[0], sys.version_info[1], sys.executable)
    )
    sys.exit(2)
"""
_MAIN = f"""{_OLD_ENOUGH}
from clusters.agent import main

sys.exit(main(framed=True))
"""


@dataclass(frozen=True)
class Package:
    """A file for the sites, by name and contents."""

    name: str
    content: bytes


@functools.lru_cache(maxsize=1)
def build() -> Package:
    """The agent of this installation."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, content in sorted(sources().items()):
            entry = zipfile.ZipInfo(name, _NEVER)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content)
    content = buffer.getvalue()
    return Package(f"agent-{hashlib.sha256(content).hexdigest()[:16]}.pyz", content)


def install_words(path: str, content: bytes) -> list[str]:
    """Arguments for a Python at the site that has `content` on its standard input and puts it at `path`.

    Without a character that some login shell could take for its own.
    """
    code = [_OLD_ENOUGH.encode(), _path("clusters.installer").read_bytes()]
    run = "import base64,sys;exec(base64.b64decode(sys.argv[1]));exec(base64.b64decode(sys.argv[2]))"
    words = [base64.b64encode(part).decode() for part in code]
    return ["-c", run, *words, path, hashlib.sha256(content).hexdigest()]


def sources() -> dict[str, bytes]:
    """What is in the file, by path."""
    found = {"__main__.py": _MAIN.encode(), "clusters/__init__.py": b""}
    for module in sorted(_own_modules()):
        found[f"{module.replace('.', '/')}.py"] = _path(module).read_bytes()
    for library in _LIBRARIES:
        found.update(_library(library))
    return found


def _own_modules() -> set[str]:
    """The entry and all modules of this package that it imports, directly or not."""
    found, todo = set[str](), [_ENTRY, *_STARTED]
    while todo:
        module = todo.pop()
        if module not in found:
            found.add(module)
            todo += _imports(ast.parse(_path(module).read_bytes()))
    return found


def _imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "clusters":
            yield from (f"clusters.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("clusters."):
            yield str(node.module)


def _path(module: str) -> Path:
    spec = find_spec(module)
    assert spec is not None and spec.origin is not None, f"{module} is part of this package"  # noqa: PT018
    return Path(spec.origin)


def _library(name: str) -> Iterator[tuple[str, bytes]]:
    """A distribution's modules without its tests, and its licence."""
    for file in metadata.distribution(name).files or ():
        if "licens" in str(file).lower() and ".dist-info/" in str(file):
            yield f"licences/{name}/{file.name}", Path(file.locate()).read_bytes()
        elif file.suffix == ".py" and not file.name.startswith(("test_", "conftest")):
            yield str(file), Path(file.locate()).read_bytes()
