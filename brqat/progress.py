"""Progress: a bar on a terminal, plain lines elsewhere."""

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import rich
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 30.0


class _Bar:
    def __init__(self, bar: Progress, name: str, steps: int, done: int):
        self.bar = bar
        self.task = bar.add_task(name, total=steps, completed=done, state="")

    def advance(self) -> None:
        self.bar.advance(self.task)

    def state(self, text: str) -> None:
        self.bar.update(self.task, state=text)


class _Lines:
    """A line whenever PLAIN_EVERY_S have passed, so that a long epoch is not silent in a log file."""

    def __init__(self, log: logging.Logger, name: str, steps: int, done: int):
        self.log, self.name, self.steps, self.done = log, name, steps, done
        self.said = time.monotonic()

    def advance(self) -> None:
        self.done += 1
        if time.monotonic() - self.said > PLAIN_EVERY_S:
            self.said = time.monotonic()
            self.log.info("%s  step %d of %d", self.name, self.done, self.steps)

    def state(self, text: str) -> None:
        """Nothing: the epoch's own log line says it."""


@contextmanager
def progress(log: logging.Logger, name: str, steps: int, done: int = 0) -> Iterator[_Bar | _Lines]:
    """Follows `steps` training steps, of which `done` lie behind a resumed run already."""
    if not sys.stdout.isatty():
        yield _Lines(log, name, steps, done)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(compact=True),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=rich.get_console(), transient=True) as bar, _log_above():
        yield _Bar(bar, name, steps, done)


@contextmanager
def _log_above() -> Iterator[None]:
    """Sends console logging through the bar's stdout, which prints above the bar instead of into it."""
    handlers = [
        handler
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
    ]
    before = [handler.setStream(sys.stdout) for handler in handlers]
    try:
        yield
    finally:
        for handler, stream in zip(handlers, before, strict=True):
            if stream is not None:
                handler.setStream(stream)
