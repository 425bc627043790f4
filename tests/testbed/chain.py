"""python -m tests.testbed.chain: on real Slurm a chain of segments of about a minute, then one long job.

Both train the same model with the same text, at a site each, and every step's loss must be the same to the
last bit. Takes about eight minutes; prints what was measured as JSON. Exit code 1 where they differ.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator import demo
from orchestrator.fold import fold
from orchestrator.home import Home
from orchestrator.store import Store
from tests.losses import assert_same_training, losses
from tests.testbed.bed import Testbed, missing
from tests.testbed.demo import environment, prepare
from tests.testbed.spec import SiteSpec

EUROTRAIN = str(Path(sys.executable).with_name("eurotrain"))
RUN_TOML = """\
name = "{name}"
[model]
preset = "llama-3m"
[data]
prefixes = ["data/europe"]
[training]
tokens = {tokens}
sequence_length = 128
global_batch = 16
micro_batch = 8
learning_rate = 4e-3
warmup_steps = 10
[checkpoint]
every_steps = 1000
[[islands]]
site = "{site}"
allocation = "{site}-proj"
time_limit = "{limit}"
"""


def launch(
    bed: Testbed, home: Home, site: SiteSpec, name: str, limit: str, steps: int
) -> subprocess.Popen[str]:
    spec = home.root / f"{name}.toml"
    tokens = steps * 16 * 128
    spec.write_text(RUN_TOML.format(name=name, tokens=tokens, site=site.name, limit=limit))
    words = [EUROTRAIN, "grant", f"{site.name}-proj", "100", "--unit", "GPU-hour", "--reference", "bed"]
    subprocess.run(words, check=True, env=environment(bed, home))
    words = [EUROTRAIN, "stage", site.name, "--run", str(spec)]
    subprocess.run(words, check=True, env=environment(bed, home), stdout=sys.stderr)
    words = [EUROTRAIN, "launch", str(spec), "--yes"]
    return subprocess.Popen(words, env=environment(bed, home), text=True, stdout=sys.stderr)


def compare(home: Home) -> dict[str, Any]:
    """Raises AssertionError where a step's loss differs, is missing or came twice."""
    store = Store(home.database)
    runs = {name.rpartition("-")[0]: name for name in store.runs()}
    told = {kind: losses(store, run) for kind, run in runs.items()}
    chain = fold(runs["chain"], store.events(runs["chain"]))
    (island,) = chain.islands.values()
    assert_same_training(told["chain"], told["whole"])
    return {
        "segments": len([s for s in island.segments if s.trained]),
        "outcomes": [s.outcome or s.job["outcome"] for s in island.segments],
        "seconds": [round(s.job["ended"] - s.job["started"], 1) for s in island.segments if s.trained],
        "steps": len(told["chain"]),
        "equal_losses": True,
        "loss_first": told["chain"][0][1],
        "loss_last": told["chain"][-1][1],
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.testbed.chain", description=__doc__)
    parser.add_argument("--steps", type=int, default=480)
    # Slurm counts whole minutes and signals their end up to one early (25 s were seen): of 60 s nothing might
    # be left. 90 s of ours are two minutes of Slurm's, so a segment drains by its own clock, after 68 s.
    parser.add_argument("--limit", default="90s", help="of a segment")
    arguments = parser.parse_args()
    if why := missing():
        print(why, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder, Testbed(Path(folder) / "bed") as bed:
        home = Home(Path(folder) / "home")
        home.root.mkdir()
        prepare(bed, home, demo.STEPS)
        began = time.monotonic()
        first, second = bed.sites
        for site, name, limit in ((first, "chain", arguments.limit), (second, "whole", "30min")):
            code = launch(bed, home, site, name, limit, arguments.steps).wait()
            assert code == 0, f"{name} ended with {code}"
        print(json.dumps({**compare(home), "wall_seconds": round(time.monotonic() - began, 1)}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
