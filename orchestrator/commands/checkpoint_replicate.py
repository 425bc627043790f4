"""eurotrain checkpoint replicate."""

from __future__ import annotations

from typing import Literal

import click

from orchestrator.commands.frame import as_json, command, emit


@click.command()
@click.argument("source")
@click.argument("target")
@click.option("--site", help="Of a run as SOURCE: the checkpoint of this site's island.")
@click.option("--bwlimit", metavar="RATE", help="At most so much over all streams, such as 100MB/s.")
@click.option(
    "--streams", type=click.IntRange(1, 8), default=2, show_default=True, help="Chunks on their way at once."
)
@click.option(
    "--compress", type=click.Choice(["auto", "never", "always"]), default="auto", show_default=True,
    help="Without loss; auto: where the link is slower than the compressor.",
)  # fmt: skip
@as_json
@command
def replicate(
    source: str,
    target: str,
    site: str | None,
    bwlimit: str | None,
    streams: int,
    compress: Literal["auto", "never", "always"],
    as_json: bool,
) -> None:
    """Copy a checkpoint into the directory TARGET.

    SOURCE is a checkpoint, a directory or a run (its newest is copied). Either end may be SITE:PATH.
    It counts there once every byte has been read back; a copy that was cut off is gone on with by the same
    command.
    """
    from orchestrator import replication as view
    from orchestrator.desk import Desk
    from orchestrator.progress import bytes_of

    desk, rate = Desk.open(), view.parse_rate(bwlimit) if bwlimit else None
    with bytes_of("copying") as told:
        tell = lambda copy: told(copy.sent + copy.reused, copy.bytes)  # noqa: E731
        ends = view.source_of(source, site, desk), view.target_of(target, desk)
        done = view.copy(*ends, rate, streams, compress, tell)
    emit(view.facts(done), lambda: view.sentence(done), wants_json=as_json)
