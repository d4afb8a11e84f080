"""Errors of an image or a batch become error rows, and maps do not depend on how the work is divided."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_job import draw

import attnx
from attnx.jobs.columns import STATS, MapRow
from attnx.jobs.decoding import Decode, Decoders, Picture
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.packing import Format, pack
from attnx.jobs.plan import open_job
from attnx.jobs.sources import Entry, open_source
from attnx.jobs.sources.folder import Files
from attnx.jobs.tasks import ImageTask, WordTask
from attnx.jobs.worker import Worker
from attnx.models.pixels import Pixels

PIXELS = Pixels("whole", (4, 6), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "bilinear")


def grey(images: torch.Tensor) -> torch.Tensor:
    return images.mean(1)


def made(folder: Path, out: Path, extract: Callable = grey, workers: int = 0, **options: Any) -> list[MapRow]:
    decode = Decode(Files(folder), PIXELS, options.pop("max_pixels", None))
    timeout, size = options.pop("timeout", 60), options.pop("shard_size", None)
    with (
        open_job(out, open_source(folder), {}, {}, shard_size=size) as job,
        Decoders(decode, workers, timeout) as decoders,
        Worker(job, decoders, PIXELS, ImageTask(extract), **options) as worker,
    ):
        for shard in range(job.shards):
            worker.run_shard(shard, shard + 1 if shard + 1 < job.shards else None)
    return list(attnx.open(out))


def same(left: list[MapRow], right: list[MapRow]) -> bool:
    def bits(row: MapRow) -> tuple:
        return row.key, None if row.map is None else row.map.tobytes(), row.width, row.height, row.crop, row.error

    return list(map(bits, left)) == list(map(bits, right))


def test_processes_give_what_this_process_gives(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 20, broken=(3, 12))
    here = made(folder, tmp_path / "0", batch_size=3)
    assert same(made(folder, tmp_path / "2", batch_size=3, workers=2), here)
    assert same(made(folder, tmp_path / "7", batch_size=5, workers=2, shard_size=7), here)
    assert [row.key for row in here if row.error] == ["003.jpg", "012.jpg"]


def test_a_batch_lies_in_memory_as_it_does_whoever_decoded_it(tmp_path: Path) -> None:
    """A convolution rounds differently for another memory layout."""
    folder, strides = draw(tmp_path / "pictures", 4), []

    def noted(images: torch.Tensor) -> torch.Tensor:
        strides.append(images.stride())
        return grey(images)

    for workers in (0, 1):
        made(folder, tmp_path / f"{workers}", noted, workers=workers, batch_size=2)
    assert strides == [(72, 24, 6, 1)] * 4


class Hanging(Files):
    """Reads files. One of them blocks forever."""

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        if entry.key == "002.jpg":
            time.sleep(600)
        return super().__call__(entry)


def test_a_decoder_that_hangs_costs_its_row(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 6)
    start = time.perf_counter()
    with Decoders(Decode(Hanging(folder), PIXELS), 2, 1.0) as decoders:
        pictures = [decoders.submit(Entry(f"{i:03d}.jpg", f"{i:03d}.jpg")) for i in range(6)]
        errors = [picture.result().error for picture in pictures]
    assert errors[2] == "002.jpg: decoding took longer than 1 s"
    assert [error for i, error in enumerate(errors) if i != 2] == [None] * 5
    assert time.perf_counter() - start < 60


class Crashing(Files):
    """Reads files. One of them kills the process."""

    def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
        if entry.key == "001.jpg":
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().__call__(entry)


def test_a_decoder_that_crashes_costs_its_row(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 4)
    with Decoders(Decode(Crashing(folder), PIXELS), 1, 60) as decoders:
        pictures = [decoders.submit(Entry(f"{i:03d}.jpg", f"{i:03d}.jpg")) for i in range(4)]
        errors = [picture.result().error for picture in pictures]
    assert errors[1] == "001.jpg: decoding it killed the process (SIGSEGV)"
    assert [error for i, error in enumerate(errors) if i != 1] == [None] * 3


def test_processes_that_are_killed_between_images_are_replaced(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 4)
    with Decoders(Decode(Files(folder), PIXELS), 1, 60) as decoders:
        entries = [Entry(f"{i:03d}.jpg", f"{i:03d}.jpg") for i in range(4)]
        assert decoders.submit(entries[0]).result().error is None
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        assert [decoders.submit(entry).result().error for entry in entries] == [None] * 4


def unreadable(self: object) -> None:
    raise OSError("no such thing")


class Unloadable(Files):
    """Can be pickled but not unpickled."""

    def __reduce__(self) -> tuple:
        return unreadable, (None,)


def test_processes_that_do_not_start_end_the_job(tmp_path: Path) -> None:
    with (
        Decoders(Decode(Unloadable(tmp_path), PIXELS), 1, 60) as decoders,
        pytest.raises(RuntimeError, match="did not start: exit code 1"),
    ):
        decoders.submit(Entry("a", "a")).result()


def test_large_pictures_are_the_options_business(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw(tmp_path / "pictures", 2)
    Image.new("L", (200, 100)).save(folder / "large.png")
    for workers in (0, 1):
        rows = made(folder, tmp_path / f"a{workers}", workers=workers, max_pixels=100 * 100)
        assert [row.key for row in rows if row.error] == ["large.png"]
        assert "expected at most 10,000 pixels, got 200 x 100" in (rows[2].error or "")
    # Pillow's own limit is not used.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert [row.error for row in made(folder, tmp_path / "b", max_pixels=200 * 100)] == [None] * 3
    assert Image.MAX_IMAGE_PIXELS == 1000


def test_out_of_memory_halves_the_batch_and_says_so(tmp_path: Path) -> None:
    """Raises torch.OutOfMemoryError explicitly, because only a GPU raises it by itself."""
    folder = draw(tmp_path / "pictures", 20)
    sizes: list[int] = []
    told: list[str] = []

    def small(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        if len(images) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return grey(images)

    rows = made(folder, tmp_path / "out", small, batch_size=8, say=told.append)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
    assert told == [
        "out of memory with 8 images at a time: going on with 4",
        "out of memory with 4 images at a time: going on with 2",
    ]
    assert same(rows, made(folder, tmp_path / "plain"))

    def none(images: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        made(folder, tmp_path / "never", none, say=told.append)


def test_batches_are_filled_up_where_only_one_shape_will_do(tmp_path: Path) -> None:
    """Batches are short after a broken image and at the end of a shard."""
    folder = draw(tmp_path / "pictures", 20, broken=(3, 12))
    sizes: list[int] = []

    def fixed(images: torch.Tensor) -> torch.Tensor:
        sizes.append(len(images))
        return grey(images)

    rows = made(folder, tmp_path / "filled", fixed, batch_size=4, shard_size=10, fill=True)
    assert sizes == [4] * 6
    assert same(rows, made(folder, tmp_path / "plain", batch_size=4, shard_size=10))


class Prepared(Decoders):
    """Pictures that take 3 ms to decode and report `computing` as their computing time."""

    def __init__(self, computing: float) -> None:
        super().__init__(Decode(Files(Path()), PIXELS), 0)
        self.computing = computing
        self.submitted: list[Future[Picture]] = []

    def submit(self, entry: Entry) -> Future[Picture]:
        def decode() -> Picture:
            time.sleep(0.003)
            return Picture(np.zeros((3, 4, 6), np.uint8), 6, 4, (0.0, 0.0, 6.0, 4.0), None, 1.0, self.computing)

        self.submitted.append(self._threads.submit(decode))
        return self.submitted[-1]


@pytest.mark.parametrize(("computing", "turns"), [(0.9, True), (0.5, False)])
def test_on_a_cpu_what_computes_takes_turns_with_the_model(tmp_path: Path, computing: float, turns: bool) -> None:
    folder = draw(tmp_path / "pictures", 40)
    alone: list[bool] = []

    def model(images: torch.Tensor) -> torch.Tensor:
        alone.append(all(future.done() for future in decoders.submitted))
        return grey(images)

    with (
        open_job(tmp_path / "out", open_source(folder), {}, {}, shard_size=20) as job,
        Prepared(computing) as decoders,
        Worker(job, decoders, PIXELS, ImageTask(model), batch_size=2) as worker,
    ):
        for shard, following in ((0, 1), (1, None)):
            worker.run_shard(shard, following)
    assert len(decoders.submitted) == 40
    assert alone
    assert all(alone) == turns


def test_a_decoder_says_for_how_long_it_computed(tmp_path: Path) -> None:
    class Slow(Files):
        def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
            time.sleep(0.3)
            return super().__call__(entry)

    folder = draw(tmp_path / "pictures", 1)
    picture = Decode(Slow(folder), PIXELS)(Entry("000.jpg", "000.jpg"))
    assert picture.error is None
    assert 0 < picture.computing < picture.seconds - 0.3 + 0.01


def test_captions_of_one_image_are_halved_too(tmp_path: Path) -> None:
    """The results stay in the order of the captions."""
    draw(tmp_path / "pictures", 2)
    table = tmp_path / "list.csv"
    lines = [f"pictures/00{i // 10}.jpg,word{i}" for i in range(20)]
    table.write_text("path,caption\n" + "\n".join(lines))
    told: list[str] = []

    @dataclasses.dataclass(frozen=True)
    class Words(ImageTask):
        def groups(self, entries: list[Entry]) -> list[list[Entry]]:
            return WordTask.groups(self, entries)  # type: ignore[arg-type]

        def start(self, images: torch.Tensor, groups: list[list[Entry]]) -> Callable[[], list[MapRow]]:
            if sum(map(len, groups)) > 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            assert len(images) == len(groups)
            texts = [entry.text or "" for group in groups for entry in group]
            return lambda: [MapRow(text, map=np.array([float(text[4:])])) for text in texts]

    with (
        open_job(tmp_path / "out", open_source(table), {}, {}) as job,
        Decoders(Decode(Files(tmp_path), PIXELS), 0) as decoders,
        Worker(job, decoders, PIXELS, Words(grey), batch_size=4, say=told.append) as worker,
    ):
        worker.run_shard(0)
    rows = list(attnx.open(tmp_path / "out"))
    assert [float(row.map[0]) for row in rows if row.map is not None] == list(map(float, range(20)))
    assert "out of memory with 10 captions of an image: going on with 5" in told


def test_long_and_thin_pictures_are_no_bombs(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 1)
    Image.new("L", (20_000, 1)).save(folder / "thin.png")
    timm = Pixels("timm", (224, 224), (0.5,) * 3, (0.5,) * 3, "bicubic", 0.9, "center")
    picture = Decode(Files(folder), timm, 10**8)(Entry("thin.png", "thin.png"))
    assert "expected at most 100,000,000 pixels, got 20000 x 1, which is 4960000 x 248" in (picture.error or "")
    assert Decode(Files(folder), timm, 10**8)(Entry("000.jpg", "000.jpg")).error is None


def test_a_map_that_is_not_finite_is_its_rows_error(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 5)

    def broken(images: torch.Tensor) -> torch.Tensor:
        maps = grey(images)
        maps[2, 1, 1:3] = torch.nan
        maps[3, 0, 0] = torch.inf
        return maps

    rows = made(folder, tmp_path / "out", broken)
    assert rows[2].error == "the map is not finite: of 24 values, 2 are NaN, 0 infinite"
    assert rows[3].error == "the map is not finite: of 24 values, 0 are NaN, 1 infinite"
    assert [row.map is None for row in rows] == [False, False, True, True, False]
    assert (rows[2].width, rows[2].height) == (52, 40)


def test_an_error_of_the_model_ends_the_job_and_keeps_what_is_made(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 10)
    calls: list[int] = []

    def fails_later(images: torch.Tensor) -> torch.Tensor:
        calls.append(len(images))
        if len(calls) == 4:
            raise RuntimeError("the model")
        return grey(images)

    with pytest.raises(RuntimeError, match="the model"):
        made(folder, tmp_path / "out", fails_later, batch_size=2, shard_size=3)
    assert [row.key for row in attnx.open(tmp_path / "out")] == ["000.jpg", "001.jpg", "002.jpg"]
    with pytest.raises(ValueError, match=r"extract: expected a float tensor \[10, \.\.\.\]; got \[1, 4, 6\]"):
        made(folder, tmp_path / "one", lambda images: grey(images)[:1])


def test_a_following_shard_that_does_not_follow_is_forgotten(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 12)
    with (
        open_job(tmp_path / "out", open_source(folder), {}, {}, shard_size=3),
        Decoders(Decode(Files(folder), PIXELS), 0) as decoders,
        Worker(Job(tmp_path / "out"), decoders, PIXELS, ImageTask(grey), batch_size=2) as worker,
    ):
        for shard, following in ((0, 1), (2, 3), (1, 0), (3, None)):
            worker.run_shard(shard, following)
    assert same(list(attnx.open(tmp_path / "out")), made(folder, tmp_path / "plain"))


def test_few_images_are_decoded_ahead(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 60)
    begun: list[int] = []

    class Counting(Files):
        def __call__(self, entry: Entry) -> tuple[Path, IO[bytes] | None]:
            begun.append(1)
            return super().__call__(entry)

    ahead: list[int] = []

    def slow(images: torch.Tensor) -> torch.Tensor:
        time.sleep(0.01)
        ahead.append(len(begun) - 2 * len(ahead))
        return grey(images)

    with (
        open_job(tmp_path / "out", open_source(folder), {}, {}, shard_size=7) as job,
        Decoders(Decode(Counting(folder), PIXELS), 0) as decoders,
        Worker(job, decoders, PIXELS, ImageTask(slow), batch_size=2) as worker,
    ):
        for shard in range(job.shards):
            worker.run_shard(shard, shard + 1 if shard + 1 < job.shards else None)
    # The batch itself and the next three batches, including those of the next shard.
    assert 4 <= max(ahead[:-4]) <= 2 + 3 * 2


def test_an_interrupt_does_not_wait_for_what_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = draw(tmp_path / "pictures", 2)
    os.mkfifo(folder / "000a.jpg")

    # Images before it are not affected either.
    monkeypatch.setattr("attnx.jobs.ahead._PATIENCE", 0.5)

    def interrupted(images: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        made(folder, tmp_path / "out", interrupted, workers=2, batch_size=1, timeout=100)
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch-size: expected at least 1, got 0"),
        ({"workers": -1}, "workers: expected at least 0, got -1"),
        ({"timeout": 0.0}, "decode-timeout: expected seconds above 0, at most 1,000,000; got 0"),
        ({"timeout": float("nan")}, "decode-timeout: .* got nan"),
        ({"timeout": float("inf")}, "decode-timeout: .* got inf"),
    ],
)
def test_wrong_options_are_said(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        RunOptions(**options)


@pytest.mark.parametrize("largest", [1.0, 3e-3, 1e-4, 1e-7, 6e-8, 1e-20, 1e-38, 1e-42, 5e4, 1e30])
@pytest.mark.parametrize(("dtype", "bound"), [("float16", 2**-11), ("uint8", 1 / 509), ("float32", 0.0)])
def test_a_map_comes_back_within_a_share_of_its_largest_value(largest: float, dtype: str, bound: float) -> None:
    rng = np.random.default_rng(0)
    amap = (rng.random((3, 50)) ** 4).astype(np.float32)
    amap *= np.float32(largest) / amap.max()
    stored, scale = pack(amap, dtype)
    assert stored.dtype == np.dtype(dtype)
    back = stored.astype(np.float32) * np.float32(scale)
    # Subnormal float32 numbers have fewer digits, so one step of them is allowed.
    assert np.abs(back.astype(float) - amap).max() <= bound * amap.max() + 2e-45
    if dtype == "float16" and largest >= 1e-38:
        normal = amap > amap.max() * 2**-13
        assert (np.abs(back - amap)[normal] <= 2**-11 * amap[normal]).all()


def test_zero_and_negative_maps() -> None:
    for dtype in ("float16", "uint8", "float32"):
        stored, scale = pack(np.zeros((2, 2), np.float32), dtype)
        assert (stored == 0).all()
        assert np.isfinite(scale)
    stored, scale = pack(np.array([-3.0, 1.0], np.float32), "float16")
    assert (stored * scale).tolist() == [-3.0, 1.0]
    rows = Format("uint8").table([MapRow("a", map=np.array([-1.0]), width=1, height=1)]).to_pylist()
    assert rows[0]["error"] == "uint8 can't store negative values: the smallest value of the map is -1"
    assert rows[0]["map"] is rows[0]["scale"] is rows[0]["shape"] is None


def test_pictures_say_how_long_they_took(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 1)
    picture = Decode(Files(folder), PIXELS)(Entry("000.jpg", "000.jpg"))
    assert isinstance(picture, Picture)
    assert 0 < picture.seconds < 10


def test_the_columns_are_the_fields_of_a_row() -> None:
    stats = ("entropy", "mass")
    for form, own in (
        (Format(), {"", "maps"}),
        (Format(captions=True), {"", "maps", "captions"}),
        (Format(stats=stats), {"", "stats"}),
    ):
        names = [name for name in form.schema().names if name not in ("shape", "scale")]
        fields = [f.name for f in dataclasses.fields(MapRow) if f.metadata.get("only") in own]
        assert names == [name for name in fields if name not in STATS or name in stats]
    assert set(Format(captions=True).schema().names) - set(Format().schema().names) == {
        "tokens", "word_of", "score", "cut", "words"
    }  # fmt: skip


def test_a_column_that_an_old_shard_lacks_is_null() -> None:
    form = Format("float32")
    new = form.table([MapRow("b", map=np.ones((2, 2)), width=3, height=2, crop=(0.0, 0.0, 3.0, 2.0))])
    old = form.table([MapRow("a", map=np.zeros((2, 2)), width=3, height=2)]).drop_columns(["crop"])
    whole = form.concatenate([old, new])
    assert whole.schema == form.schema()
    assert whole.column("crop").to_pylist() == [None, [0.0, 0.0, 3.0, 2.0]]
    assert whole.column("map").to_pylist() == [[0.0] * 4, [1.0] * 4]
