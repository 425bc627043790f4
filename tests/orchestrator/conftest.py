"""Databases to test against: SQLite in a file, and a real PostgreSQL server where one can be started."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from orchestrator.store import Store

settings.register_profile("shared", deadline=None)  # a shared machine's pauses are no fault of the code
settings.load_profile("shared")

_UNPRIVILEGED = "nobody"  # PostgreSQL refuses to run as root


@pytest.fixture(scope="session")
def postgresql() -> Iterator[str]:
    """URL of a database on a server of this session's own, which listens on a socket only."""
    programs = _programs()
    if programs is None or not importlib.util.find_spec("psycopg"):
        missing = "PostgreSQL's programs" if programs is None else "psycopg"
        if os.environ.get("EUROTRAIN_CI"):
            pytest.fail(f"{missing} must be installed in CI")
        pytest.skip(f"left out: the PostgreSQL suite, for lack of {missing}")
    folder = Path(tempfile.mkdtemp(prefix="eurotrain-pg-", dir="/tmp"))
    user = _UNPRIVILEGED if os.geteuid() == 0 else None
    if user:
        shutil.chown(folder, user)
    make = [programs / "initdb", "-D", folder / "data", "-U", "eurotrain", "-A", "trust", "-N", "-E", "UTF8"]
    subprocess.run(make, check=True, user=user, cwd=folder, stdout=subprocess.DEVNULL)
    serve = [programs / "postgres", "-D", folder / "data", "-k", folder, "-c", "listen_addresses=", "-F"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(serve, user=user, cwd=folder, stdout=log, stderr=log)
    try:
        _wait_until_ready(folder, server)
        yield f"postgresql://eurotrain@/postgres?host={folder}"
    finally:
        server.send_signal(signal.SIGINT)  # fast shutdown: sessions are cut off
        server.wait(timeout=30)
        shutil.rmtree(folder)


def _programs() -> Path | None:
    found = shutil.which("initdb")
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return Path(found).parent if found else next((f for f in folders if (f / "initdb").exists()), None)


def _wait_until_ready(folder: Path, server: subprocess.Popen[bytes]) -> None:
    import psycopg

    deadline = time.monotonic() + 30
    while True:
        try:
            psycopg.connect(f"postgresql://eurotrain@/postgres?host={folder}").close()
        except psycopg.OperationalError:
            assert server.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "PostgreSQL did not start"
            time.sleep(0.05)
        else:
            return


@pytest.fixture(params=["sqlite", "postgresql"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a database that does not exist yet (SQLite) or is empty (PostgreSQL)."""
    if request.param == "sqlite":
        return str(tmp_path / "eurotrain.db")
    url = str(request.getfixturevalue("postgresql"))
    _empty(url)
    return url


def _empty(url: str) -> None:
    """Leave no table, whatever processes of the last test still hold (0.02 s; a new database takes 0.5 s)."""
    import psycopg

    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                           "WHERE datname = current_database() AND pid <> pg_backend_pid()")  # fmt: skip
        connection.execute("DROP SCHEMA public CASCADE")
        connection.execute("CREATE SCHEMA public")


@pytest.fixture
def store(location: str) -> Iterator[Store]:
    opened = Store(location)
    yield opened
    opened.close()
