"""Freed memory stays with the process where it asks for that."""

import os
import subprocess
import sys

import pytest

from gankern.memory import SETTINGS

# Minor page faults of each of some rounds that free 40 MiB and take them again.
ROUNDS = """
import resource, sys
import numpy
from gankern.memory import keep_memory
print(keep_memory() if sys.argv[1] == "keep" else False)
def faults(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(2 if sys.argv[1] == "plain" else 10):
    before = faults()
    x = numpy.ones(5 * 2**20)
    del x
    print(faults() - before)
"""


def rounds(how, **settings):
    environment = {k: v for k, v in os.environ.items() if k not in SETTINGS} | settings
    command = [sys.executable, "-c", ROUNDS, how]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    taken, *faults = done.stdout.split()
    return taken == "True", [int(n) for n in faults]


@pytest.mark.skipif(not hasattr(os, "confstr"), reason="needs glibc")
def test_pages_are_touched_once():
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
    except ValueError:
        pytest.skip("needs glibc")
    taken, kept = rounds("keep")
    _, given_back = rounds("plain")
    assert taken
    assert max(kept[-3:]) < 10  # after some, between which smaller blocks lie
    assert min(given_back) > 15  # a page of 2 MiB is one, too


def test_the_environment_goes_first():
    assert rounds("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] is False
