"""A test bed as tests use it: real Slurm sites on this machine, reached by SSH across a WAN.

    with Testbed(tmp_path / "bed") as bed:
        bed.ssh("north", "squeue")

Everything lives in namespaces held by one process (keeper.py); its end is the end of them all.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.testbed import files, spec
from tests.testbed.keeper import ALONE, UNSHARE
from tests.testbed.spec import SiteSpec

ROOT = Path(__file__).parents[2]
_PATIENCE = 120.0


def missing() -> str:
    """Why a test bed cannot come up here; empty when it can."""
    if os.geteuid() != 0:
        return "the test bed needs root"
    programs = (
        "slurmctld",
        "slurmd",
        "slurmdbd",
        "munged",
        "mariadbd",
        "mariadb-install-db",
        "ip",
        "unshare",
    )
    path = os.environ.get("PATH", "") + ":/usr/sbin:/usr/libexec"
    lacking = [p for p in (*programs, "sshd", "ssh", "sftp") if not shutil.which(p, path=path)]
    if lacking:
        return f"the test bed needs {', '.join(lacking)} (tests/testbed/packages.txt)"
    return "" if Path("/dev/net/tun").exists() else "the test bed needs /dev/net/tun"


@dataclass
class Testbed:
    """Up after `up`, gone after `down`."""

    __test__ = False

    directory: Path
    sites: tuple[SiteSpec, ...] = field(default_factory=spec.default_sites)
    attached: bool = True  # the test bed ends with this process, however that ends
    _holder: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Testbed:
        self.up()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()

    @property
    def ssh_config(self) -> Path:
        return self.directory / "ssh_config"

    # ---- up and down

    def up(self) -> float:
        """Seconds until every node is idle. Raises RuntimeError, ValueError when one is up there already."""
        if (self.directory / "holder").exists():
            raise ValueError(f"{self.directory} holds a test bed already; take it down first")
        if (self.directory / "bed.json").exists():  # of one that did not come up
            shutil.rmtree(self.directory)
        began = time.monotonic()
        self._write_files()
        command = [*UNSHARE, sys.executable, "-m", "tests.testbed.keeper", str(self.directory)]
        with (self.directory / "keeper.log").open("wb") as log:
            self._holder = subprocess.Popen(
                command if self.attached else [*command, ALONE], stdout=log, stderr=log, cwd=ROOT,
                stdin=subprocess.PIPE if self.attached else subprocess.DEVNULL, start_new_session=True,
                env={**os.environ, "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"},
            )  # fmt: skip
        (self.directory / "holder").write_text(json.dumps([self._holder.pid, _started(self._holder.pid)]))
        try:
            files.write_ssh_config(self.directory, self.sites, f"/proc/{self._holder.pid}/ns/net")
            self._wait()
        except BaseException:
            self.down(keep_files=True)
            raise
        return time.monotonic() - began

    def down(self, keep_files: bool = False) -> None:
        """Everything stopped and removed; without effect where nothing is up."""
        for pid in self._sessions():  # a socket keeps its network namespace alive
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        with contextlib.suppress(FileNotFoundError):
            pid, started = json.loads((self.directory / "holder").read_text())
            if _started(pid) == started:
                _end(pid)
            (self.directory / "holder").unlink()
        if self._holder:
            self._holder.wait()
        if not keep_files:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _write_files(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.directory.chmod(0o755)
        show = [str(ROOT), sys.prefix, sys.base_prefix]
        facts = {"sites": [asdict(site) for site in self.sites], "show": list(dict.fromkeys(show))}
        (self.directory / "bed.json").write_text(json.dumps(facts))
        files.keygen(self.directory / "id_ed25519")
        for site in self.sites:
            files.write_site(site, self.directory / site.name, self.directory / "id_ed25519.pub")

    def _wait(self) -> None:
        deadline = time.monotonic() + _PATIENCE
        ready, failed = self.directory / "ready", self.directory / "failed"
        while not ready.exists():
            assert self._holder
            if failed.exists() or self._holder.poll() is not None or time.monotonic() > deadline:
                why = (
                    failed.read_text()
                    if failed.exists()
                    else (self.directory / "keeper.log").read_text()[-800:]
                )
                raise RuntimeError(f"the test bed does not come up: {why}")
            time.sleep(0.02)
        for site in self.sites:
            while not self._idle(site):
                if time.monotonic() > deadline:
                    raise RuntimeError(f"the nodes of {site.name} do not become idle")
                time.sleep(0.05)

    def _idle(self, site: SiteSpec) -> bool:
        done = self.root(site.name, "login", "sinfo", "-hN", "-p", site.partition, "-o", "%T", check=False)
        return done.stdout.split() == ["idle"] * len(site.nodes)

    # ---- what tests do with it

    def ssh(
        self, site: str, command: str, user: str = "alice", **popen: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command at a site, over a connection of its own."""
        words = ["ssh", "-F", str(self.ssh_config), "-l", user, site, command]
        popen = {"check": True, "timeout": 60, "stdin": subprocess.DEVNULL, **popen}
        return subprocess.run(words, capture_output=True, text=True, **popen)

    def root(
        self, site: str, name: str, *command: str, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as root inside a machine."""
        pid = json.loads((self.directory / "pids.json").read_text())[site][name]
        words = [*self._enter(), *_enter(f"/proc/{pid}"), "--", *command]
        return subprocess.run(
            words, capture_output=True, text=True, check=check, stdin=subprocess.DEVNULL, timeout=60
        )

    def signal(self, site: str, name: str, daemon: str, number: int = signal.SIGKILL) -> None:
        """Send a daemon (`slurmctld`, `slurmdbd`, `slurmd`) a signal."""
        pid = self.root(site, name, "cat", f"/run/slurm/{daemon}.pid").stdout.strip()
        self.root(site, name, "kill", f"-{number}", pid)

    def start(self, site: str, name: str, daemon: str) -> None:
        """Start a daemon that was killed."""
        user = "root" if daemon == "slurmd" else "slurm"
        more = ["-N", name] if daemon == "slurmd" else []
        self.root(
            site, name, "setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups", daemon, *more
        )
        if daemon == "slurmctld":
            self._until_registered(site)

    def _until_registered(self, site: str) -> None:
        """A job that slurmctld 22.05 starts before its nodes have told it of themselves has GPUs that are
        never accounted for, and never given back."""
        deadline = time.monotonic() + 60
        while True:
            told = self.ssh(site, "scontrol show node", check=False)
            if told.returncode == 0 and "SlurmdStartTime=None" not in told.stdout:
                return
            if time.monotonic() > deadline:
                raise TimeoutError(f"nodes of {site} have not registered: {told.stdout}{told.stderr}")
            time.sleep(0.2)

    def cut_power(self, site: str, node: str) -> None:
        """A node is gone at once, network first: processes that only died would still close connections."""
        self.root(site, "login", "ip", "link", "set", node, "down")
        pid = json.loads((self.directory / "pids.json").read_text())[site][node]
        subprocess.run([*self._enter(), "kill", "-9", str(pid)], check=True)

    def restore_power(self, site: str, node: str) -> None:
        command = [sys.executable, "-m", "tests.testbed.keeper", str(self.directory), "--again", site, node]
        subprocess.run([*self._enter(), *command], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def wan(self, default: dict[str, Any] | None = None, **links: dict[str, Any]) -> None:
        """Set the WAN: `wan({"delay_ms": 30}, north={"down": True})` concerns both directions of north."""
        path = self.directory / "wan.json"
        facts = json.loads(path.read_text())
        facts["default"], facts["links"] = default or {}, {}
        names = [end["name"] for end in facts["ends"]]
        for site, link in links.items():
            for other in names:
                facts["links"].update({f"{site}>{other}": link, f"{other}>{site}": link})
        path.with_suffix(".new").write_text(json.dumps(facts))
        path.with_suffix(".new").replace(path)
        time.sleep(0.05)  # the router looks every 20 ms

    @contextlib.contextmanager
    def partition(self, site: str) -> Iterator[None]:
        self.wan({}, **{site: {"down": True}})
        try:
            yield
        finally:
            self.wan()

    def shell(self, site: str, command: Sequence[str]) -> int:
        words = ["ssh", "-F", str(self.ssh_config), site, *command]
        return subprocess.run(words, check=False).returncode

    def _sessions(self) -> list[int]:
        """Processes of this machine that hold a connection of the test bed, shared ssh sessions above all."""
        try:
            pid = json.loads((self.directory / "holder").read_text())[0]
            rows = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
        except FileNotFoundError:
            return []
        sockets = {f"socket:[{row.split()[9]}]" for row in rows}
        return [int(p.name) for p in Path("/proc").glob("[0-9]*") if _holds(p, sockets)]

    def _enter(self) -> list[str]:
        pid = json.loads((self.directory / "holder").read_text())[0]
        return [*_enter(f"/proc/{pid}"), "--"]


def _holds(process: Path, sockets: set[str]) -> bool:
    with contextlib.suppress(OSError):  # it may have ended, or end while we look
        return any(str(entry.readlink()) in sockets for entry in (process / "fd").iterdir())
    return False


def _enter(process: str) -> list[str]:
    spaces = ("mount", "net", "uts", "ipc")
    return ["nsenter", *(f"--{s}={process}/ns/{'mnt' if s == 'mount' else s}" for s in spaces),
            f"--pid={process}/ns/pid_for_children"]  # fmt: skip


def _started(pid: int) -> str:
    """When a process began, in ticks since boot: pids are reused, this is not. Empty where it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return ""


def _end(pid: int) -> None:
    """End the holder of the namespaces, and wait until the kernel has ended all that was in them."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    for child in children:
        os.kill(int(child), signal.SIGKILL)
    deadline = time.monotonic() + 30
    while any(_alive(int(child)) for child in children) and time.monotonic() < deadline:
        time.sleep(0.01)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
