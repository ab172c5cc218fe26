"""What the C library does with freed tensors, in the process of the round loop."""

from __future__ import annotations

import ctypes
import os
import platform

_VARIABLE, _OPTION = "MALLOC_MMAP_THRESHOLD_", -3  # M_MMAP_THRESHOLD of mallopt(3), by its number in malloc.h
_THRESHOLD_BYTES = 2**20


def return_freed_memory() -> None:
    """Let glibc give tensors back to the system as they are freed; other C libraries, and a user's word, stand.

    By itself glibc raises the size from which it does so to that of the largest block freed, up to 32 MiB. Tensors of
    a few rounds then leave holes that the next ones do not fit: 160 MB with a model of 200 MB.
    """
    if platform.libc_ver()[0] == "glibc" and _VARIABLE not in os.environ:
        ctypes.CDLL(None).mallopt(_OPTION, _THRESHOLD_BYTES)
