"""The files of a test bed: what its machines read, and the operator's ssh configuration."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from tests.testbed import spec
from tests.testbed.spec import SiteSpec


def write_ssh_config(directory: Path, sites: Iterable[SiteSpec], namespace: str) -> None:
    """The operator's configuration: names, keys, and the way into the test bed's network."""
    dial = f"{sys.executable} -S -E {Path(__file__).with_name('dial.py')}"
    lines, known = [], []
    for site in sites:
        lines += [f"Host {site.name}", f"  HostName {site.wan_address}", "  User alice"]
        key = (directory / site.name / "ssh/host_key.pub").read_text().split()
        known.append(f"{site.wan_address} {key[0]} {key[1]}\n")
    lines += [
        "Host *",
        f"  IdentityFile {directory}/id_ed25519",
        "  IdentitiesOnly yes",
        "  IdentityAgent none",
        f"  UserKnownHostsFile {directory}/known_hosts",
        "  GlobalKnownHostsFile /dev/null",
        f"  ProxyCommand {dial} {namespace} %h %p",
        "  ProxyUseFdpass yes",
    ]
    (directory / "known_hosts").write_text("".join(known))
    (directory / "ssh_config").write_text("\n".join(lines) + "\n")


def write_site(site: SiteSpec, home: Path, public_key: Path) -> None:
    """Everything that a site's machines read."""
    for folder in ("etc/slurm", "etc/munge", "home", "scratch", "log", "ssh", "machines"):
        (home / folder).mkdir(parents=True)
    for name, text in spec.configuration(site).items():
        (home / "etc/slurm" / name).write_text(text)
    (home / "etc/slurm/slurmdbd.conf").chmod(0o600)
    shutil.chown(home / "etc/slurm/slurmdbd.conf", "slurm", "slurm")
    key = home / "etc/munge/munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    (home / "etc/munge").chmod(0o700)
    for path in (key, key.parent):
        shutil.chown(path, "munge", "munge")
    (home / "etc/hosts").write_text(spec.hosts(site))
    (home / "accounts").write_text(spec.accounting(site))
    (home / "scratch").chmod(0o1777)
    (home / "log").chmod(0o1777)
    _write_users(home)
    keygen(home / "ssh/host_key")
    shutil.copy(public_key, home / "ssh/authorized_keys")


def _write_users(home: Path) -> None:
    for name in ("passwd", "group", "shadow"):
        shutil.copy(f"/etc/{name}", home / "etc" / name)
    for user, number in spec.USERS.items():
        lines = {
            "passwd": f"{user}:x:{number}:{number}::/home/{user}:/bin/bash\n",
            "group": f"{user}:x:{number}:\n",
            "shadow": f"{user}:*:19000::::::\n",
        }
        for name, line in lines.items():
            with (home / "etc" / name).open("a") as stream:
                stream.write(line)
        (home / "home" / user).mkdir()
        os.chown(home / "home" / user, number, number)


def keygen(path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
