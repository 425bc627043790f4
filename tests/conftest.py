"""What all tests share."""

import signal
from pathlib import Path

import pytest
from hypothesis import settings

from clusters import ssh_session
from tests.clusters.fake_sftp import FakeSftp
from tests.clusters.fake_ssh import FakeSsh
from tests.testbed.fixture import pytest_runtest_makereport, testbed

__all__ = ["pytest_runtest_makereport", "testbed"]

# A machine that others use too is slow at moments: time is no property of what these tests examine.
settings.register_profile("eurotrain", deadline=None)
settings.load_profile("eurotrain")

# A shell starts what it puts into the background with SIGINT ignored, and every child would inherit that:
# tests of Ctrl-C would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSsh:
    folder = tmp_path / "ssh-bin"
    folder.mkdir()
    ssh_session._settings.cache_clear()
    fake = FakeSsh(folder)
    fake.install(monkeypatch)
    return fake


@pytest.fixture
def fake_sftp(fake_ssh: FakeSsh) -> FakeSftp:
    fake = FakeSftp(fake_ssh.folder)
    fake.install()
    return fake
