"""How the C library hands out memory: training on a CPU frees and takes the same large tensors in every step."""

import ctypes
import os

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_")


def keep_freed_memory() -> None:
    """Let glibc keep what is freed for the next step; elsewhere, or where its variables are set, nothing is done.

    By default it returns tensors of more than 32 MiB to the system at once, so that every step takes new pages, each
    of which the system fills with zeros first: a quarter of the time of CasiaNet's steps in float32 at 192 images.
    The process then holds the most memory that it ever needed, and some more, in pieces that don't fit together.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not any(name in os.environ for name in _VARIABLES):
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
