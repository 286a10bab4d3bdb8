"""The age of a process, against the clock of the process that started it."""

import os
import pathlib
import subprocess
import sys
import time

from moe_jax.parallel import process

# Prints the time of its first statement, and the times just before and after it read the age.
CHILD = """
import time
clock = lambda: time.clock_gettime(time.CLOCK_BOOTTIME)
first = clock()
from moe_jax.parallel.process import process_age
print(first, clock(), process_age(), clock())
"""


def test_a_process_began_between_its_start_and_its_first_statement():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    first, earlier, age, later = map(float, done.stdout.split())
    assert earlier - age <= first
    assert later - age >= before - 1 / os.sysconf("SC_CLK_TCK")


def test_where_there_is_no_proc_the_age_counts_from_the_import(monkeypatch):
    def no_file(*_):
        raise FileNotFoundError

    monkeypatch.setattr(pathlib.Path, "read_text", no_file)
    monkeypatch.setattr(process, "_IMPORTED", 5.0)
    monkeypatch.setattr(process.time, "monotonic", lambda: 7.5)
    assert process.process_age() == 2.5
