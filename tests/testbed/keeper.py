"""Keeps a test bed: starts its machines and its WAN, and holds all of them by one process namespace.

    unshare --net --mount --pid --fork --kill-child --mount-proc python -m tests.testbed.keeper DIRECTORY

It is process 1 of that namespace, so that whatever ends it ends everything; its network namespace is the
operator's end of the WAN. Nothing of the host is touched: no device, no mount, no route.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from tests.testbed import machine, namespaces
from tests.testbed.spec import HUB_ADDRESS, SiteSpec
from tests.testbed.wan import DEVICE

UNSHARE = (
    "unshare",
    "--net",
    "--mount",
    "--pid",
    "--uts",
    "--ipc",
    "--fork",
    "--kill-child=SIGKILL",
    "--mount-proc",
)
ALONE = "--alone"  # standard input is no lifeline
_AGAIN = "--again"  # SITE NODE: run beside the keeper, in its namespaces


class Keeper:
    """The processes of one test bed."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        raw = json.loads((directory / "bed.json").read_text())
        self.sites = [SiteSpec(**{**site, "nodes": tuple(site["nodes"])}) for site in raw["sites"]]
        self.show = raw["show"]
        self.pids: dict[str, dict[str, int]] = {}  # of the process that holds each machine's namespaces

    def up(self) -> None:
        namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
        machine.ip("link set lo up")
        database = ThreadPoolExecutor(1).submit(self._databases)
        for site in self.sites:
            self.pids[site.name] = {}
            for name in site.nodes:
                self.start(site, name)
        database.result()
        for site in self.sites:
            self.start(site, "login")
            for name in site.nodes:
                self.connect(site, name)
        self._wan()
        (self.directory / "pids.json").write_text(json.dumps(self.pids))
        for site in self.sites:
            for name in site.machines:
                self._wait_until_ready(site, name)

    def _databases(self) -> None:
        """One empty database, made in memory, copied to every site."""
        template = "/run/mysql"
        namespaces.tmpfs("/run")
        machine.run("install", "-d", "-o", "mysql", template)
        machine.run(
            "mariadb-install-db", "--no-defaults", f"--datadir={template}", "--user=mysql", "--skip-test-db",
            "--auth-root-authentication-method=socket", "--innodb-log-file-size=8M",
            "--innodb-buffer-pool-size=32M",
        )  # fmt: skip
        for site in self.sites:
            machine.run("cp", "-a", template, str(self.directory / site.name / "mysql"))
        shutil.rmtree(template)

    def start(self, site: SiteSpec, name: str) -> None:
        """Start a machine, also again after a power cut."""
        home = self.directory / site.name
        (home / f"ready.{name}").unlink(missing_ok=True)
        (home / "machines" / name).mkdir(parents=True, exist_ok=True)
        told = machine.Machine(site, name, str(home), tuple(self.show))
        path = home / f"{name}.json"
        path.write_text(json.dumps(asdict(told)))
        log = (home / "log" / f"machine.{name}.log").open("ab")
        command = [*UNSHARE, sys.executable, "-m", "tests.testbed.machine", str(path)]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        machine.wait_for(lambda: _network(process.pid) != _network(os.getpid()), "a new network namespace")
        self.pids[site.name][name] = process.pid

    def connect(self, site: SiteSpec, name: str) -> None:
        """A cable from the login machine's bridge to a node."""
        pids = self.pids[site.name]
        machine.ip(f"link add {name} netns {pids['login']} type veth peer name eth0 netns {pids[name]}")

    def again(self, site_name: str, name: str) -> None:
        """Power on a node that has lost it."""
        self.pids = json.loads((self.directory / "pids.json").read_text())
        site = next(site for site in self.sites if site.name == site_name)
        at_login = ["nsenter", f"--net=/proc/{self.pids[site_name]['login']}/ns/net", "ip", "link"]
        # the old cable stays as long as the dead node's network has connections that nobody answered
        subprocess.run([*at_login, "delete", name], check=False, capture_output=True)
        self.start(site, name)
        self.connect(site, name)
        machine.run(*at_login, "set", name, "master", "lan0", "up")
        self._wait_until_ready(site, name)
        (self.directory / "pids.json").write_text(json.dumps(self.pids))

    def _wan(self) -> None:
        ends = [{"name": "hub", "pid": os.getpid(), "networks": [HUB_ADDRESS.rpartition(".")[0]]}]
        for site in self.sites:
            networks = [site.wan_address.rpartition(".")[0], site.lan]
            ends.append({"name": site.name, "pid": self.pids[site.name]["login"], "networks": networks})
        path = self.directory / "wan.json"
        path.write_text(json.dumps({"default": {}, "links": {}, "ends": ends}))
        subprocess.Popen([sys.executable, "-m", "tests.testbed.wan", str(path)], stdin=subprocess.DEVNULL)
        machine.wait_for(lambda: machine.has_device(DEVICE), DEVICE)
        machine.ip(f"addr add {HUB_ADDRESS}/24 dev {DEVICE}")
        machine.ip(f"link set {DEVICE} mtu 1500 txqueuelen 2000 up")
        machine.ip(f"route add default dev {DEVICE} src {HUB_ADDRESS}")

    def _wait_until_ready(self, site: SiteSpec, name: str) -> None:
        ready = self.directory / site.name / f"ready.{name}"
        holder = Path(f"/proc/{self.pids[site.name][name]}/stat")

        def settled() -> bool:
            if holder.read_text().rpartition(")")[2].split()[0] == "Z":
                log = self.directory / site.name / "log" / f"machine.{name}.log"
                raise RuntimeError(f"{site.name}/{name} has ended; {log}: {log.read_text()[-800:]}")
            return ready.exists()

        machine.wait_for(settled, f"{site.name}/{name}", pause=0.02)


def _network(pid: int) -> str:
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def _end_with_standard_input() -> None:
    """Whoever started us holds the other end; when that process is gone, however it ended, we go too."""
    sys.stdin.buffer.read()
    os._exit(0)  # ends the namespace's process 1, and thereby everything in it


def main() -> None:
    directory = Path(sys.argv[1])
    if _AGAIN in sys.argv:
        return Keeper(directory).again(*sys.argv[3:])
    if ALONE not in sys.argv:
        threading.Thread(target=_end_with_standard_input, daemon=True).start()
    keeper = Keeper(directory)
    try:
        keeper.up()
    except Exception as error:
        (directory / "failed").write_text(f"{type(error).__name__}: {error}")
        raise
    (directory / "ready").write_text(f"{time.time()}")
    return machine.bury()


if __name__ == "__main__":
    main()
