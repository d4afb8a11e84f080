"""max_pixels bounds a decoder's memory. An image that needs more is an error row, and the process continues."""

import multiprocessing
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from PIL import Image
from small_job import draw

from attnx.jobs import memory
from attnx.jobs.decoding import Decode, Decoders
from attnx.jobs.memory import BYTES_PER_PIXEL, decoder_bytes, default_max_pixels, usable_memory
from attnx.jobs.sources import Entry
from attnx.jobs.sources.folder import Files
from attnx.models.pixels import Pixels

PIXELS = Pixels("timm", (32, 32), (0.0,) * 3, (1.0,) * 3, "bilinear", 0.8)


class Hungry(Files):
    """Reads files. For one of them it allocates 64 GiB of address space."""

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        if entry.key == "001.jpg":
            np.empty(2**36, np.uint8)
        return super().__call__(entry)


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_too_much_memory_is_the_rows_error(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 3)
    entries = [Entry(f"{i:03d}.jpg", f"{i:03d}.jpg") for i in range(3)]
    with Decoders(Decode(Hungry(folder), PIXELS, 2**20), 1, 60) as decoders:
        before = multiprocessing.active_children()
        errors = [decoders.submit(entry).result().error for entry in entries]
        assert multiprocessing.active_children() == before
    assert errors == [None, "001.jpg: MemoryError: needs more than 20 MB, which --max-pixels 1048576 allows", None]


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_limit_that_is_there_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    asked = []
    monkeypatch.setattr(resource, "setrlimit", lambda *wanted: asked.append(wanted))
    for hard in (resource.RLIM_INFINITY, 2**20):
        monkeypatch.setattr(resource, "getrlimit", lambda _, hard=hard: (0, hard))
        memory.limit_memory(2**24, False)
    (_, (free, _)), (_, bound) = asked
    assert free > decoder_bytes(2**24)
    assert bound == (2**20, 2**20)


@pytest.mark.parametrize("size", [(640, 480), (480, 640)])
def test_a_reduced_jpeg_has_the_full_size_and_crop(tmp_path: Path, size: tuple[int, int]) -> None:
    down, across = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([across * 255 // size[0], down * 255 // size[1], 0 * down], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    entry = Entry("x.jpg", "x.jpg")
    full, reduced = (Decode(Files(tmp_path), PIXELS, most)(entry) for most in (640 * 480, 640 * 480 - 1))
    assert (reduced.error, reduced.width, reduced.height) == (None, *size)
    assert full.crop is not None
    assert reduced.crop == pytest.approx(full.crop)
    assert full.pixels is not None
    assert reduced.pixels is not None
    assert 0 < np.abs(full.pixels.astype(int) - reduced.pixels).max() <= 6


def test_long_errors_are_cut(tmp_path: Path) -> None:
    error = Decode(Files(tmp_path), PIXELS, 100)(Entry("x", "/".join(["x" * 200] * 9))).error
    assert error is not None
    assert len(error) <= 300
    assert error.startswith(str(tmp_path)[:100])
    assert "…" in error


def test_the_default_follows_memory_and_decoders(monkeypatch: pytest.MonkeyPatch) -> None:
    assert decoder_bytes(1000) == 1000 * BYTES_PER_PIXEL
    for found, decoders, pixels in [
        (2**40, 1, 178_956_970), (2**30, 16, 2**24), (8_000_000_000, 4, 50_000_000), (8_000_000_000, 3, 66_000_000),
        (8_000_000_000, 0, 178_956_970),
    ]:  # fmt: skip
        monkeypatch.setattr(memory, "usable_memory", lambda found=found: found)
        assert default_max_pixels(decoders) == pixels


@pytest.mark.parametrize(
    ("line", "limit"),
    [("4:cpu,memory:/a/b", "memory/a/memory.limit_in_bytes"), ("0::/a/b", "a/memory.max"), ("0::/a", "memory.max")],
)
def test_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, limit: str) -> None:
    whole = usable_memory()
    monkeypatch.setattr(memory, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    for name, text in [("proc/self/cgroup", f"5:cpuset:/a\n{line}\n"), ("cgroup/" + limit, "1234567\n")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert usable_memory() == 1234567
    (tmp_path / "cgroup" / limit).write_text("max\n")
    assert usable_memory() >= whole
