from __future__ import annotations

import socket
from types import SimpleNamespace

import psutil
import pytest

from orchestrator.address import interface_of, named_interfaces, own_address

IP4, IP6 = socket.AF_INET, socket.AF_INET6


@pytest.fixture(autouse=True)
def node(monkeypatch: pytest.MonkeyPatch) -> None:
    """A node with a slow network, two fast ones, and a name that stands for nothing."""

    def card(*addresses: tuple[int, str]) -> list[SimpleNamespace]:
        return [SimpleNamespace(family=family, address=address) for family, address in addresses]

    cards = {
        "lo": card((IP4, "127.0.0.1")),
        "eth0": card((IP6, "fe80::1"), (IP4, "10.0.0.5")),
        "hsn1": card((IP4, "172.16.1.5")),
        "hsn0": card((IP4, "172.16.0.5")),
        "hsn10": card((IP4, "172.16.10.5")),
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: cards)
    monkeypatch.setattr(socket, "gethostname", lambda: "cn5")
    resolves(monkeypatch, None)
    leaves_from(monkeypatch, "10.0.0.5")


def resolves(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    def lookup(name: str) -> str:
        assert name == "cn5"
        if address is None:
            raise OSError("no such host")
        return address

    monkeypatch.setattr(socket, "gethostbyname", lookup)


def leaves_from(monkeypatch: pytest.MonkeyPatch, address: str | None) -> None:
    monkeypatch.setattr("orchestrator.address._towards", lambda peer: address)


@pytest.mark.parametrize(
    ("environment", "address"),
    [
        ({"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "hsn0"}, "10.0.0.5"),
        ({"NCCL_SOCKET_IFNAME": "hsn1,hsn0"}, "172.16.1.5"),
        ({"NCCL_SOCKET_IFNAME": "hsn"}, "172.16.0.5"),  # a beginning
        ({"NCCL_SOCKET_IFNAME": "=hsn10"}, "172.16.10.5"),
        ({"GLOO_SOCKET_IFNAME": "ib0,hsn1"}, "172.16.1.5"),  # the first that is there
        ({"GLOO_SOCKET_IFNAME": "hsn1"}, "172.16.1.5"),  # exact before beginnings
        ({"NCCL_SOCKET_IFNAME": "^lo,docker"}, "10.0.0.5"),  # only what not to take
        ({}, "10.0.0.5"),
    ],
)
def test_the_interface_that_is_named_counts(environment: dict[str, str], address: str) -> None:
    assert own_address(environment, "cn6") == address


def test_the_nodes_name_goes_before_the_way_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    resolves(monkeypatch, "172.16.0.5")
    assert own_address({}, "cn6") == "172.16.0.5"


@pytest.mark.parametrize("useless", ["127.0.1.1", "127.0.0.1", "192.168.7.7"])
def test_a_name_that_stands_for_what_no_other_node_can_use(
    monkeypatch: pytest.MonkeyPatch, useless: str
) -> None:
    resolves(monkeypatch, useless)
    assert own_address({}, "cn6") == "10.0.0.5"


def test_what_is_named_and_not_there_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^cn5 has no interface ib0 or ib1 \(it has eth0, hsn0, hsn1, hsn10, lo\)$"
    ):
        own_address({"NCCL_SOCKET_IFNAME": "ib0,ib1"}, "cn6")


@pytest.mark.parametrize("way", [None, "127.0.0.1"])
def test_without_any_address_it_says_what_to_set(monkeypatch: pytest.MonkeyPatch, way: str | None) -> None:
    leaves_from(monkeypatch, way)
    with pytest.raises(ValueError, match=r"^cn5 has no address for cn6: set GLOO_SOCKET_IFNAME$"):
        own_address({}, "cn6")


def test_names_as_they_are_written() -> None:
    assert named_interfaces({"NCCL_SOCKET_IFNAME": "=ib0,ib1,"}) == ["ib0", "ib1"]
    assert named_interfaces({"GLOO_SOCKET_IFNAME": ""}) == []


def test_an_address_belongs_to_an_interface() -> None:
    assert interface_of("172.16.1.5") == "hsn1"
    assert interface_of("127.0.0.1") == "lo"
    with pytest.raises(ValueError, match=r"^no interface of cn5 has the address 10.0.0.6$"):
        interface_of("10.0.0.6")


def test_the_way_to_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from orchestrator import address

    assert address._towards("127.0.0.1") == "127.0.0.1"
    assert address._towards("no-such-host.invalid") is None
