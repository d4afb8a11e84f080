"""Shards that survive anything, and the job that writes them."""

import dataclasses
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from attnx.images import to_tensor
from attnx.jobs import shards
from attnx.jobs.extract import Summary, extract_images
from attnx.jobs.reading import progress_bar
from attnx.jobs.rows import read_settings, read_shards
from attnx.jobs.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[1]


def amap(i, shape=(2, 3)):
    return np.full(shape, i / 8, np.float32)


def keys(out):
    return [row.key for row in read_shards(out)]


def names(out):
    return sorted(path.name for path in out.iterdir())


def write(out, count, **options):
    with ShardWriter(out, {}, **options) as writer:
        for i in range(count):
            writer.add(str(i), amap(i), 3, 2)
    return writer


def prepare(image):
    return to_tensor(image, (4, 4), (0, 0, 0), (1, 1, 1), "nearest")


def grey_maps(batch):
    return batch.mean(1)


@pytest.fixture
def pictures(tmp_path):
    """Grey 00.png to 11.png of value 10 i and width 8 + i, but 3, 4, 9 are empty, truncated, missing."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    paths = [folder / f"{i:02d}.png" for i in range(12)]
    for i, path in enumerate(paths):
        Image.new("L", (8 + i, 8), 10 * i).save(path)
    paths[3].write_bytes(b"")
    paths[4].write_bytes(paths[4].read_bytes()[:40])
    paths[9].unlink()
    return paths


def extract(paths, out, function=grey_maps, **options):
    options = {"batch_size": 4} | options
    return extract_images(paths, paths[0].parent, prepare, function, out, {"model": "tiny"}, **options)


@pytest.mark.parametrize("shape", [(14, 14), (12, 14, 14), (1,), ()])
def test_round_trip(tmp_path, shape):
    maps = [np.asarray(np.random.default_rng(i).random(shape), np.float32) for i in range(7)]
    with ShardWriter(tmp_path / "a" / "out", {}, rows_per_shard=3) as writer:
        for i, values in enumerate(maps):
            writer.add(f"é/{i}.png", values, 640 + i, 480)
    assert (writer.rows, writer.failed, writer.shards) == (7, 0, 3)
    assert names(writer.out) == [f"part-0000{i}.parquet" for i in range(3)]
    rows = list(read_shards(writer.out))
    assert [(row.key, row.width, row.height, row.error) for row in rows] == [
        (f"é/{i}.png", 640 + i, 480, None) for i in range(7)
    ]
    for row, values in zip(rows, maps, strict=True):
        assert (row.map.dtype, row.map.shape, row.map.flags.writeable) == (np.float16, shape, True)
        np.testing.assert_array_equal(row.map, values.astype(np.float16))


def test_any_parquet_reader_reads_them(tmp_path):
    with ShardWriter(tmp_path, {"model": "x"}) as writer:
        for i in range(300):
            writer.add(str(i), amap(i), 3, 2)
        writer.add("bad", None, error="no")
    table = pq.read_table(tmp_path)
    assert [f"{field.name} {field.type}" for field in table.schema] == [
        "key string", "map list<element: halffloat>", "shape list<element: int32>",
        "width int32", "height int32", "error string",
    ]  # fmt: skip
    assert table.slice(299).to_pylist() == [
        {"key": "299", "map": [299 / 8] * 6, "shape": [2, 3], "width": 3, "height": 2, "error": None},
        {"key": "bad", "map": None, "shape": None, "width": None, "height": None, "error": "no"},
    ]
    file = pq.ParquetFile(tmp_path / "part-00000.parquet").metadata
    assert [file.row_group(i).num_rows for i in range(file.num_row_groups)] == [256, 45]
    columns = [file.row_group(0).column(i) for i in range(file.num_columns)]
    assert not any("BYTE_STREAM_SPLIT" in column.encodings for column in columns)


def test_settings(tmp_path):
    settings = {"model": "vit", "size": [224, 224], "residual": 0.5, "layers": None, "name": "é"}
    with ShardWriter(tmp_path, settings) as writer:
        writer.add("a", amap(0), 1, 1)
    assert read_settings(tmp_path) == settings
    with pytest.raises(ValueError, match=r"settings: expected what JSON can hold.*set"):
        ShardWriter(tmp_path / "new", {"layers": {1}})
    assert not (tmp_path / "new").exists()


def test_rows_with_and_without_maps_keep_their_places(tmp_path):
    with ShardWriter(tmp_path, {}) as writer:
        for i in range(9):
            writer.add(str(i), *((None, None, None, f"why {i}") if i % 3 == 0 else (amap(i, (i,)), 3, 2)))
    for i, row in enumerate(read_shards(tmp_path)):
        assert row.error == (f"why {i}" if i % 3 == 0 else None)
        assert row.map is None if i % 3 == 0 else (row.map == i / 8).all() and row.map.shape == (i,)
    assert writer.failed == 3


@pytest.mark.parametrize(
    ("value", "found"), [(np.nan, "1 are NaN, 0"), (np.inf, "0 are NaN, 1 are"), (-65505, "0 are NaN, 1 are")]
)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_float16_cannot_hold_is_an_error_row(tmp_path, value, found, dtype):
    values = amap(1).astype(dtype)
    values[1, 2] = value
    with ShardWriter(tmp_path, {}) as writer:
        writer.add("bad", values, 3, 2)
        writer.add("largest", np.array([65504.0, -65504.0], dtype), 3, 2)
    bad, largest = read_shards(tmp_path)
    assert (bad.map, bad.width, bad.height) == (None, 3, 2)
    assert found in bad.error
    assert largest.map.tolist() == [65504, -65504]


def test_an_exception_loses_no_complete_row(tmp_path):
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, {}, rows_per_shard=4) as writer:
        for i in range(10):
            writer.add(str(i), amap(i), 3, 2)
        raise RuntimeError("stop")
    assert keys(tmp_path) == [str(i) for i in range(10)]


@pytest.mark.parametrize("place", ["replace", "fsync"])
def test_a_failing_write_leaves_no_temporary(tmp_path, monkeypatch, place):
    def fail(*_):
        raise OSError(28, "No space left on device")

    writer = ShardWriter(tmp_path, {}, rows_per_shard=2)
    writer.add("0", amap(0), 3, 2)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(shards.os, place, fail)
        writer.add("1", amap(1), 3, 2)
    assert names(tmp_path) == []
    writer.close()
    assert keys(tmp_path) == ["0", "1"], "rows of the failed shard must stay for the next try"


def test_the_first_error_is_the_one_that_is_seen(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    with pytest.raises(RuntimeError, match="stop") as caught, ShardWriter(tmp_path, {}) as writer:
        writer.add("0", amap(0), 3, 2)
        monkeypatch.setattr(shards.os, "replace", fail)
        raise RuntimeError("stop")
    assert "the last 1 rows could not be written" in caught.value.__notes__[0]


def test_an_interrupt_right_after_the_rename_writes_no_row_twice(tmp_path, monkeypatch):
    def interrupt(_):
        monkeypatch.undo()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught, ShardWriter(tmp_path, {}, rows_per_shard=2) as writer:
        monkeypatch.setattr(shards, "sync_folder", interrupt)
        for i in range(4):
            writer.add(str(i), amap(i), 3, 2)
    assert keys(tmp_path) == ["0", "1"]
    assert not hasattr(caught.value, "__notes__"), "they were written, and nobody should hear that they were not"


def test_a_shard_of_another_job_is_not_replaced(tmp_path):
    first, second = ShardWriter(tmp_path, {}), ShardWriter(tmp_path, {})
    first.add("first", amap(0), 3, 2)
    first.close()
    second.add("second", amap(0), 3, 2)
    with pytest.raises(FileExistsError, match="other job"):
        second.close()
    assert keys(tmp_path) == ["first"]


def test_an_occupied_folder_is_refused(tmp_path):
    write(tmp_path, 1)
    with pytest.raises(ValueError, match="choose another folder") as caught:
        ShardWriter(tmp_path, {})
    assert str(tmp_path) in str(caught.value)
    assert keys(tmp_path) == ["0"]


@pytest.mark.parametrize("below", ["", "deeper/still"])
def test_a_file_in_the_way_of_the_folder(tmp_path, below):
    (tmp_path / "file").touch()
    out = tmp_path / "file" / below
    with pytest.raises(OSError, match="out: expected a folder") as caught:
        ShardWriter(out, {})
    assert str(out) in str(caught.value)


def test_shards_are_read_by_number(tmp_path):
    for number, key in [(99999, "first"), (100000, "second")]:
        write(tmp_path / key, 1)
        (tmp_path / key / "part-00000.parquet").rename(tmp_path / f"part-{number}.parquet")
    assert [path.name for path in shards._shards(tmp_path)] == ["part-99999.parquet", "part-100000.parquet"]


def test_a_shard_closes_early_on_large_maps(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_BYTES_PER_SHARD", 4 * 12)
    assert write(tmp_path, 10).shards == 3
    assert len(keys(tmp_path)) == 10


def test_reading_what_is_not_there(tmp_path):
    (tmp_path / ".part-00000-left-behind.tmp").write_bytes(b"half")
    for out in (tmp_path, tmp_path / "missing"):
        for read in (read_shards, read_settings):
            with pytest.raises(FileNotFoundError, match=r"part-\*\.parquet") as caught:
                read(out)
            assert str(out) in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (("a", None), "map, error"),
        (("a", amap(0), 1, 1, "why"), "map, error"),
        (("a", np.zeros((0, 3), np.float32)), "map"),
        (("a", np.zeros(3, np.int64)), "map"),
        (("\udcff", amap(0)), "key"),
    ],
)
def test_a_wrong_row_is_refused_and_harms_no_other(tmp_path, arguments, name):
    with ShardWriter(tmp_path, {}) as writer:
        writer.add("good", amap(0), 3, 2)
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            writer.add(*arguments)
    assert keys(tmp_path) == ["good"]
    with pytest.raises(ValueError, match="close"):
        writer.add("late", amap(0))


def test_a_job(tmp_path, pictures):
    seen = []

    def progress(done, total):
        seen.append((done, total))

    summary = extract(pictures, tmp_path / "out", progress=progress, rows_per_shard=5)
    assert dataclasses.replace(summary, seconds=0) == Summary(done=9, failed=3, seconds=0, shards=3)
    assert summary.per_second == 9 / summary.seconds
    assert seen == [(4, 12), (8, 12), (12, 12)]
    assert read_settings(tmp_path / "out") == {"model": "tiny"}
    rows = list(read_shards(tmp_path / "out"))
    assert [row.key for row in rows] == [f"{i:02d}.png" for i in range(12)]
    for i, row in enumerate(rows):
        if i in (3, 4, 9):
            assert (row.map, row.width, row.height) == (None, None, None)
            assert str(pictures[i]) in row.error
        else:
            assert (row.map.shape, row.width, row.height, row.error) == ((4, 4), 8 + i, 8, None)
            np.testing.assert_allclose(row.map, 10 * i / 255, rtol=1e-3)


def test_results_come_in_input_order_whatever_thread_is_first(tmp_path, pictures):
    def slow_first(image):
        time.sleep(0.03 if image.width % 2 else 0)
        return prepare(image)

    paths = [*pictures[5:9], *pictures[:3]][::-1]
    root, out = pictures[0].parent, tmp_path / "out"
    extract_images(paths, root, slow_first, grey_maps, out, {}, batch_size=2, workers=4)
    rows = list(read_shards(out))
    assert [row.key for row in rows] == [path.name for path in paths]
    for row in rows:
        np.testing.assert_allclose(row.map, 10 * int(row.key[:2]) / 255, rtol=1e-3)


def test_few_images_are_decoded_ahead(tmp_path):
    paths = [tmp_path / f"{i:03d}.png" for i in range(60)]
    for path in paths:
        Image.new("RGB", (4, 4)).save(path)
    prepared, ahead = [], []

    def count(image):
        prepared.append(1)
        return prepare(image)

    def function(batch):
        time.sleep(0.005)
        ahead.append(len(prepared) - 2 * len(ahead))
        return batch

    extract_images(paths, tmp_path, count, function, tmp_path / "out", {}, batch_size=2, workers=4)
    # The batch itself, and three batches behind it.
    assert 2 <= max(ahead) <= 8


def test_a_job_that_fails_does_not_first_decode_what_is_queued(tmp_path, pictures):
    prepared = []

    def slow(image):
        prepared.append(image.size)
        time.sleep(0.03)
        return prepare(image)

    with pytest.raises(ZeroDivisionError):
        images = [pictures[i] for i in (0, 1, 2, 5, 6, 7, 8, 10, 11)]
        root, out = pictures[0].parent, tmp_path / "out"
        extract_images(images, root, slow, lambda _: 1 / 0, out, {}, batch_size=2, workers=1)
    assert len(prepared) < 6


def test_batches_go_to_the_device(tmp_path, pictures):
    def function(batch):
        assert batch.device.type == "meta"
        return torch.zeros(len(batch), 2)

    assert extract(pictures[:3], tmp_path / "out", function, device="meta").done == 3


@pytest.mark.parametrize("shape", [(), (5,), (12, 7, 7)])
def test_maps_of_any_shape_and_float_dtype(tmp_path, pictures, shape):
    summary = extract(
        pictures[:3], tmp_path / "out", lambda batch: torch.ones(len(batch), *shape, dtype=torch.bfloat16)
    )
    assert (summary.done, summary.failed) == (3, 0)
    assert [row.map.shape for row in read_shards(tmp_path / "out")] == [shape] * 3


def test_maps_that_need_gradients(tmp_path, pictures):
    def function(batch):
        return batch.requires_grad_().exp().mean(1)

    assert extract(pictures[:3], tmp_path / "out", function).done == 3


def test_a_map_that_overflows_is_counted_as_failed(tmp_path, pictures):
    summary = extract(pictures[:3], tmp_path / "out", lambda batch: batch.mean(1) * 2e6)
    # The first picture is black: its map is zero.
    assert (summary.done, summary.failed) == (1, 2)
    assert ["float16" in (row.error or "") for row in read_shards(tmp_path / "out")] == [False, True, True]


def test_only_broken_images(tmp_path, pictures):
    broken = [pictures[3], pictures[4]]
    summary = extract(broken, tmp_path / "out", lambda _: pytest.fail("there is nothing to extract"))
    assert (summary.done, summary.failed, summary.per_second) == (0, 2, 0)


@pytest.mark.parametrize("stop", [KeyboardInterrupt, "SIGINT", RuntimeError("CUDA out of memory")])
def test_what_stops_a_job_goes_on_after_the_rows_are_written(tmp_path, pictures, stop):
    calls = []

    def function(batch):
        calls.append(len(batch))
        if len(calls) == 3:
            if stop == "SIGINT":
                signal.raise_signal(signal.SIGINT)
            else:
                raise stop
        return grey_maps(batch)

    with pytest.raises(RuntimeError if isinstance(stop, RuntimeError) else KeyboardInterrupt):
        extract(pictures, tmp_path / "out", function, rows_per_shard=5)
    assert keys(tmp_path / "out") == [f"{i:02d}.png" for i in range(8)]
    assert names(tmp_path / "out") == ["part-00000.parquet", "part-00001.parquet"]


def test_kill_in_the_middle_of_a_write(tmp_path, pictures):
    out = tmp_path / "out"
    job = f"""
        import os, signal
        from pathlib import Path
        from PIL import Image
        from attnx.images import find_images, to_tensor
        from attnx.jobs.extract import extract_images

        replace, calls = os.replace, []

        def replace_twice(*paths):
            calls.append(paths)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*paths)

        os.replace = replace_twice
        root = Path({str(pictures[0].parent)!r})
        prepare = lambda image: to_tensor(image, (4, 4), (0, 0, 0), (1, 1, 1))
        settings = {{"model": "tiny"}}
        mean, out = lambda batch: batch.mean(1), Path({str(out)!r})
        extract_images(find_images(root), root, prepare, mean, out, settings, batch_size=3, rows_per_shard=2)
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", textwrap.dedent(job)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = names(out)
    assert left[-2:] == ["part-00000.parquet", "part-00001.parquet"]
    assert len(left) == 3, "the third shard must have been cut off before its rename"
    assert left[0].startswith(".part-00002-")
    assert keys(out) == ["00.png", "01.png", "02.png", "03.png"]
    assert read_settings(out) == {"model": "tiny"}
    assert pq.read_table(out).num_rows == 4


