"""Staging at a real site: across a line that breaks, by a data mover, and a job that runs from the bundle."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

from clusters.machine import Catalogue
from clusters.own import Own
from clusters.site import Site
from clusters.ssh import SshConnection
from orchestrator import bundle, own_wheel, wheelhouse
from orchestrator.stage import Options, Stager
from orchestrator.stock import Stock
from tests.clusters.site_on_bed import SCRATCH, SiteOnBed
from tests.clusters.test_sites_connection import received
from tests.stub_wheels import stubs_of

pytestmark = pytest.mark.slurm
SIZE = 8 << 20


@pytest.fixture
def mover(site: SiteOnBed, tmp_path: Path) -> Iterator[SshConnection]:
    """The site as one has it whose files go by another host."""
    config = tmp_path / "ssh_config"
    text = site.bed.ssh_config.read_text()
    address = next(s.wan_address for s in site.bed.sites if s.name == "south")
    config.write_text(f"Host mover\n  HostName {address}\n  User alice\n{text}")
    connection = SshConnection("south", SCRATCH, tmp_path / "home", config=config, carrier="mover")
    connection.exchange([])
    site.bed.wan({"rate_mbit": 40.0, "delay_ms": 5.0, "queue_ms": 2000.0})
    yield connection
    site.bed.wan()
    for session in (connection.session, connection._files_session):
        session.close()


def test_a_line_that_breaks_costs_little_and_the_data_mover_carries_all(
    site: SiteOnBed, mover: SshConnection, tmp_path: Path
) -> None:
    source = tmp_path / "text.bin"
    source.write_bytes(os.urandom(SIZE))
    stager = Stager("south", mover, Stock(tmp_path / "staged"), Options(pause=0.5))
    (wanted,) = stager.stock.measure({"data/text.bin": source})
    began = received(site)
    killer = threading.Thread(target=_break_when_grown, args=(site, wanted.part))
    killer.start()
    stager.bring([wanted], {"data/text.bin": source})
    killer.join()
    assert received(site) - began < SIZE * 1.5, "what had arrived was not sent again"
    told = site.shell(f"sha256sum < {SCRATCH}/data/text.bin")
    assert told.split()[0] == wanted.sha256
    log = site.sshd_log
    assert log.count("Starting session: subsystem 'sftp' for alice") >= 2
    assert mover._files_session.budget.read().commands >= 2


def _break_when_grown(site: SiteOnBed, part: str) -> None:
    """Kill the process that holds the data mover's session, once a third has arrived."""
    path = site.bed.directory / "south/scratch/eurotrain" / part
    deadline = time.monotonic() + 60
    while not path.exists() or path.stat().st_size < SIZE // 3:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for pid in site.bed._sessions():
        words = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"mover" in words or b"[mux]" in words:
            os.kill(pid, signal.SIGKILL)


def test_a_job_runs_from_the_bundle_that_was_made_there(
    site: SiteOnBed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network there: all but submitit and psutil are stubs, so that the supervisor gets as far as Ray."""
    index = tmp_path / "index"
    stubs_of([r for r in wheelhouse.requirements() if not r.startswith(("submitit", "psutil"))], index)
    for name in ("submitit", "cloudpickle", "typing_extensions", "psutil"):
        distribution = metadata.distribution(name)
        files = [f for f in distribution.files or () if f.suffix in (".py", ".so")]
        own_wheel._write(distribution, {str(f): Path(f.locate()).read_bytes() for f in files}, index)
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    own = Own(Path(SCRATCH), "local", host="south", base_python=sys.executable)
    stager = Stager("south", site.connection, Stock(tmp_path / "staged"), Options())
    told = bundle.stage(Site("south", Catalogue().load("local"), own), stager, tmp_path / "wheels", poll=0.5)
    operation = site.operation("from-bundle")
    del operation["python"]
    needs = {"bundle": told["id"], "advice": "eurotrain stage south"}
    (answer,) = site.connection.exchange([{**operation, "needs": {**needs, "bundle": "none"}}])
    assert answer["unstaged"], answer
    assert answer["error"] == "bundle none is not there: type `eurotrain stage south`"
    assert site.jobs_named("from-bundle") == []
    (answer,) = site.connection.exchange([{**operation, "needs": needs}])
    assert answer["ok"], answer
    site.wait("from-bundle", "ended")
    assert f"{SCRATCH}/bundles/{told['id']}/" in site.read("from-bundle", "logs/supervisor.log")
    assert "segment.claimed" in site.read("from-bundle", "events/supervisor.jsonl")
