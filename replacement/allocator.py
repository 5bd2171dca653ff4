"""Memory that a process frees stays with it. Imports nothing heavy: it has to be told before PyTorch allocates."""

from __future__ import annotations

import ctypes
import os

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # parameters of mallopt, from <malloc.h>
_NEVER = 2**31 - 1
_KEPT_BELOW = 128 * 2**20  # larger pieces go back at once: kept they would leave gaps, which raised the peak by 12 %
_TOP_PAD = 64 * 2**20


def keep_freed_memory() -> bool:
    """Let glibc's allocator keep freed memory, so that the next allocation of that size need not fetch it from the kernel.

    By default every tensor of some megabytes is mapped anew and unmapped when it is freed. A training step allocates the same
    tensors over and over, and half of its time goes to the kernel, which clears each page at its first use. Call it
    before anything large is allocated; the commands do. What pieces of up to 128 MiB take at the peak then stays with the
    process until it ends. Settings of the user's own, in variables `MALLOC_...` of the environment, are left alone.

    Returns:
        Whether the settings were made: False where the C library is not glibc (macOS, Windows, musl).
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        os.confstr("CS_GNU_LIBC_VERSION")
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError, ValueError):
        return False
    settings = ((_M_MMAP_THRESHOLD, _KEPT_BELOW), (_M_TRIM_THRESHOLD, _NEVER), (_M_TOP_PAD, _TOP_PAD))
    return all([mallopt(parameter, value) == 1 for parameter, value in settings])
