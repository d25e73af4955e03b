"""That freed memory is kept: in processes of their own, since what is told to malloc holds for good."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from brqat.memory import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
def use():
    for _ in range(10):
        torch.ones(10_000_000)  # 40 MB, more than glibc keeps by itself
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_is_freed_is_not_mapped_in_again():
    def faults(word):
        done = subprocess.run([sys.executable, "-c", PROGRAM, word], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert faults("as it is") > 1000 and faults("kept") < 100
