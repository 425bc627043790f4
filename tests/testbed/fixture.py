"""One test bed for all tests of a session; skipped where it cannot come up, failed where CI expects it."""

from __future__ import annotations

import os
from collections.abc import Iterator

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
