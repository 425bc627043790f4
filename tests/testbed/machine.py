"""Process 1 of one machine of a site: mounts, network and daemons; then it buries the dead until killed.

    python -m tests.testbed.machine MACHINE.json

It starts in namespaces of its own (network, mounts, processes, host name), so that whatever it does is
gone when it is killed. The machine shares the host's operating system, but has its own /run, /tmp, /root,
/home, /srv/scratch, /var/spool and accounts; the interpreter and this repository are shown read-only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.testbed import energy, namespaces
from tests.testbed.spec import MOUNT, SCRATCH, SiteSpec
from tests.testbed.wan import DEVICE

_OWN_FILES = ("slurm", "munge", "hosts", "passwd", "group", "shadow")  # of /etc
_HIDDEN = {"/run": "755", "/tmp": "1777", "/root": "755", "/home": "755", "/srv": "755"}
_PATIENCE = 60.0  # seconds for a daemon to answer, on a machine that is busy with tests
_ACCOUNTS_DONE = Path(MOUNT, "accounts.done")
_DATABASE = "/run/mysqld/mysqld.sock"


@dataclass(frozen=True)
class Machine:
    """What process 1 is told."""

    site: SiteSpec
    name: str
    directory: str  # the site's files, on the host
    show: tuple[str, ...]  # directories of the host that the machine sees, read-only

    @property
    def is_login(self) -> bool:
        return self.name == "login"


def load(path: Path) -> Machine:
    raw = json.loads(path.read_text())
    site = SiteSpec(**{**raw["site"], "nodes": tuple(raw["site"]["nodes"])})
    return Machine(site, raw["name"], raw["directory"], tuple(raw["show"]))


def main() -> None:
    machine = load(Path(sys.argv[1]))
    socket.sethostname(machine.name)
    mounts(machine)
    log(f"network of {machine.name}")
    network(machine)
    start("munged", "--num-threads=2", "--key-file=/etc/munge/munge.key", "--log-file=/run/munge/log",
          "--pid-file=/run/munge/pid", "--seed-file=/run/munge/seed", user="munge")  # fmt: skip
    login(machine) if machine.is_login else node(machine)
    Path(MOUNT, f"ready.{machine.name}").touch()
    log("ready")
    bury()


# ---- mounts


def mounts(machine: Machine) -> None:
    """Everything private; sources are opened first, because the mounts hide some of them."""
    namespaces.mount("none", "/", flags=namespaces.MS_REC | namespaces.MS_PRIVATE)
    shown = {path: os.open(path, os.O_PATH) for path in machine.show}
    site = os.open(machine.directory, os.O_PATH)
    for path, mode in _HIDDEN.items():
        namespaces.tmpfs(path, mode)
    for path, descriptor in shown.items():
        Path(path).mkdir(parents=True, exist_ok=True)
        namespaces.bind(f"/proc/self/fd/{descriptor}", path, read_only=True)
    for path in (MOUNT, SCRATCH):
        Path(path).mkdir()
    namespaces.bind(f"/proc/self/fd/{site}", MOUNT)
    own = Path(MOUNT, "machines", machine.name)
    places = {f"{MOUNT}/etc/{name}": f"/etc/{name}" for name in _OWN_FILES}
    places |= {f"{MOUNT}/home": "/home", f"{MOUNT}/scratch": SCRATCH}
    places |= {f"{MOUNT}/log": "/var/log/slurm", str(own): "/var/spool"}
    for source, target in places.items():
        namespaces.bind(source, target)
    _directories(machine.site.gpus_per_node)


def _directories(gpus: int) -> None:
    owners = {"munge": "munge", "slurm": "slurm", "mysqld": "mysql", "sshd": "root", "lock": "root"}
    for name, owner in owners.items():
        run("install", "-d", "-o", owner, f"/run/{name}")
    run("install", "-d", "-o", "slurm", "/var/spool/slurm", "/var/spool/slurm/ctld", "/var/spool/slurm/d")
    for number in range(gpus):
        os.mknod(f"/run/slurm/nvidia{number}", 0o20666, os.makedev(195, number))


# ---- network


def network(machine: Machine) -> None:
    ip("link set lo up")
    if machine.is_login:
        _login_network(machine.site)
    else:
        wait_for(lambda: has_device("eth0"), "eth0")
        ip(f"addr add {machine.site.node_address(machine.name)}/24 dev eth0")
        ip("link set eth0 up")
        if machine.site.egress:
            ip(f"route add default via {machine.site.login_address}")


def _login_network(site: SiteSpec) -> None:
    ip("link add lan0 type bridge")
    ip(f"addr add {site.login_address}/24 dev lan0")
    ip("link set lan0 up")
    for node_name in site.nodes:
        wait_for(lambda name=node_name: has_device(name), f"{node_name}'s cable")  # type: ignore[misc]
        ip(f"link set {node_name} master lan0 up")
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1" if site.egress else "0")
    wait_for(lambda: has_device(DEVICE), DEVICE)
    ip(f"addr add {site.wan_address}/24 dev {DEVICE}")
    ip(f"link set {DEVICE} mtu 1500 txqueuelen 2000 up")
    ip(f"route add default dev {DEVICE} src {site.wan_address}")


def has_device(device: str) -> bool:
    return device in (name for _, name in socket.if_nameindex())


# ---- daemons


def login(machine: Machine) -> None:
    start("/usr/sbin/sshd", "-f", "/etc/slurm/sshd_config", "-E", "/var/log/slurm/sshd.log")
    start("mariadbd", "--no-defaults", f"--datadir={MOUNT}/mysql", f"--socket={_DATABASE}",
          "--pid-file=/run/mysqld/pid", "--skip-networking", "--innodb-buffer-pool-size=32M",
          "--innodb-log-file-size=8M", "--innodb-lock-wait-timeout=900", "--performance-schema=OFF",
          "--innodb-flush-log-at-trx-commit=0", "--log-error=/var/log/slurm/mariadb.log",
          "--skip-log-bin", user="mysql", wait=False)  # fmt: skip
    wait_for(lambda: answers("mariadb-admin", "-S", _DATABASE, "ping"), "the database", pause=0.02)
    sql = "create database if not exists slurm_acct; "
    sql += "create user if not exists slurm@localhost identified via unix_socket; "
    run("mariadb", "-S", _DATABASE, "-e", sql + "grant all on slurm_acct.* to slurm@localhost;")
    start_controllers(machine.site)


def start_controllers(site: SiteSpec) -> None:
    start("slurmdbd", user="slurm")
    wait_for(lambda: answers("sacctmgr", "-n", "-i", "list", "cluster"), "slurmdbd", pause=0.02)
    first = not _ACCOUNTS_DONE.exists()
    if first:
        run("sacctmgr", "-i", "add", "cluster", site.name)
    start("slurmctld", user="slurm")
    if first:
        # A GPU is known to the accounting only when slurmctld has registered with it.
        listing = ("sacctmgr", "-n", "list", "tres")
        wait_for(lambda: "gpu" in output(*listing), "the accounting of GPUs", pause=0.02)
        subprocess.run(["sacctmgr", "-i"], input=Path(MOUNT, "accounts").read_text(), text=True, check=True)
        _ACCOUNTS_DONE.touch()
    wait_for(lambda: answers("scontrol", "ping"), "slurmctld", pause=0.02)


def node(machine: Machine) -> None:
    if machine.site.energy:
        energy.start(Path(SCRATCH, f"watts.{machine.name}"))
    start("slurmd", "-N", machine.name)


def start(*command: str, user: str = "root", wait: bool = True) -> None:
    """Start a daemon; `wait` for those that go to the background by themselves."""
    log("start " + command[0])
    words = [*command]
    if user != "root":
        words = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", *words]
    process = subprocess.Popen(words, stdin=subprocess.DEVNULL)
    if wait and process.wait():
        raise RuntimeError(f"{command[0]} has exit code {process.returncode}")


# ---- helpers


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)


def output(*command: str) -> str:
    return subprocess.run(
        command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
    ).stdout


def answers(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False, stdin=subprocess.DEVNULL).returncode == 0


def ip(arguments: str) -> None:
    run("ip", *arguments.split())


def wait_for(condition: Callable[[], bool], what: str, pause: float = 0.005) -> None:
    deadline = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"no sign of {what} after {_PATIENCE:.0f} s")
        time.sleep(pause)


def log(text: str) -> None:
    print(f"{time.time():.3f} {text}", flush=True)


def bury() -> None:
    """Process 1 inherits every orphan; signals have no effect on it unless it asks for them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGCHLD])
    while True:
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        signal.sigtimedwait([signal.SIGCHLD], 1.0)


if __name__ == "__main__":
    main()
