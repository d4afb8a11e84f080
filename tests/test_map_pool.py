"""Memory of large maps is reused, live maps are never overwritten, and memory can be released."""

import gc
import mmap
import subprocess
import sys
import threading

import pytest
import torch

import attnx
from attnx.ops.backends import map_pool

SIDE = 600
NBYTES = 4 * SIDE * SIDE  # of a map
pytestmark = pytest.mark.skipif(not hasattr(mmap, "MADV_FREE"), reason="needs MADV_FREE")


@pytest.fixture(autouse=True)
def nothing_left(monkeypatch):  # and a map of SIDE is large
    map_pool.clear()
    monkeypatch.setattr(map_pool, "LARGE", 1 << 20)


def test_what_a_map_leaves_serves_the_next_one():
    first = map_pool.empty((1, SIDE, SIDE))
    first.fill_(7)
    address, row = first.data_ptr(), first[0, 0]
    del first
    assert map_pool.empty((1, SIDE, SIDE)).data_ptr() != address  # a view of it lives
    del row
    again = map_pool.empty((SIDE, SIDE))
    assert again.data_ptr() == address
    assert again.shape == (SIDE, SIDE)
    assert again.is_contiguous()
    assert map_pool.empty((SIDE, SIDE)).data_ptr() != address
    del again
    assert map_pool.empty((SIDE, SIDE - 1)).data_ptr() == address
    assert map_pool.empty((SIDE, SIDE // 2)).data_ptr() != address  # half of it would lie idle


def test_small_maps_are_torchs():
    before = map_pool.empty((3, 5))
    del before
    assert map_pool.free_bytes() == 0
    assert map_pool.empty((0, SIDE)).shape == (0, SIDE)


def test_no_more_is_kept_than_is_said(monkeypatch):
    monkeypatch.setattr(map_pool, "KEPT", 3 * 4 * SIDE * SIDE)
    maps = [map_pool.empty((SIDE, SIDE)) for _ in range(5)]
    newest = [amap.data_ptr() for amap in maps[2:]]
    for i in range(5):
        maps[i] = None
    assert map_pool.free_bytes() == 3 * NBYTES
    maps = [map_pool.empty((SIDE, SIDE)) for _ in range(3)]
    assert [amap.data_ptr() for amap in maps] == newest[::-1]


def test_one_that_is_too_large_to_be_kept_does_not_drive_out_the_others(monkeypatch):
    monkeypatch.setattr(map_pool, "KEPT", 8 * SIDE * SIDE)
    small = map_pool.empty((SIDE, SIDE))
    del small
    large = map_pool.empty((3, SIDE, SIDE))
    del large
    assert map_pool.free_bytes() == NBYTES


@pytest.mark.skipif(sys.platform != "linux", reason="needs a limit on addresses")
def test_what_waits_is_given_up_before_memory_is_said_to_be_short():
    code = (
        "import resource, torch\n"
        "from attnx.ops.backends import map_pool\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + (600 << 20),) * 2)\n"
        "first = map_pool.empty((100 << 20,)); del first\n"
        "assert map_pool.free_bytes() == 400 << 20\n"
        "amap = map_pool.empty((120 << 20,)); print(amap.numel() >> 20, map_pool.free_bytes())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "120 0\n", run.stderr


def test_what_there_is_no_memory_for_is_torchs_error():
    with pytest.raises(RuntimeError, match=r"alloc|Storage size"):
        map_pool.empty((1 << 31, 1 << 31))


def test_a_system_that_marks_no_pages_keeps_none(monkeypatch):
    class Refuses(mmap.mmap):
        def madvise(self, *args):
            raise OSError("invalid argument")

    monkeypatch.setattr(map_pool.mmap, "mmap", Refuses)
    amap = map_pool.empty((2 * SIDE, 2 * SIDE))
    amap.fill_(1)
    del amap
    assert map_pool.free_bytes() == 0


def test_maps_that_live_are_never_written_over():
    q = torch.randn(1, 2, SIDE, 16)
    held, sums = [], []
    for i in range(12):
        amap = attnx.attention(q + i, q, q, backend="native")[1]
        if i % 3 == 0:
            held.append(amap)
            sums.append(amap.clone())
    del amap
    gc.collect()
    assert len({amap.data_ptr() for amap in held}) == 4
    assert all(torch.equal(amap, before) for amap, before in zip(held, sums, strict=True))
    assert map_pool.free_bytes() <= 2 * NBYTES  # the eight others took turns


def test_what_was_there_before_is_not_seen():
    q, k = torch.randn(2, 3, SIDE, 16), torch.randn(2, 3, SIDE, 16)
    for heads in ("mean", "max", "each"):
        spoilt = map_pool.empty((2, 3, SIDE, SIDE) if heads == "each" else (2, SIDE, SIDE))
        address = spoilt.fill_(torch.nan).data_ptr()
        del spoilt
        amap = attnx.attention_map(q, k, is_causal=True, heads=heads, backend="native")
        assert amap.data_ptr() == address
        want = attnx.attention_map(q, k, is_causal=True, heads=heads, backend="eager")
        torch.testing.assert_close(amap, want, rtol=1e-4, atol=1e-7)


def test_many_threads_take_and_leave():
    failed = []

    def work(number):
        for i in range(200):
            amap = map_pool.empty((SIDE, SIDE))
            amap[:3] = mark = 1000 * number + i
            if not (amap[:3] == mark).all():
                failed.append((number, i))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert map_pool.free_bytes() <= 2 * len(threads) * NBYTES  # the next map is made while the last one lives
