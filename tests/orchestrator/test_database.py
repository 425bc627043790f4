"""Where the database may lie, what it refuses, and what it says when it cannot work."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
from click.testing import CliRunner
from sqlalchemy import Connection, TextClause, event, text
from sqlalchemy.exc import IntegrityError

from orchestrator.cli import main
from orchestrator.database import Database, StoreError, file_system
from orchestrator.store import Store

MOUNTS = """\
22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
23 22 0:40 / /home rw,relatime shared:2 master:1 - nfs4 server:/home rw,vers=4.2
24 22 0:41 / /home/local rw - xfs /dev/vdb rw
25 22 0:42 / /scratch\\040space rw - lustre mds@tcp:/fs rw
26 22 0:43 / /auto rw - autofs systemd-1 rw
27 22 0:44 / /auto rw - cifs //server/share rw
28 22 0:45 / /homework rw - tmpfs tmpfs rw
"""


@pytest.fixture
def mounts(tmp_path: Path) -> Path:
    path = tmp_path / "mountinfo"
    path.write_text(MOUNTS)
    return path


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/x.db", "ext4"),
        ("/home/me/.eurotrain/eurotrain.db", "nfs4"),
        ("/home/local/x.db", "xfs"),
        ("/homework/x.db", "tmpfs"),
        ("/scratch space/x.db", "lustre"),
        ("/auto/x.db", "cifs"),
    ],
)
def test_the_file_system_of_a_path_that_does_not_exist(path: str, kind: str, mounts: Path) -> None:
    assert file_system(Path(path), mounts) == kind


def test_a_link_is_followed_to_its_file_system(tmp_path: Path, mounts: Path) -> None:
    (tmp_path / "link").symlink_to("/home/me")
    assert file_system(tmp_path / "link" / "x.db", mounts) == "nfs4"


def test_the_real_table_of_mounts_is_understood() -> None:
    assert file_system(Path("/proc/self/status"), Path("/proc/self/mountinfo")) == "proc"


def test_a_kernel_that_does_not_tell_is_believed(tmp_path: Path) -> None:
    assert file_system(tmp_path, tmp_path / "none") == ""


def test_sqlite_on_a_network_file_system_is_refused(mounts: Path) -> None:
    with pytest.raises(
        ValueError, match=r"^/home/me/e.db lies on a network file system \(nfs4\), where"
    ) as caught:
        Store("/home/me/e.db", mounts)
    assert "EUROTRAIN_HOME" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("location", "complaint"),
    [
        ("mysql://root:secret@host/db", r"^the database mysql://root:\*\*\*@host/db will not do; use sqlite"),
        ("sqlite://", "will not do"),
        ("sqlite:///:memory:", "will not do"),
        ("://", "the database's URL cannot be read; it is like postgresql://"),
    ],
)
def test_other_places_are_refused(location: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Database(location)


def test_missing_folders_are_made_and_relative_paths_stay_valid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    database = Database("a/b/x.db")
    monkeypatch.chdir("/")
    with database.reading() as connection:
        assert connection.scalar(text("SELECT version FROM eurotrain_format")) == 1
    assert (tmp_path / "a/b/x.db").exists()
    database.close()


def test_a_commit_is_on_the_disk_when_it_returns(tmp_path: Path) -> None:
    """synchronous 2 is FULL: fsync at every commit; with WAL, readers do not wait."""
    database = Database(tmp_path / "x.db")
    with database.reading() as connection:
        pragmas = {
            name: connection.execute(text(f"PRAGMA {name}")).scalar()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout", "recursive_triggers")
        }
    assert pragmas == {
        "journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 30_000,
        "recursive_triggers": 1,
    }  # fmt: skip
    database.close()


def test_a_database_from_a_newer_version_is_refused(location: str) -> None:
    database = Database(location)
    with database.writing() as connection:
        connection.execute(text("UPDATE eurotrain_format SET version = 2"))
    database.close()
    with pytest.raises(
        ValueError, match="was written by a newer version of eurotrain: its format is 2, this version reads 1"
    ):
        Database(location)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET kind = 'x'",
        "UPDATE events SET facts = facts",
        "DELETE FROM events",
        "UPDATE entries SET amount = 0",
        "DELETE FROM entries",
    ],
)
def test_the_logs_cannot_be_changed(store: Store, statement: str) -> None:
    store.record("r", "k", a=1)
    with store.database.writing() as connection:
        connection.execute(text(
            "INSERT INTO entries (allocation, kind, amount, unit, reference, time, evidence) "
            "VALUES ('a', 'grant', 5, 'h', 'x', 0, '{}')"
        ))  # fmt: skip
    with (
        pytest.raises((IntegrityError, StoreError), match="is append-only"),
        store.database.writing() as connection,
    ):
        connection.execute(text(statement))
    assert [e.kind for e in store.events("r")] == ["k"]


def test_a_foreign_connection_cannot_replace_a_line(tmp_path: Path) -> None:
    """INSERT OR REPLACE deletes the old row, by default without firing delete triggers."""
    store = Store(tmp_path / "x.db")
    store.record("r", "k", a=1)
    store.close()
    other = sqlite3.connect(tmp_path / "x.db")
    by_id = "INSERT OR REPLACE INTO events VALUES (1, 'q', '', '', 's', 7, 0, 0, 'forged', '{}')"
    by_name = "INSERT OR REPLACE INTO events VALUES (9, 'r', '', '', 'controller', 0, 0, 0, 'forged', '{}')"
    for statement in (by_id, by_name):
        with pytest.raises(sqlite3.IntegrityError, match="events is append-only"):
            other.execute(statement)
    assert other.execute("SELECT id, kind FROM events").fetchall() == [(1, "k")]
    other.close()


@pytest.mark.parametrize("location", ["postgresql"], indirect=True)
def test_the_log_cannot_be_truncated(store: Store) -> None:
    store.record("r", "k")
    with pytest.raises(StoreError, match="append-only"), store.database.writing() as connection:
        connection.execute(text("TRUNCATE events"))


def test_a_full_disk_is_one_line_and_keeps_nothing_half(tmp_path: Path) -> None:
    """SQLite's own limit on pages gives the same SQLITE_FULL as a full disk."""
    store = Store(tmp_path / "x.db")
    store.record("r", "before")
    event.listen(store.database.engine, "connect", lambda c, _: c.execute("PRAGMA max_page_count = 30"))
    store.close()  # new connections have the limit
    lines = [{"kind": "step", "time": 1.0, "offset": i * 100, "text": "x" * 90} for i in range(5000)]
    with pytest.raises(StoreError) as caught:
        store.ingest("r", "s", "k", {"ranks": {"lines": lines, "offset": 500_000}})
    assert str(caught.value) == f"{tmp_path / 'x.db'}: the disk is full; nothing of this step was recorded"
    assert store.cursors("s", "k") == {}
    assert [e.kind for e in store.events("r")] == ["before"]
    store.record("r", "after")  # small enough again
    store.close()