def test_an_impossible_out_is_known_before_any_work(tmp_path, pictures):
    (tmp_path / "out").touch()
    options = (lambda _: pytest.fail("an image was prepared"), grey_maps)
    with pytest.raises(OSError, match="out: expected a folder") as caught:
        extract_images(pictures, pictures[0].parent, *options, tmp_path / "out", {})
    assert str(tmp_path / "out") in str(caught.value)


def test_keys(tmp_path, pictures):
    root = pictures[0].parent
    (root / "a").mkdir()
    nested = pictures[0].rename(root / "a" / "é.png")
    extract_images([nested], root, prepare, grey_maps, tmp_path / "1", {})
    extract_images([nested], nested, prepare, grey_maps, tmp_path / "2", {})
    assert keys(tmp_path / "1") + keys(tmp_path / "2") == ["a/é.png", "é.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes are Linux's")
def test_file_names_that_are_not_unicode(tmp_path):
    good, bad = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/a\xff.png", b"/b\xff.png"))
    with open(good, "wb") as file:
        Image.new("RGB", (4, 4)).save(file, "PNG")
    bad.touch()
    assert extract([good, bad], tmp_path / "out").failed == 1
    assert keys(tmp_path / "out") == ["a\\xff.png", "b\\xff.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"paths": []}, "^paths: expected at least one"),
        ({"root": Path("elsewhere")}, "^paths: expected paths under root elsewhere"),
        ({"batch_size": 0}, "^batch_size: expected"),
        ({"workers": 0}, "^workers: expected"),
        ({"prepare": lambda image: None}, "^prepare: expected .*'00.png', got NoneType"),
        ({"prepare": lambda image: torch.zeros(1, 4, 4)}, r"^prepare: .*got torch.float32 \[1, 4, 4\]"),
        (
            {"prepare": lambda image: torch.zeros(3, 4, image.width)},
            r"\[3, 4, 8\] for '01.png', .*\[3, 4, 9\]",
        ),
        ({"extract": lambda batch: batch[:1]}, r"^extract: .* tensor \[3, ...\] .*got .*\[1, 3, 4, 4\]"),
        ({"extract": lambda batch: batch.long()}, "^extract: expected .* got torch.int64"),
        ({"extract": lambda batch: [1]}, "^extract: expected .* got list"),
    ],
)
def test_a_job_refuses(tmp_path, pictures, change, message):
    right = {"paths": pictures[:3], "root": pictures[0].parent, "prepare": prepare, "extract": grey_maps}
    with pytest.raises(ValueError, match=message):
        extract_images(**right | {"out": tmp_path / "out", "settings": {}} | change)
    with pytest.raises(ValueError, match="every image once"):
        extract_images(**right | {"out": tmp_path / "out", "settings": {}, "paths": pictures[:2] * 2})


def test_progress_bar(monkeypatch, capsys):
    drawn = io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar(12) as progress:
        progress(4, 12)
        progress(12, 12)
    assert "12/12" in drawn.getvalue()
    assert "images/s" in drawn.getvalue()
    assert "ETA" in drawn.getvalue()
    assert capsys.readouterr().out == ""
