"""Memory for large maps on CPUs: pages of a freed map are reused for the next one.

The system zeroes fresh pages as a map is written into them, and malloc gives blocks above 32 MB back at once: a rollout
at 3,601 tokens takes up to 1.4 times as long for it. So the pages of a freed map are kept and marked as free
(MADV_FREE): the system takes them whenever it needs memory, and until then the next map can have them. Smaller maps
come from malloc, which keeps freed blocks itself.
"""

import mmap
import weakref
from contextlib import suppress
from math import prod

import numpy as np
import torch
from torch import Tensor

LARGE = 32 << 20  # bytes from which on a map has pages of its own: glibc's largest threshold for blocks that it maps
KEPT = 1 << 30  # bytes of free pages at most

_free: list[mmap.mmap] = []  # the oldest first; each operation on the list is atomic


def empty(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor on the CPU; a large one reuses free pages and can't be resized in place."""
    size = 4 * prod(shape)
    if size >= LARGE and hasattr(mmap, "MADV_FREE"):
        with suppress(OSError, OverflowError):  # torch's own error names the size
            pages = _take(size) or _fresh(size)
            array = np.frombuffer(pages, np.float32)
            # The tensor keeps the array: a slice's base is the array itself, since the array's is none.
            # At the end of the process the system takes everything anyway.
            weakref.finalize(array, _release, pages).atexit = False
            return torch.from_numpy(array[: prod(shape)]).view(shape)
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def free_bytes() -> int:
    """Bytes of free pages that wait for the next map."""
    return sum(map(len, tuple(_free)))


def clear() -> None:
    """Return all free pages to the system."""
    _free.clear()


def _take(size: int) -> mmap.mmap | None:
    """The newest free pages that are large enough and at most an eighth too large."""
    for pages in reversed(_free):
        if size <= len(pages) <= size + size // 8:
            try:
                _free.remove(pages)
            except ValueError:
                continue  # another thread was faster
            return pages
    return None


def _fresh(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        pages = mmap.mmap(-1, size, flags=flags)
    except OSError:  # the free pages count towards a limit on address space
        clear()
        pages = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _release(pages: mmap.mmap) -> None:
    """Add pages to the free list and drop the oldest beyond KEPT bytes; drop them where MADV_FREE fails."""
    if len(pages) > KEPT:
        return
    with suppress(OSError):
        pages.madvise(mmap.MADV_FREE)
        _free.append(pages)
    while free_bytes() > KEPT:
        with suppress(IndexError):
            _free.pop(0)
