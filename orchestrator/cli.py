"""The command line. Every command imports what it needs when it runs: `--help` answers at once."""

from __future__ import annotations

import click

from orchestrator.commands.bench import bench
from orchestrator.commands.budget import budget, grant
from orchestrator.commands.checkpoint import checkpoint
from orchestrator.commands.demo import demo
from orchestrator.commands.doctor import doctor
from orchestrator.commands.runs import launch, logs, plan, resume, status, stop, trust
from orchestrator.commands.sites import sites
from orchestrator.commands.stage import stage


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="eurotrain", prog_name="eurotrain")
def main() -> None:
    """Trains one language model across several supercomputers, and accounts for every unit.

    Files lie under $EUROTRAIN_HOME (default ~/.eurotrain).
    """


for command in (
    *(doctor, sites),
    *(plan, stage, launch, resume, stop, status, logs, trust),
    *(budget, grant),
    *(checkpoint,),
    *(demo, bench),
):
    main.add_command(command)

if __name__ == "__main__":
    main()
