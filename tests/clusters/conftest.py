"""A small segment, and its folder at a site."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from clusters.paths import SegmentPaths, SitePaths
from clusters.segment import Checkpointing, Data, ModelShape, Segment, Training
from tests.clusters.fake_slurm import FakeSlurm
from tests.clusters.site_on_bed import SCRATCH, SiteOnBed, connect
from tests.testbed.bed import Testbed


@pytest.fixture
def segment(tmp_path: Path) -> Segment:
    return Segment(
        key="run.here.0000",
        run="run",
        site="here",
        island=0,
        islands=1,
        sequence=0,
        scratch=str(tmp_path),
        layout={"tp": 1},
        model=ModelShape(1, 64, 128, 4, 2, 512),
        training=Training(10, 32, 4, 2, 1e-3),
        data=Data(("data/x",)),
        checkpointing=Checkpointing(5),
        time_limit_seconds=60.0,
        units_per_hour=1.0,
        unit_cap=1.0,
    )


@pytest.fixture
def paths(segment: Segment) -> SegmentPaths:
    paths = SitePaths(Path(segment.scratch)).segment(segment.key)
    paths.root.mkdir(parents=True)
    return paths


@pytest.fixture
def fake_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    folder = tmp_path / "bin"
    folder.mkdir()
    fake = FakeSlurm(folder)
    fake.install(monkeypatch)
    return fake


@pytest.fixture(scope="module")
def site(testbed: Testbed, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SiteOnBed]:
    pattern = Segment(
        key="", run="run", site="south", island=0, islands=1, sequence=0, scratch=SCRATCH, layout={"tp": 1},
        model=ModelShape(1, 64, 128, 4, 2, 512), training=Training(1, 32, 4, 2, 1e-3), data=Data(("data/x",)),
        checkpointing=Checkpointing(5), time_limit_seconds=300.0, units_per_hour=1.0, unit_cap=1.0,
        drain_seconds=20.0,
    )  # fmt: skip
    connection = connect(testbed, "south", tmp_path_factory.mktemp("home"))
    site = SiteOnBed(testbed, "south", connection, pattern)
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory(dir="/tmp") as sockets:
        patch.setenv("XDG_RUNTIME_DIR", sockets)  # the sites of any two test beds have the same addresses
        site.prepare()
        connection.exchange([])
        yield site
        connection.session.close()
