"""What a process that reads foreign files gives up first: processes, sockets, writing elsewhere.

A second wall. The first is that nothing is deserialised that can run code; this one makes the process refuse,
by an audit hook (PEP 578), which nothing can remove, what such code would begin with. Against native code it
is none; no foreign native code is loaded here.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_REFUSED = (
    "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "subprocess.Popen",
    "pty.spawn", "socket.__new__", "socket.connect", "socket.bind", "socket.getaddrinfo", "os.kill",
    "shutil.rmtree",
)  # fmt: skip
_CHANGES = {
    "os.remove": 1, "os.rename": 2, "os.rmdir": 1, "os.link": 2, "os.symlink": 2, "os.chmod": 1,
    "os.chown": 1, "os.truncate": 1, "os.mkdir": 1,
}  # fmt: skip
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def confine(writable: Path) -> None:
    """From here on this process starts nothing, connects nowhere and writes below `writable` only."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    root = str(writable.resolve())

    def inside(path: Any) -> bool:
        if isinstance(path, int):
            return True  # a descriptor that is open already
        real = os.path.realpath(os.fsdecode(path))
        return real == root or real.startswith(root + os.sep) or real == os.devnull

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _REFUSED:
            raise PermissionError(f"a process that reads foreign files must not do {event}")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & _WRITING:
            changed = arguments[:1]
        else:
            changed = arguments[: _CHANGES.get(event, 0)]
        if not all(inside(path) for path in changed if path is not None):
            raise PermissionError(f"a process that reads foreign files must not change {changed[0]!r}")

    sys.addaudithook(watch)


@contextmanager
def memory_limit(extra: int) -> Iterator[None]:
    """Within it, this process gets `extra` more bytes of memory at most; then MemoryError is raised."""
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    limit = held + extra
    resource.setrlimit(resource.RLIMIT_DATA, (limit if soft < 0 else min(limit, soft), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
