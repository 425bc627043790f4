"""What an interpreter is, told by itself: `python -c "<this file>"` prints one line of JSON.

It runs in interpreters that know nothing of eurotrain, and tells those which do what code they have.
Standard library only, and as old a Python as can be.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import sys
from importlib import metadata

ROOMS = ("orchestrator", "kernels", "parallelism", "clusters", "checkpoints")
_TOLD = ("eurotrain", "torch", "megatron-core", "ray", "submitit", "numpy", "triton", "transformer-engine")


def facts() -> dict:  # type: ignore[type-arg]
    """Of the interpreter that runs this."""
    implementation = "%d.%d.%d" % sys.implementation.version[:3]  # noqa: UP031 - as old as can be
    return {
        "executable": sys.executable,
        "version": platform.python_version(),
        "python": "%d.%d" % sys.version_info[:2],  # noqa: UP031
        "libc": libc(),
        "code": code_digest(),
        "packages": packages(),
        "markers": {  # as PEP 508 names them
            "implementation_name": sys.implementation.name,
            "implementation_version": implementation,
            "os_name": os.name,
            "platform_machine": platform.machine(),
            "platform_python_implementation": platform.python_implementation(),
            "platform_release": platform.release(),
            "platform_system": platform.system(),
            "platform_version": platform.version(),
            "python_full_version": platform.python_version(),
            "python_version": "%d.%d" % sys.version_info[:2],  # noqa: UP031
            "sys_platform": sys.platform,
        },
    }


def libc() -> str:
    """ "glibc 2.31", or "musl" where nobody tells."""
    try:
        return os.confstr("CS_GNU_LIBC_VERSION") or "musl"
    except (AttributeError, ValueError, OSError):
        return "musl"


def packages() -> dict:  # type: ignore[type-arg]
    """Versions of what a segment runs on, as far as they are installed."""
    found = {}
    for name in _TOLD:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def code_digest() -> str:
    """SHA-256 of eurotrain's own files; empty where it is not installed."""
    whole = hashlib.sha256()
    for room in ROOMS:
        spec = importlib.util.find_spec(room)
        if spec is None or not spec.submodule_search_locations:
            return ""
        for name, path in room_files(room, next(iter(spec.submodule_search_locations))):
            with open(path, "rb") as stream:  # noqa: PTH123
                whole.update(name.encode() + b"\0" + hashlib.sha256(stream.read()).digest())
    return whole.hexdigest()


def room_files(room: str, folder: str) -> list:  # type: ignore[type-arg]
    """(name in the package, path) of every file that belongs to it, in order."""
    found = []
    for base, _, names in os.walk(folder):
        if os.path.basename(base) != "__pycache__":  # noqa: PTH119
            inside = os.path.relpath(base, folder)
            prefix = room if inside == "." else room + "/" + inside.replace(os.sep, "/")
            found += [(prefix + "/" + n, os.path.join(base, n)) for n in names if not n.endswith(".pyc")]  # noqa: PTH118
    return sorted(found)


if __name__ == "__main__":
    sys.stdout.write("\n" + json.dumps(facts()) + "\n")
