"""How this process gets memory from its system.

Programs that allocate the same large arrays again and again, a training step on a CPU or a data
pipeline, get them page by page from the system if each is handed back in between: a third of such a
step's time. glibc can be told to keep them. Elsewhere (macOS, musl) nothing is changed.
"""

import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # names of malloc.h
_MB = 2**20


@functools.cache
def keep_freed(large: bool = False) -> bool:
    """Keeps what is freed for the next allocation of this process; says whether it can.

    Arrays up to 32 MB, and 256 MB of them; with `large` all, as a computation on a CPU needs it:
    the process then stays as big as it once was. That has to be said before the threads start that
    compute, since all of them share one heap then.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # no C library with it
        return False
    settings = {_MMAP_THRESHOLD: 32 * _MB, _TRIM_THRESHOLD: 256 * _MB}
    if large:
        settings = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _ARENA_MAX: 1}
    done = [mallopt(name, value) for name, value in settings.items()]  # each of them, whatever
    return all(done)
