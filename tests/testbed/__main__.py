"""python -m tests.testbed up | down | shell SITE [COMMAND…]: real Slurm sites on this machine, for people."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from tests.testbed import spec
from tests.testbed.bed import Testbed, missing


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.testbed", description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("/tmp/eurotrain-testbed"))
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="bring the sites up")
    up.add_argument("--energy", action="store_true", help="with energy counters at every node")
    commands.add_parser("down", help="take them down, and all their files")
    shell = commands.add_parser("shell", help="log in as alice")
    shell.add_argument("site")
    shell.add_argument("words", nargs=argparse.REMAINDER)
    arguments = parser.parse_args()
    sites = spec.default_sites(getattr(arguments, "energy", False))
    bed = Testbed(arguments.directory, sites, attached=False)
    if arguments.command == "down":
        bed.down()
        return 0
    if arguments.command == "shell":
        return bed.shell(arguments.site, arguments.words)
    return up_or_why(bed)


def up_or_why(bed: Testbed) -> int:
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    try:
        seconds = bed.up()
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    names = ", ".join(f"{site.name} ({len(site.nodes)} nodes)" for site in bed.sites)
    print(f"up in {seconds:.1f} s: {names}; ssh -F {bed.ssh_config} {bed.sites[0].name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
