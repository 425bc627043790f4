"""The few system calls that Python 3.11 does not offer: mount, umount, setns."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

MS_RDONLY, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1, 32, 4096, 8192, 16384, 1 << 18
CLONE_NEWNET = 0x40000000

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source: str, target: str | Path, kind: str = "", flags: int = 0, options: str = "") -> None:
    arguments = (source, str(target), kind, flags, options)
    encoded = (a.encode() if isinstance(a, str) else a for a in arguments)
    _check(_libc.mount(*encoded), f"mount {source} on {target}")


def bind(source: str | Path, target: str | Path, read_only: bool = False) -> None:
    mount(str(source), target, flags=MS_BIND | MS_REC)
    if read_only:
        mount("none", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def tmpfs(target: str | Path, mode: str = "755") -> None:
    mount("tmpfs", target, "tmpfs", options=f"mode={mode}")


def enter_network(path: str | Path) -> None:
    """Make the calling thread's sockets and devices those of another network namespace."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        _check(_libc.setns(descriptor, CLONE_NEWNET), f"enter {path}")
    finally:
        os.close(descriptor)
