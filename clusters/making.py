"""Makes an environment of wheels, at a site, without a network: `python -m clusters.making SCRATCH ATTEMPT`.

Started by clusters.bundles.make, on its own from then on. It shows that it lives, and leaves a bundle's
record or the file `failed` with one line. pip itself is one of the wheels and runs from within it, so that
the interpreter needs neither pip nor ensurepip; every wheel's hash is verified once more when it is unpacked.
Standard library only, and Python 3.9: this file travels to the sites.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Sequence  # noqa: UP035 - Python 3.9 at the sites

from clusters import bundles
from clusters.paths import SitePaths, write_atomically

_NICE = 10  # a login node is shared


@dataclass(frozen=True)
class Order:
    """What to make: wheels by their paths under scratch, with their SHA-256; `code` must come of it."""

    bundle: str
    python: str
    version: str  # "3.11": of the interpreter that the wheels are for
    wheels: Sequence[Sequence[str]]
    pip: str
    code: str
    modules: Sequence[str] = ()


def make(site: SitePaths, attempt: Path, order: Order) -> None:
    """Raises ValueError, one line, when it cannot be made."""
    found = bundles.probe(order.python, order.modules)["python"]
    if found != order.version:
        raise ValueError(f"{order.python} is Python {found}, and the wheels are for {order.version}")
    venv = attempt / "venv"
    python = venv / "bin" / "python"
    _run([*bundles.prefix(order.modules), order.python, "-m", "venv", "--without-pip", str(venv)])
    requirements = attempt / "requirements.txt"
    lines = [f"{(site.scratch / path).as_uri()} --hash=sha256:{digest}" for path, digest in order.wheels]
    requirements.write_text("\n".join(lines) + "\n")
    pip = [*bundles.prefix(order.modules), str(python), str(site.scratch / order.pip / "pip"), "--isolated"]
    quiet = ["--no-input", "--disable-pip-version-check", "--no-cache-dir", "--no-warn-script-location"]
    _run([*pip, "install", *quiet, "--no-index", "--no-deps", "--require-hashes", "-r", str(requirements)])
    facts = bundles.probe(str(python), order.modules)
    if facts["code"] != order.code:
        raise ValueError(f"{python} has other code of eurotrain than was staged")
    witnesses = [python, *sorted(venv.glob("lib/python*/site-packages/*.dist-info/RECORD"))]
    record = {"kind": "wheels", "python": str(python), "facts": facts}
    bundles.write_record(site, order.bundle, record, witnesses)


def _run(command: Sequence[str]) -> None:
    """Its output goes where ours does; the last line of it is why it failed."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        stdin=subprocess.DEVNULL, env=bundles.environment(), cwd="/",
    )  # fmt: skip
    sys.stdout.write(done.stdout)
    sys.stdout.flush()
    if done.returncode:
        lines = [line for line in done.stdout.splitlines() if line.strip()]
        raise ValueError((lines or [f"{command[0]} has exit code {done.returncode}"])[-1][:300])


def _show_life(heartbeat: Path, done: threading.Event) -> None:
    while not done.wait(bundles.BEAT_SECONDS):
        heartbeat.touch()


def main() -> int:
    site, attempt = SitePaths(Path(sys.argv[1])), Path(sys.argv[2])
    os.nice(_NICE)
    done = threading.Event()
    life = threading.Thread(target=_show_life, args=(attempt / "heartbeat", done))
    life.start()
    try:
        make(site, attempt, Order(**json.loads((attempt / "order.json").read_text())))
    except (OSError, ValueError, TypeError) as error:
        write_atomically(attempt / "failed", str(error) or type(error).__name__)
        return 1
    finally:
        done.set()
        life.join()
        (attempt / "heartbeat").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
