"""The controller's database: SQLite in a file, or PostgreSQL by URL, with the same promises.

Every write transaction holds the database's one write lock from its first statement. SQLite works that
way by nature; on PostgreSQL an advisory lock does it, so that checks and writes cannot interleave and
the ids of events are committed in order (a sequence alone hands out numbers that appear late, and a
reader who asks for "after 17" would miss them).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import (
    URL,
    Connection,
    Double,
    Engine,
    create_engine,
    event,
    insert,
    inspect,
    literal_column,
    make_url,
    select,
    text,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError

from orchestrator.tables import FORMAT, format_version, guards, metadata

MOUNTS = Path("/proc/self/mountinfo")
BUSY_SECONDS = 30.0  # how long a writer waits for the one before it
_WRITE_LOCK = 0x6575726F  # "euro": any constant that nobody else locks

# As the kernel names them. On these, locks and shared memory do not reach across machines.
_NETWORK_FILE_SYSTEMS = frozenset((
    "nfs", "nfs4", "lustre", "gpfs", "cifs", "smb3", "smbfs", "beegfs", "ceph", "afs", "glusterfs",
    "orangefs", "panfs", "wekafs", "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.ceph-fuse",
    "fuse.beegfs", "fuse.s3fs", "fuse.rclone", "fuse.juicefs", "fuse.mfs", "fuse.gcsfuse", "fuse.dfuse",
    "fuse.smbnetfs", "fuse.curlftpfs",
))  # fmt: skip

_CLOCKS = {
    "sqlite": "(julianday('now') - 2440587.5) * 86400.0",
    "postgresql": "extract(epoch FROM clock_timestamp())",
}


class StoreError(OSError):
    """The database cannot do its work now; one line says why. Nothing of the transaction was kept."""


class Database:
    """Opens or creates the database. Raises ValueError for a place that will not do, StoreError otherwise."""

    def __init__(self, location: str | Path, mounts: Path = MOUNTS) -> None:
        url = _parse(location)
        self.name = url.database or "" if _is_sqlite(url) else url.render_as_string(hide_password=True)
        if _is_sqlite(url):
            refuse_network_file_system(Path(self.name), mounts)
        self.engine = _engine(url)
        self.now = literal_column(_CLOCKS[self.engine.dialect.name], Double)
        with self._one_line():
            if _is_sqlite(url):
                Path(self.name).parent.mkdir(parents=True, exist_ok=True)
            self._prepare()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one moment."""
        with self._one_line(), self.engine.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that nobody else writes beside; committed and durable when the block ends."""
        with self._one_line(), self.engine.connect() as connection:
            connection = connection.execution_options(eurotrain_writing=True)
            with connection.begin():
                if self.engine.dialect.name == "postgresql":
                    connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITE_LOCK})
                yield connection

    def close(self) -> None:
        self.engine.dispose()

    def _prepare(self) -> None:
        if not inspect(self.engine).has_table(format_version.name):
            with self.writing() as connection:
                _create(connection)
        with self.reading() as connection:
            found = connection.scalar(select(format_version.c.version))
        if found != FORMAT:
            newer = "a newer" if found is not None and found > FORMAT else "another"
            raise ValueError(
                f"{self.name} was written by {newer} version of eurotrain: its format is {found}, this "
                f"version reads {FORMAT}"
            )

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        try:
            yield
        except (StoreError, IntegrityError):
            raise  # told already; or a rule of the tables was broken: a bug, not a state of the machine
        except DBAPIError as error:
            raise StoreError(self._explain(error)) from error
        except OSError as error:
            raise StoreError(f"{self.name}: {error.strerror}") from error

    def _explain(self, error: DBAPIError) -> str:
        said = str(error.orig).strip().splitlines()[0] if str(error.orig).strip() else "no answer"
        for pattern, words in _SQLITE_WORDS:
            if re.search(pattern, said):
                return f"{self.name}: {words}"
        return f"{self.name}: {said}"


_SQLITE_WORDS = (
    (
        "disk is full|No space left",
        "the disk is full; nothing of this step was recorded",
    ),
    ("database is locked", f"another process has been writing for more than {BUSY_SECONDS:.0f} s"),
    ("readonly database", "this file may not be written"),
    ("file is not a database", "this file is no SQLite database"),
    ("malformed", "this file is damaged; restore it from a copy"),
    ("unable to open database file", "this file cannot be opened"),
)


def _parse(location: str | Path) -> URL:
    """A URL, or a path to a file of SQLite. Raises ValueError."""
    where = str(location)
    if "://" not in where:
        return URL.create("sqlite", database=str(Path(where).expanduser().absolute()))
    try:
        url = make_url(where)
    except ArgumentError:
        raise ValueError(
            "the database's URL cannot be read; it is like postgresql://user@host/name"
        ) from None
    if url.drivername in ("postgres", "postgresql"):
        return url.set(drivername="postgresql+psycopg")
    if _is_sqlite(url) and url.database and url.database != ":memory:":
        return url.set(database=str(Path(url.database).expanduser().absolute()))
    if url.get_backend_name() == "postgresql":
        return url
    allowed = "sqlite:///<file> or postgresql://user@host/name"
    raise ValueError(f"the database {url.render_as_string(hide_password=True)} will not do; use {allowed}")


def _is_sqlite(url: URL) -> bool:
    return url.drivername.split("+")[0] == "sqlite"


def _engine(url: URL) -> Engine:
    if not _is_sqlite(url):
        try:
            return create_engine(url, pool_pre_ping=True)
        except ModuleNotFoundError as error:
            raise ValueError(f"PostgreSQL needs {error.name}: pip install 'eurotrain[postgresql]'") from None
    engine = create_engine(url, connect_args={"timeout": BUSY_SECONDS, "isolation_level": None})
    event.listen(engine, "connect", _set_up_sqlite)
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _set_up_sqlite(connection: Any, _: object) -> None:
    """A commit is on the disk when it returns, and readers never wait for the writer."""
    for pragma in ("foreign_keys = ON", "synchronous = FULL", "recursive_triggers = ON"):
        connection.execute(f"PRAGMA {pragma}")
    if connection.execute("PRAGMA journal_mode").fetchone() != ("wal",):
        connection.execute("PRAGMA journal_mode = WAL")


def _begin_sqlite(connection: Connection) -> None:
    """A transaction that reads first and writes then could find the file changed in between and fail."""
    writing = connection.get_execution_options().get("eurotrain_writing")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


def _create(connection: Connection) -> None:
    """Make the tables, unless another process was faster."""
    if inspect(connection).has_table(format_version.name):
        return
    metadata.create_all(connection)
    for statement in guards(connection.dialect.name):
        connection.exec_driver_sql(statement)
    connection.execute(insert(format_version).values(version=FORMAT))


def refuse_network_file_system(path: Path, mounts: Path) -> None:
    """Raises ValueError: SQLite's locks and shared memory do not work across machines."""
    kind = file_system(path, mounts)
    if kind in _NETWORK_FILE_SYSTEMS:
        raise ValueError(
            f"{path} lies on a network file system ({kind}), where SQLite loses data; "
            "set EUROTRAIN_HOME to a local disk, or EUROTRAIN_DATABASE to a postgresql:// URL"
        )


def file_system(path: Path, mounts: Path) -> str:
    """Type of the file system that `path` lies or will lie on; "" where the kernel does not tell."""
    try:
        lines = mounts.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return ""
    target, best, kind = path.resolve(), -1, ""
    for line in lines:  # see proc(5): ... mount-point options [optional ...] - type source options
        left, _, right = line.partition(" - ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split()[4]))
        if (point == target or point in target.parents) and len(point.parts) >= best:
            best, kind = len(point.parts), right.split()[0]  # a later mount hides an earlier one
    return kind
