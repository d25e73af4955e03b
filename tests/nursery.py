"""Many processes that run brqat's command line, where torch is imported once: they are forked from one that has it.

A worker is a process like any other: it has its own pid, takes signals, and ends as `python -m brqat.train` does. With
a hook it kills itself at the Nth time that it comes to what the hook names.

Run as a script this is the process that forks. Each line on its standard input is a worker to start; it answers with
the worker's pid, and writes how the worker ended into a file once it has.
"""

import contextlib
import io
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

PATIENCE_S = 120


class Worker:
    """What Popen is to a program."""

    def __init__(self, pid: int, log: Path):
        self.pid, self.log = pid, log
        self.code: int | None = None  # once it is known

    def poll(self) -> int | None:
        """Its exit code, minus the signal that it died of; None while it runs."""
        status = self.log.with_suffix(".status")
        if self.code is None and status.exists():
            self.code = int(status.read_text())
        return self.code

    def wait(self) -> int:
        until = time.monotonic() + PATIENCE_S
        while (code := self.poll()) is None:
            assert time.monotonic() < until, f"does not end: {self.log.read_text()[-4000:]}"
            time.sleep(0.005)
        return code

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ends just now
            if self.poll() is None:
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Nursery:
    """Starts workers. Ends with those that still run."""

    def __init__(self, cwd: Path):
        words = [sys.executable, __file__]
        self.process = subprocess.Popen(words, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.workers: list[Worker] = []

    def start(
        self, log: Path, overrides: list[str], env: dict[str, str], hook: tuple[str, int] | None = None
    ) -> Worker:
        """log: where its output goes. hook: the name of a function below, and N."""
        log.touch()
        print(json.dumps([str(log), overrides, env, hook]), file=self.process.stdin, flush=True)
        self.workers.append(Worker(int(self.process.stdout.readline()), log))
        return self.workers[-1]

    def close(self) -> None:
        for worker in self.workers:
            worker.kill()
        for worker in self.workers:
            worker.wait()
        self.process.stdin.close()
        self.process.wait(PATIENCE_S)


# ---- where a worker dies


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def between_trials(is_now) -> None:
    """As the worker asks what is next."""
    from brqat.study.ledger import Ledger

    ask = Ledger.next_trial

    def next_trial(self, *arguments, **named):
        if is_now():
            die()
        return ask(self, *arguments, **named)

    Ledger.next_trial = next_trial


def checkpoint_half(is_now) -> None:
    """Half of a checkpoint is written."""
    from brqat import checkpoint, files

    def write_whole(path, write):
        def half(file):
            whole = io.BytesIO()
            write(whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()

        files.write_whole(path, half if is_now() else write)

    checkpoint.write_whole = write_whole


def checkpoint_whole(is_now) -> None:
    """A checkpoint has just been renamed into place."""
    from brqat import checkpoint, files

    def write_whole(path, write):
        files.write_whole(path, write)
        if is_now():
            die()

    checkpoint.write_whole = write_whole


def storage(is_now) -> None:
    """Before a statement that writes, before a commit, or with a journal's line cut short."""
    from optuna.storages.journal import JournalFileBackend
    from sqlalchemy import Engine, event

    def statement(connection, cursor, words, *_):
        if words.lstrip().upper().startswith(("INSERT", "UPDATE", "DELETE", "CREATE")) and is_now():
            die()

    def commit(connection):
        if is_now():
            die()

    event.listen(Engine, "before_cursor_execute", statement)
    event.listen(Engine, "commit", commit)
    append = JournalFileBackend.append_logs

    def append_logs(self, logs):
        last = is_now()
        append(self, logs)
        if last:
            os.truncate(self._file_path, os.path.getsize(self._file_path) - 10)
            die()

    JournalFileBackend.append_logs = append_logs


HOOKS = {hook.__name__: hook for hook in (between_trials, checkpoint_half, checkpoint_whole, storage)}


def countdown(left: int):
    """Whose Nth call is true."""

    def is_now() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    return is_now


# ---- the process that forks


def be_worker(log: str, overrides: list[str], env: dict[str, str], hook: tuple[str, int] | None) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(out, stream)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.environ.update(env)
    if hook is not None:
        HOOKS[hook[0]](countdown(hook[1]))
    sys.argv[1:] = overrides
    del sys.modules["brqat.train"]  # which under -m runs as __main__
    runpy.run_module("brqat.train", run_name="__main__", alter_sys=True)


def main() -> None:
    import brqat.study.worker
    import brqat.train  # noqa: F401  before the first fork

    logs: dict[int, str] = {}

    def note_the_dead() -> None:
        while logs and (found := os.waitpid(-1, os.WNOHANG))[0]:
            pid, status = found
            file = Path(logs.pop(pid)).with_suffix(".status")
            file.with_suffix(".next").write_text(str(os.waitstatus_to_exitcode(status)))
            file.with_suffix(".next").rename(file)

    while True:
        note_the_dead()
        if select.select([0], [], [], 0.01)[0]:
            line = b""
            while not line.endswith(b"\n"):  # past the buffer of sys.stdin, which select does not see
                byte = os.read(0, 1)
                if not byte:
                    return
                line += byte
            given = json.loads(line)
            pid = os.fork()
            if pid == 0:
                return be_worker(*given)
            logs[pid] = given[0]
            print(pid, flush=True)


if __name__ == "__main__":
    main()
