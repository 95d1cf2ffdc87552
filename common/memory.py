"""Memory that large tensors give back is kept by the process, not by the system."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> None:
    """Let glibc serve tensors of any size from its heap and keep what is freed.

    By default every tensor above 32 MB is mapped afresh, and the system hands out its pages one fault at a time, zeroed:
    up to half the time of a whole-volume inference on a CPU. Elsewhere than on Linux with glibc nothing changes.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, LARGEST_INT)


def give_back_freed_memory() -> None:
    """Once in a while: tensors of many sizes leave holes in the kept heap, which would grow and grow."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