def test_what_is_no_database_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "x.db").write_bytes(b"not a database " * 100)
    with pytest.raises(StoreError, match=r"x.db: this file is no SQLite database$"):
        Store(tmp_path / "x.db")


def test_a_folder_where_a_file_belongs(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoreError, match=r"x.db: (Not a directory|File exists)$"):
        Store(tmp_path / "file" / "x.db")
    with pytest.raises(StoreError, match=r"this file cannot be opened$"):
        Store(tmp_path)


def test_a_damaged_page_is_called_so(tmp_path: Path) -> None:
    store = Store(tmp_path / "x.db")
    for i in range(200):
        store.record("r", "k", text="x" * 500, i=i)
    store.close()
    pages = (tmp_path / "x.db").stat().st_size // 4096
    with (tmp_path / "x.db").open("r+b") as stream:
        for page in range(1, pages):
            stream.seek(page * 4096)
            stream.write(b"\xff" * 200)
    (tmp_path / "x.db-wal").unlink(missing_ok=True)
    with pytest.raises(StoreError, match=r"x.db: this file is damaged; restore it from a copy$"):
        Store(tmp_path / "x.db").events("r")


def test_a_waiting_writer_gives_up_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.database.BUSY_SECONDS", 0.2)
    store = Store(tmp_path / "x.db")
    other = sqlite3.connect(tmp_path / "x.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="another process has been writing for more than"):
        store.record("r", "k")
    assert store.events("r") == []  # readers do not wait
    other.execute("COMMIT")
    other.close()
    store.record("r", "k")
    store.close()


def test_an_unreachable_server_is_one_line_without_the_password(postgresql: str, tmp_path: Path) -> None:
    assert postgresql
    with pytest.raises(StoreError) as caught:
        Store(f"postgresql://me:secret@/db?host={tmp_path}")
    assert "secret" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_error_inside_a_transaction_keeps_nothing(store: Store) -> None:
    twice = text("INSERT INTO leases SELECT 'r', 'h', 0 UNION ALL SELECT 'r', 'h', 0")
    for statement, error in ((twice, IntegrityError), (text("SELECT nonsense"), StoreError)):
        with pytest.raises(error), store.database.writing() as connection:
            _insert_and(connection, statement)
    with store.database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM leases")).scalar() == 0


def _insert_and(connection: Connection, statement: TextClause) -> None:
    connection.execute(text("INSERT INTO leases VALUES ('q', 'h', 0)"))
    connection.execute(statement)


def test_the_command_line_says_it_in_one_line_and_exits_with_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "eurotrain.db").write_bytes(b"not a database " * 100)
    monkeypatch.setenv("EUROTRAIN_HOME", str(tmp_path))
    monkeypatch.delenv("EUROTRAIN_DATABASE", raising=False)
    done = CliRunner().invoke(main, ["status"])
    assert done.exit_code == 1
    assert done.output == f"eurotrain: {tmp_path / 'eurotrain.db'}: this file is no SQLite database\n"
