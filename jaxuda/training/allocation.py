"""How the process keeps memory between the steps on a CPU."""

import ctypes
import platform

# The parameters of mallopt (malloc.h).
_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8


def keep_freed_memory() -> bool:
    """Lets the C library keep what a step frees for the next one; to be called before JAX computes anything.

    A compiled step asks for all its temporary memory in one block. By default glibc gets such a block from the kernel
    and returns it after every step, and the kernel clears each page anew: an eighth to a fifth of the time of a
    ResNet-101 step. With this the process keeps its largest size until it ends. Nothing happens where the C library is
    not glibc.

    Returns:
      Whether it has been done.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One arena for all threads: only the main one can grow to any size without asking the kernel for a mapping.
    # No block is mapped, however large, and -1 means that none is given back.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return all(mallopt(parameter, value) == 1 for parameter, value in settings)
