"""eurotrain demo."""

from __future__ import annotations

import click

from orchestrator.commands.frame import command


@click.command()
@click.option("--kill-a-rank", is_flag=True, help="Kill one rank with SIGKILL midway, to see it recover.")
@click.option("--steps", type=click.IntRange(min=1), help="Steps of each island, rounded up to whole rounds.")
@command
def demo(kill_a_rank: bool, steps: int | None) -> int:
    """Train one small model across two local sites, joined by DiLoCo rounds."""
    from orchestrator import demo as show

    return show.run(kill_a_rank=kill_a_rank, steps=steps)
