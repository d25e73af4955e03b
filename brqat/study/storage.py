"""Where a study lives: an SQLite file, a journal file or a PostgreSQL database, each with a lock for all its workers.

The lock is the operating system's or the database's own, so that it falls with whoever holds it.
"""

import errno
import functools
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import optuna
from filelock import FileLock
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.storages.journal._file import BaseJournalFileLock
from sqlalchemy import Engine, create_engine, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

log = logging.getLogger(__name__)

BUSY_S = 60.0  # that a writer waits for another one of an SQLite file
UNREACHABLE_S = 60.0  # that a database may be away before we give up on it
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}


# In what a database's driver says when the server is away, and not when the address is wrong.
_MAY_PASS = ("refused", "timeout", "timed out", "starting up", "shutting down", "closed", "reset", "too many")


class Unreachable(RuntimeError):
    """The database has not answered for UNREACHABLE_S."""


@dataclass(frozen=True)
class Storage:
    """An open storage. `where` carries no password."""

    where: str
    optuna: BaseStorage
    lock_file: Path | None  # of a storage on this host
    locks: Engine | None  # of PostgreSQL

    @contextmanager
    def exclusive(self) -> Iterator[Callable[[], None]]:
        """One worker at a time, on whatever host. What a worker that dies inside leaves, the next one finds.

        Yields a function that raises if the lock is no longer ours: a database may drop the connection that holds it.
        """
        if self.lock_file is not None:
            with FileLock(self.lock_file):
                yield lambda: None
        else:
            with _advisory_lock(self.locks) as check:
                yield check


def open_storage(where: str | None, folder: Path, create: bool = True) -> Storage:
    """Opens what hydra.sweeper.storage names, once per process.

    where: null (study.db in the folder), journal (study.journal in the folder), sqlite:///PATH, journal:///PATH, or
    postgresql://USER:PASSWORD@HOST/DATABASE. Raises ValueError for anything else, and where it is absent and not to
    be created.
    """
    if where in (None, "sqlite"):
        where = f"sqlite:///{folder / 'study.db'}"
    elif where == "journal":
        where = f"journal:///{folder / 'study.journal'}"
    kind, separator, path = str(where).partition("://")
    if not separator or kind.split("+")[0] not in ("sqlite", "journal", "postgresql"):
        shown = re.sub("//[^/@]*@", "//***@", str(where))
        raise ValueError(
            f"hydra.sweeper.storage={shown} is not known. Write null (SQLite in the sweep's folder), journal, "
            "sqlite:///PATH, journal:///PATH or postgresql://USER:PASSWORD@HOST/DATABASE."
        )
    if kind.split("+")[0] == "postgresql":
        return _postgresql(_psycopg(where), os.getpid())
    file = Path(path.removeprefix("/")).expanduser().absolute()
    if not create and not file.exists():
        raise ValueError(f"there is no study at {file}.")
    return (_journal if kind == "journal" else _sqlite)(file, os.getpid())


