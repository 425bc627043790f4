"""One test bed for all tests of a session; skipped where it cannot come up, failed where CI expects it."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator

import pytest

from tests.testbed.bed import Testbed, missing


def require() -> None:
    """Skip where no test bed can come up; fail where CI expects one."""
    if why := missing():
        if os.environ.get("EUROTRAIN_CI") == "1":
            pytest.fail(why)
        pytest.skip(why)


@pytest.fixture(scope="session")
def testbed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Testbed]:
    require()
    with Testbed(tmp_path_factory.mktemp("bed")) as bed:
        yield bed


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A test that fails on the test bed is reported with what its sites know: the bed is gone afterwards."""
    report = yield
    bed = getattr(item, "funcargs", {}).get("testbed")
    if report.when == "call" and report.failed and bed is not None:
        report.sections.extend((f"Slurm of {site.name}", _state(bed, site.name)) for site in bed.sites)
    return report


def _state(bed: Testbed, site: str) -> str:
    log = bed.directory / site / "log" / "slurmctld.log"
    told = bed.ssh(site, "sinfo -Nl; squeue -l --states=all; scontrol show job; sacct -aPX", check=False)
    return f"{told.stdout}{told.stderr}\n{log.read_text()[-6000:]}"
