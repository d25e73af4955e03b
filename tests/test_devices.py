"""Several runs on a host with several devices: each takes the one that fewest hold."""

import signal
import subprocess
import sys
from contextlib import ExitStack

import pytest
import torch

from brqat.devices import claimed_device, least_taken

HOLDER = """
import sys, time
from pathlib import Path
from brqat.devices import least_taken

with least_taken(["a", "b"], Path(sys.argv[1])) as index:
    print(index, flush=True)
    time.sleep(60)
"""


def test_each_holder_takes_the_name_that_fewest_hold(tmp_path):
    with ExitStack() as held:
        found = [held.enter_context(least_taken("abc", tmp_path)) for _ in range(7)]
    assert found == [0, 1, 2, 0, 1, 2, 0]
    with least_taken("abc", tmp_path) as first:
        assert first == 0  # all of them let go


def test_name_that_was_let_go_is_taken_next(tmp_path):
    with least_taken("ab", tmp_path), ExitStack() as others:
        first = ExitStack()
        assert first.enter_context(least_taken("ab", tmp_path)) == 1
        assert others.enter_context(least_taken("ab", tmp_path)) == 0  # shared
        first.close()
        assert others.enter_context(least_taken("ab", tmp_path)) == 1


@pytest.mark.slow  # a process that imports torch
def test_hold_of_a_killed_process_falls_with_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "0\n"
        with least_taken("ab", tmp_path) as index:
            assert index == 1
        process.send_signal(signal.SIGKILL)
        process.wait()
        with least_taken("ab", tmp_path) as index:
            assert index == 0
    finally:
        process.kill()
        process.wait()


def test_auto_is_spread_over_the_gpus_and_a_named_device_is_taken_as_it_is(tmp_path, monkeypatch):
    class Uuid:
        def __init__(self, index):
            self.uuid = f"gpu-{index}"

    taken = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", Uuid)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("brqat.devices._usable", torch.device)
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    with claimed_device("auto") as one, claimed_device("auto") as other, claimed_device("cuda:0") as named:
        assert [str(device) for device in (one, other, named)] == ["cuda:0", "cuda:1", "cuda:0"]
        with claimed_device("auto") as third:
            assert str(third) == "cuda:0"
    assert taken == [0, 1, 0]
    with claimed_device("cpu") as device:
        assert device == torch.device("cpu")