def is_full(error: BaseException | None) -> bool:
    """Whether an error says that the disk takes no more: the machine's fault, not the setting's."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _NO_ROOM:
            return True
        if any(words in str(error) for words in ("disk is full", "No space left on device", "could not extend file")):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_away(error: BaseException | None) -> bool:
    """Whether an error says that the storage could not be reached, which may pass."""
    while error is not None:
        if isinstance(error, (OperationalError, InterfaceError, StorageInternalError, Unreachable)):
            return not is_full(error)
        error = error.__cause__ or error.__context__
    return False


def patiently(method: Callable) -> Callable:
    """Repeats a method while the storage is away, for UNREACHABLE_S: a database that restarts costs no trial."""

    @functools.wraps(method)
    def call(*args, **kwargs):
        given_up = time.monotonic() + UNREACHABLE_S
        while True:
            try:
                return method(*args, **kwargs)
            except Exception as error:
                if not is_away(error) or time.monotonic() > given_up:
                    raise
                log.warning("the study's storage does not answer (%s): trying again", str(error).splitlines()[0])
                time.sleep(1)

    return call


# ---- the three kinds; a process of its own, since a fork must not share connections


@functools.cache
def _sqlite(file: Path, process: int) -> Storage:
    file.parent.mkdir(parents=True, exist_ok=True)
    lock = file.with_name(f".{file.name}.lock")
    with FileLock(lock):  # several workers would otherwise create the tables at once
        try:
            storage = RDBStorage(f"sqlite:///{file}", engine_kwargs={"connect_args": {"timeout": BUSY_S}})
        except DatabaseError as error:
            if "file is not a database" not in str(error):
                raise
            raise ValueError(f"{file} is no SQLite database, and so no study.") from error
    return Storage(f"sqlite:///{file}", _cached(storage), lock, None)


@functools.cache
def _journal(file: Path, process: int) -> Storage:
    file.parent.mkdir(parents=True, exist_ok=True)
    backend = _WholeLines(str(file), _JournalLock(file.with_name(f".{file.name}.write.lock")))
    backend.mend()
    return Storage(f"journal:///{file}", JournalStorage(backend), file.with_name(f".{file.name}.lock"), None)


@functools.cache
def _postgresql(url: str, process: int) -> Storage:
    engine = create_engine(url, poolclass=NullPool, connect_args={"connect_timeout": 10})
    with _advisory_lock(engine):
        storage = RDBStorage(url, engine_kwargs={"pool_size": 4, "max_overflow": 8, "pool_pre_ping": True})
    return Storage(make_url(url).render_as_string(hide_password=True), _cached(storage), None, engine)


def _cached(storage: RDBStorage) -> BaseStorage:
    return optuna.storages.get_storage(storage)  # reads finished trials once


def _psycopg(url: str) -> str:
    """The URL with the driver that brqat[postgresql] installs, unless it names one itself."""
    try:
        parsed = make_url(url)
        if parsed.drivername == "postgresql":
            parsed = parsed.set(drivername="postgresql+psycopg")
        parsed.get_dialect().import_dbapi()
    except (ArgumentError, NoSuchModuleError) as error:
        raise ValueError(f"hydra.sweeper.storage is no database address: {error}") from error
    except ImportError as error:
        raise ValueError(
            f"hydra.sweeper.storage={parsed.render_as_string()}: no driver ({error}). Install brqat[postgresql]."
        ) from error
    return parsed.render_as_string(hide_password=False)


@contextmanager
def _advisory_lock(engine: Engine) -> Iterator[Callable[[], None]]:
    """PostgreSQL's lock on a number made of the database's name; held by a connection of its own.

    It belongs to a session: a pooler between us and the database must pool sessions, not transactions.
    """
    key = int.from_bytes(hashlib.sha256(f"brqat {engine.url.database}".encode()).digest()[:8], signed=True)
    with _connection(engine) as connection:
        connection.execute(text("SELECT pg_advisory_lock(:key)"), {"key": key})
        try:
            yield lambda: connection.execute(text("SELECT 1"))
        finally:
            with suppress(OperationalError):  # the lock fell with its connection
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), {"key": key})


@contextmanager
def _connection(engine: Engine):
    """An open connection; a database that restarts is waited for."""
    given_up = time.monotonic() + UNREACHABLE_S
    shown = engine.url.render_as_string(hide_password=True)
    while True:
        try:
            connection = engine.connect()
            break
        except OperationalError as error:
            if not any(words in str(error).lower() for words in _MAY_PASS):
                raise ValueError(f"{shown} cannot be used: {error.orig}") from error
            if time.monotonic() > given_up:
                raise Unreachable(f"no database answers at {shown}: {error.orig}") from error
            log.warning("no database answers at %s: trying again", shown)
            time.sleep(1)
    with connection.execution_options(isolation_level="AUTOCOMMIT"):
        yield connection


class _JournalLock(BaseJournalFileLock):
    """Optuna's own is a symbolic link, which a killed writer leaves behind for 30 seconds."""

    def __init__(self, file: Path):
        self.lock = FileLock(file)

    def acquire(self) -> bool:
        self.lock.acquire()
        return True

    def release(self) -> None:
        self.lock.release()


class _WholeLines(JournalFileBackend):
    """Cuts a line that a full disk or a kill left half-written, which would make the whole journal unreadable."""

    def append_logs(self, logs: list[dict]) -> None:
        with self._lock.lock:  # reentrant
            self.mend()
            try:
                super().append_logs(logs)
            except OSError:
                self.mend()
                raise

    def mend(self) -> None:
        """Cuts what follows the last line break; the caller may hold the lock."""
        with self._lock.lock, open(self._file_path, "rb+") as file:
            end = file.seek(0, os.SEEK_END)
            if end == 0:
                return
            file.seek(end - 1)
            if file.read(1) == b"\n":
                return
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
