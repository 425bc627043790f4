"""By which address, and through which interface, the other nodes of an allocation reach this one."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping, Sequence

import psutil

# As NCCL and gloo read them: names, or (NCCL) beginnings of names, the first that is there counts.
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


def own_address(environment: Mapping[str, str], peer: str) -> str:
    """This node's address: of the interface that the job's environment names; else what the node's own name
    stands for; else that of the way to `peer`, another node.

    Many systems resolve their own name to 127.0.1.1, which no other node can use. Raises ValueError when
    nothing is left.
    """
    wanted = named_interfaces(environment)
    if wanted:
        return _of_interface(wanted)
    found = next((a for a in (_resolved(), _towards(peer)) if a and not a.startswith("127.")), None)
    if found is None:
        raise ValueError(f"{socket.gethostname()} has no address for {peer}: set GLOO_SOCKET_IFNAME")
    return found


def named_interfaces(environment: Mapping[str, str]) -> list[str]:
    """Names, or beginnings of names, of the interfaces between nodes; those that are only excluded ("^lo")
    tell nothing."""
    told = (environment.get(variable, "") for variable in VARIABLES)
    value = next((value for value in told if value and not value.startswith("^")), "")
    return [name for name in value.removeprefix("=").split(",") if name]


def interface_of(address: str) -> str:
    """The interface that has an address. Raises ValueError when none has."""
    for name, own in _addresses():
        if own == address:
            return name
    raise ValueError(f"no interface of {socket.gethostname()} has the address {address}")


def _of_interface(wanted: Sequence[str]) -> str:
    there = list(_addresses())
    for name in wanted:
        exact = [address for interface, address in there if interface == name]
        begun = [address for interface, address in there if interface.startswith(name)]
        if exact or begun:
            return (exact or begun)[0]
    names = ", ".join(name for name, _ in there)
    raise ValueError(f"{socket.gethostname()} has no interface {' or '.join(wanted)} (it has {names})")


def _addresses() -> Iterator[tuple[str, str]]:
    for name, addresses in sorted(psutil.net_if_addrs().items()):
        yield from ((name, a.address) for a in addresses if a.family == socket.AF_INET)


def _resolved() -> str | None:
    """What the node's own name stands for, where that is an address it has."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        return None
    return address if address in [own for _, own in _addresses()] else None


def _towards(peer: str) -> str | None:
    """The address that packets to another node would leave with; none is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((peer, 9))
            return str(probe.getsockname()[0])
    except OSError:
        return None
