"""Memory that tensors on a CPU have freed stays with the process."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h's numbers


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep what is freed for the next tensor; False where malloc is another's.

    It would hand blocks of more than 32 MiB back to the system at once and get them again page by page, each zeroed: a
    tenth to a third of a forward pass at 224 pixels on a CPU (docs/evaluation.md). The price: a process never shrinks.
    So it is for programs that own their process, and nothing calls it on import.
    """
    if sys.platform != "linux":
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "gnu_get_libc_version"):
        return False
    return library.mallopt(M_MMAP_MAX, 0) == 1 and library.mallopt(M_TRIM_THRESHOLD, -1) == 1
