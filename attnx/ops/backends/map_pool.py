"""Memory for large maps on CPUs: the pages that one map has left serve the next one.

The system zeroes fresh pages as a map is written into them, and malloc gives blocks above 32 MB back at once: a rollout
at 3,601 tokens takes up to 1.4 times as long for it. So the pages of such a map stay when it is freed, but marked as
free (MADV_FREE): the system takes them whenever it needs memory, and until it does they are there for the next map.
Smaller ones are malloc's: it keeps those itself, and has room for them among what a model's activations left.
"""

import mmap
import weakref
from contextlib import suppress
from math import prod

import numpy as np
import torch
from torch import Tensor

LARGE = 32 << 20  # bytes from which on a map has pages of its own: glibc's largest threshold for blocks that it maps
KEPT = 1 << 30  # bytes at most that wait for a map

_left: list[mmap.mmap] = []  # the oldest first; used by one operation at a time, each of which is atomic


def empty(shape: tuple[int, ...]) -> Tensor:
    """An uninitialised float32 tensor on the CPU, in pages that an earlier one has left, if it is large.

    A large one can't be resized in place.
    """
    size = 4 * prod(shape)
    if size >= LARGE and hasattr(mmap, "MADV_FREE"):
        with suppress(OSError, OverflowError):  # torch says better than the system what there is no memory for
            pages = _take(size) or _fresh(size)
            array = np.frombuffer(pages, np.float32)
            # The tensor keeps the array: a slice's base is the array itself, since the array's is none.
            # At the end of the process the system takes everything anyway.
            weakref.finalize(array, _leave, pages).atexit = False
            return torch.from_numpy(array[: prod(shape)]).view(shape)
    return torch.empty(shape, dtype=torch.float32, device="cpu")


def _take(size: int) -> mmap.mmap | None:
    """The newest of the pages that were left, if they fit and not much of them will lie idle."""
    for pages in reversed(_left):
        if size <= len(pages) <= size + size // 8:
            try:
                _left.remove(pages)
            except ValueError:
                continue  # another thread was faster
            return pages
    return None


def _fresh(size: int) -> mmap.mmap:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    try:
        pages = mmap.mmap(-1, size, flags=flags)
    except OSError:  # where a process may have so many addresses and no more, those that wait are some of them
        _left.clear()
        pages = mmap.mmap(-1, size, flags=flags)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def _leave(pages: mmap.mmap) -> None:
    """Keeps pages for the next map; the oldest go when there are too many, and all of them where none can be marked."""
    if len(pages) > KEPT:
        return
    with suppress(OSError):
        pages.madvise(mmap.MADV_FREE)
        _left.append(pages)
    while sum(map(len, tuple(_left))) > KEPT:
        with suppress(IndexError):
            _left.pop(0)
