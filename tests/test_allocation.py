import resource
import subprocess
import sys

import pytest

from jaxuda.allocation import keep_freed_memory

SCRIPT = """
import resource, sys
from jaxuda.allocation import keep_freed_memory
kept = keep_freed_memory() if sys.argv[1] == "keep" else True
bytearray(1 << 27)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(4):
    bytearray(1 << 27)
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_freed_memory_is_used_again():
    if not keep_freed_memory():
        pytest.skip("not with this C library")
    pages = (1 << 27) // resource.getpagesize()
    run = [sys.executable, "-c", SCRIPT]
    kept, faults = map(int, subprocess.check_output([*run, "keep"], text=True).split())
    assert kept and faults < pages / 100
