"""Memory that was freed is there for the next step, also in a thread: Ray runs a worker's loop in one."""

from __future__ import annotations

import subprocess
import sys

import pytest

STEPS = """
import resource, sys, threading
from workloads.data.allocator import keep_freed_memory

def steps():
    if sys.argv[1] == "keep":
        keep_freed_memory()
    for step in range(6):
        if step == 2:
            before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
        kept = [bytearray(b"1") * (5 << 20) for _ in range(20)]  # more than one heap of a thread
        del kept
    print(resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before)

thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is asked")
def test_a_thread_takes_no_page_twice() -> None:
    faults = {
        how: int(subprocess.run([sys.executable, "-c", STEPS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("keep", "give back")
    }
    assert faults["keep"] < 200 < 10_000 < faults["give back"]
