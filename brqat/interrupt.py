"""SIGTERM and SIGINT end a run cleanly; a second one ends it at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupted(Exception):
    """A signal asked the run to end."""

    def __init__(self, number: int):
        super().__init__(signal.Signals(number).name)
        self.number = number


class StopRequest:
    """Remembers that a signal came until the training loop asks."""

    def __init__(self):
        self.number: int | None = None
        self.told = False

    def check(self) -> None:
        """Raises Interrupted if a signal has come."""
        if self.number is not None:
            self.told = True
            raise Interrupted(self.number)


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Inside, the first signal is noted and the second acts as it would have without us.

    A signal that nobody asked for before the end acts then: a sweep does not go on after it.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request  # only the main thread may set handlers; a launcher's threads are ended by their process
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def note(number, _frame):
        request.number = number
        signal.signal(number, before[number])

    for number in before:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if request.number is not None and not request.told:
        signal.raise_signal(request.number)
