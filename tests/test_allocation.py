import resource
import subprocess
import sys

import pytest

from jaxuda.training.allocation import keep_freed_memory

TOUCHED = 1 << 27
SCRIPT = f"""
import ctypes, resource, sys
from jaxuda.training.allocation import keep_freed_memory
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

def use(size):
    block = libc.malloc(ctypes.c_size_t(size))
    libc.memset(ctypes.c_void_p(block), 1, ctypes.c_size_t({TOUCHED}))
    libc.free(block)

if sys.argv[1] == "keep":
    keep_freed_memory()
use(int(sys.argv[2]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use(int(sys.argv[2]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.parametrize("size", [TOUCHED, 5 << 29])  # the memory of small steps; more than 2 GiB
def test_freed_memory_is_used_again(size: int) -> None:
    if not keep_freed_memory():
        pytest.skip("not with this C library")
    run = lambda how: int(subprocess.check_output([sys.executable, "-c", SCRIPT, how, str(size)], text=True))  # noqa: E731
    pages = TOUCHED // resource.getpagesize()
    assert run("keep") < pages / 1000 < run("default")
