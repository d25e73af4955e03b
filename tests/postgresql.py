"""A PostgreSQL server of the tests' own, on loopback, in a folder that goes when the tests end."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PATIENCE_S = 60
BINARIES = "/usr/lib/postgresql"  # Debian's, one folder per version


@contextlib.contextmanager
def server(fsync: str = "off") -> Iterator[str]:
    """The address of a running server, without a database's name. Skips where it cannot be had."""
    pytest.importorskip("psycopg", reason="no driver: pip install brqat[postgresql]")
    initdb, postgres = _binary("initdb"), _binary("postgres")
    if initdb is None or postgres is None:
        pytest.skip(f"no PostgreSQL server, neither in {BINARIES} nor on PATH")
    folder = Path(tempfile.mkdtemp(prefix="brqat-postgresql-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        as_whom = _not_root(folder)
        data, port = folder / "data", _free_port()
        words = [initdb, "-D", data, "-U", "brqat", "--auth=trust", "--no-sync"]
        made = subprocess.run(words, cwd=folder, capture_output=True, text=True, **as_whom)
        assert made.returncode == 0, made.stderr
        log = stack.enter_context(open(folder / "log", "w+"))
        # fsync is for a machine that loses power; what is killed here are its clients.
        words = [postgres, "-D", data, "-h", "127.0.0.1", "-p", str(port), "-k", folder, "-c", f"fsync={fsync}"]
        process = subprocess.Popen(words, cwd=folder, stdout=log, stderr=log, start_new_session=True, **as_whom)
        stack.callback(process.wait, PATIENCE_S)
        stack.callback(process.send_signal, signal.SIGINT)  # SIGTERM would wait for its clients
        address = f"postgresql://brqat@127.0.0.1:{port}"
        _wait_for(address, process, folder / "log")
        yield address


def database(address: str, name: str) -> str:
    """A new database of the server, as hydra.sweeper.storage takes it."""
    import psycopg

    with psycopg.connect(f"{address}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"')
    return f"{address}/{name}"


def _binary(name: str) -> str | None:
    versions = Path(BINARIES).glob(f"*/bin/{name}")
    found = max(versions, key=lambda path: float(path.parent.parent.name), default=None)
    return str(found) if found else shutil.which(name)


def _not_root(folder: Path) -> dict:
    """Arguments for subprocess: PostgreSQL refuses to run as root."""
    if os.geteuid() != 0:
        return {}
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            os.chown(folder, user.pw_uid, user.pw_gid)
            return {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    pytest.skip("PostgreSQL refuses to run as root, and there is neither a user postgres nor nobody")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def _wait_for(address: str, process: subprocess.Popen, log: Path) -> None:
    import psycopg

    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            psycopg.connect(f"{address}/postgres", connect_timeout=5).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
