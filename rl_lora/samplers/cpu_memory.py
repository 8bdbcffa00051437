"""Returns memory to the system between the phases of a step (Linux with glibc).

PyTorch's CPU tensors come from malloc, which keeps what is freed: without this, the sampler's and
the learner's peaks would add up although they never work at the same time.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

_MADV_DONTNEED = 4
_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def trim() -> None:
    """Returns the heap's freed memory; does nothing if the C library has no malloc_trim."""
    if _libc is not None:
        with contextlib.suppress(AttributeError):  # musl has none
            _libc.malloc_trim(0)


def forget(tensors: Iterable[Tensor]) -> int:
    """Returns the pages of the tensors' storages to the system; they read as zero afterwards.

    Returns:
        Bytes returned: whole pages of CPU storages, each storage once; 0 if not on Linux.

    Raises:
        OSError: the system refuses.
    """
    if _libc is None:
        return 0
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage() for t in tensors if t.is_cpu}
    total = 0
    for address, storage in storages.items():
        start = -(-address // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (address + storage.nbytes() - start) // mmap.PAGESIZE * mmap.PAGESIZE
        if length <= 0:
            continue
        arguments = ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_DONTNEED
        if _libc.madvise(*arguments):
            raise OSError(ctypes.get_errno(), "madvise")
        total += length
    return total
