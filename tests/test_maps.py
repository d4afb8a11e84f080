"""Maps of a job are read by index and by key, with attnx and with other readers."""

import io
import os
import pickle
import re
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from small_job import draw, made_job, opened, recipe, tools
from torch.utils.data import DataLoader

import attnx
from attnx.jobs.columns import MapRow
from attnx.jobs.engines.in_process import run_in_process
from attnx.jobs.engines.queue import Shards
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.progress import progress_bar
from attnx.jobs.run import run_job
from attnx.jobs.shards import parts
from attnx.jobs.tensors import tensors_of

BROKEN = (4, 17)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("pictures"), 20, BROKEN)


@pytest.fixture(scope="module")
def out(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_job(pictures, tmp_path_factory.mktemp("out"), 6)


def equal(left: MapRow, right: MapRow) -> bool:
    if left.map is None or right.map is None:
        return (left.key, left.map, left.error) == (right.key, right.map, right.error)
    return (left.key, left.crop) == (right.key, right.crop) and np.array_equal(left.map, right.map)


def test_rows_by_place_and_by_key(out: Path) -> None:
    maps = attnx.open(out)
    rows = list(maps)
    names = [f"{i:03d}.jpg" for i in range(20)]
    assert len(maps) == len(rows) == 20
    assert [row.key for row in rows] == list(maps.keys()) == names
    order = np.random.default_rng(0).permutation(20)
    assert all(equal(maps[int(i)], rows[i]) for i in order)
    assert all(equal(maps[i - 20], rows[i]) for i in range(20))
    assert all(equal(maps[names[i]], rows[i]) for i in order)
    assert [row.key for row in maps[3:9:2]] == names[3:9:2]
    assert [row.key for row in maps[-2:]] == names[-2:]
    assert "007.jpg" in maps
    assert "nothing" not in maps
    assert 7 not in maps
    assert [key for key, _ in maps.errors()] == ["004.jpg", "017.jpg"]
    assert maps["004.jpg"].map is None
    assert maps.settings["method"] == "cls"
    assert repr(maps) == f"<20 maps of demo in {out}>"
    with pytest.raises(IndexError, match="index 20: expected one of 20 rows"):
        maps[20]
    with pytest.raises(KeyError, match="no row has the key 'nothing', of 20"):
        maps["nothing"]
    with pytest.raises(FileNotFoundError, match=r"expected the output of a job, with part-\*\.parquet files"):
        attnx.open(out / "nothing")


def test_of_a_job_under_way_what_is_there(pictures: Path, tmp_path: Path) -> None:
    made = tools(pictures)
    with opened(made, tmp_path, 6) as planned:
        run_in_process(
            made, planned, Shards([1, 3], 1, print), RunOptions(batch_size=4, workers=0), lambda _: None, print
        )
    maps = attnx.open(tmp_path)
    want = [f"{i:03d}.jpg" for i in (*range(6, 12), 18, 19)]
    assert [maps[i].key for i in range(len(maps))] == list(maps.keys()) == want
    assert maps["019.jpg"].key == "019.jpg"


def test_a_torch_data_set_of_the_maps_that_are_there(out: Path) -> None:
    maps = attnx.open(out)
    data = maps.to_torch()
    assert len(data) == 18
    want = [row for row in maps if row.map is not None]
    for workers in (0, 2):
        batches = list(DataLoader(data, batch_size=5, num_workers=workers))
        assert [key for batch in batches for key in batch["key"]] == [row.key for row in want]
        found = torch.cat([batch["map"] for batch in batches])
        assert found.dtype == torch.float32
        assert torch.equal(found, torch.from_numpy(np.stack([row.map for row in want])))
        assert {text for batch in batches for text in batch["text"]} == {""}
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[3]["map"], data[3]["map"])


@pytest.mark.parametrize("store", ["rows", "full"])
@pytest.mark.parametrize("map_dtype", ["float16", "float32", "uint8"])
def test_stores_of_every_head(pictures: Path, tmp_path: Path, store: str, map_dtype: str) -> None:
    made = tools(pictures, store=store, map_dtype=map_dtype)
    maps = attnx.open(made_job(pictures, tmp_path, 6, store=store, map_dtype=map_dtype))
    pixels, _ = made.pixels(attnx.images.read_image(pictures / "006.jpg"))
    images = made.pixels.normalise(torch.from_numpy(pixels.copy())[None])
    with torch.no_grad(), attnx.capture(made.loaded.model, heads="each") as trace:
        made.loaded.model(images)
    want = torch.stack([trace[name] if store == "full" else attnx.cls_map(trace, name) for name in trace], 1)[0].numpy()
    found = maps["006.jpg"].map
    assert found is not None
    assert found.shape == want.shape
    tolerance = {"float16": 1e-3, "float32": 1e-5, "uint8": 3e-3}[map_dtype]
    np.testing.assert_allclose(found, want, atol=tolerance * want.max(), rtol=0)
    assert [key for key, _ in maps.errors()] == ["004.jpg", "017.jpg"]
    assert all(equal(maps[row.key], row) for row in maps)
    beside = [tensors_of(part).is_file() for part in parts(tmp_path)]
    assert beside == [store == "full"] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("store", ["map", "rows"])
def test_a_gpu_makes_the_same_maps(pictures: Path, tmp_path: Path, store: str, compiled: bool) -> None:
    """Copies, the model and packing overlap; CUDA graphs are used, too."""
    if compiled and store != "map":
        pytest.skip("graphs are for --store map")
    made = recipe(pictures, store=store, compile=compiled).load(torch.device("cuda"))
    with opened(made, tmp_path / "gpu", 6) as planned:
        run_job(made, planned, RunOptions(batch_size=4, workers=2))
    want = list(attnx.open(made_job(pictures, tmp_path / "cpu", 6, store=store)))
    found = list(attnx.open(tmp_path / "gpu"))
    assert [(row.key, row.error) for row in found] == [(row.key, row.error) for row in want]
    for row, other in zip(found, want, strict=True):
        if other.map is not None:
            np.testing.assert_allclose(row.map, other.map, rtol=5e-2, atol=1e-2 * other.map.max())


def test_full_maps_are_retried_beside_the_others(pictures: Path, tmp_path: Path) -> None:
    folder, out = draw(tmp_path / "pictures", 8, broken=(2,)), tmp_path / "out"
    made_job(folder, out, 6, store="full")
    before = list(attnx.open(out))
    draw(folder, 8)
    made = tools(folder, store="full")
    with opened(made, out) as planned:
        report = run_job(made, planned, RunOptions(batch_size=4, workers=0), retry_failed=True)
    assert (report.maps, report.made) == (8, 1)
    after = list(attnx.open(out))
    assert [row.key for row in after] == [row.key for row in before]
    assert all(equal(a, b) for a, b in zip(after, before, strict=True) if b.map is not None)
    assert after[2].map is not None
    assert Job(out).errors(0) == 0


def test_shards_are_read_by_number(out: Path, tmp_path: Path) -> None:
    """Shards are read without run.json, too."""
    for number, shard in [(99999, 0), (100000, 1)]:
        (tmp_path / f"part-{number}.parquet").write_bytes((out / f"part-{shard:05d}.parquet").read_bytes())
    assert [path.name for path in parts(tmp_path)] == ["part-99999.parquet", "part-100000.parquet"]
    maps = attnx.open(tmp_path)
    assert [row.key for row in maps] == list(maps.keys()) == [f"{i:03d}.jpg" for i in range(12)]
    assert maps["007.jpg"].key == maps[7].key
    assert maps.settings == attnx.open(out).settings


def test_file_names_that_are_not_unicode(tmp_path: Path) -> None:
    folder = draw(tmp_path / "pictures", 1)
    good, bad = (Path(os.fsdecode(os.fsencode(folder) + name)) for name in (b"/a\xff.jpg", b"/b\xff.jpg"))
    (folder / "000.jpg").rename(good)
    bad.touch()
    rows = list(attnx.open(made_job(folder, tmp_path / "out", 6)))
    assert [(row.key, row.map is None) for row in rows] == [("a\\xff.jpg", False), ("b\\xff.jpg", True)]


def test_progress_is_of_this_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    drawn = io.StringIO()
    monkeypatch.setattr(sys, "stderr", drawn)
    monkeypatch.setenv("COLUMNS", "100")
    with progress_bar(2_000_000) as progress:
        progress(1_999_988, 2_000_000)
        time.sleep(0.1)
        progress(2_000_000, 2_000_000)
    assert "2000000/2000000" in drawn.getvalue()
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, ", drawn.getvalue())  # the time so far, and the time left
    rate = float(re.findall(r"([0-9.]+) images/s", drawn.getvalue())[-1])
    assert 0 < rate < 121
    assert capsys.readouterr().out == ""


def read_with_pandas(out: Path) -> tuple[list[str], np.ndarray]:
    pandas = pytest.importorskip("pandas")
    frame = pandas.read_parquet(sorted(out.glob("part-*.parquet")))
    frame = frame[frame.error.isna()]
    maps = [row["map"].astype("float32").reshape(row["shape"]) * row.scale for _, row in frame.iterrows()]
    return list(frame.key), np.stack(maps)


def read_with_duckdb(out: Path) -> tuple[list[str], np.ndarray]:
    duckdb = pytest.importorskip("duckdb")
    rows = duckdb.sql(
        f"select key, [x * scale for x in map], shape from '{out}/part-*.parquet' where error is null order by key"
    ).fetchall()
    return [key for key, _, _ in rows], np.stack([np.float32(values).reshape(shape) for _, values, shape in rows])


def read_with_polars(out: Path) -> tuple[list[str], np.ndarray]:
    polars = pytest.importorskip("polars")
    frame = polars.scan_parquet(out / "part-*.parquet").filter(polars.col("error").is_null()).collect()
    rows = frame.iter_rows(named=True)
    maps = np.stack([np.float32(row["map"]).reshape(row["shape"]) * np.float32(row["scale"]) for row in rows])
    return frame["key"].to_list(), maps


def read_with_datasets(out: Path) -> tuple[list[str], np.ndarray]:
    datasets = pytest.importorskip("datasets")
    data = datasets.load_dataset("parquet", data_files=f"{out}/part-*.parquet", split="train", cache_dir=str(out / "c"))
    data = data.filter(lambda row: row["error"] is None)
    maps = np.stack([np.float32(row["map"]).reshape(row["shape"]) * np.float32(row["scale"]) for row in data])
    return list(data["key"]), maps


@pytest.mark.parametrize("read", [read_with_pandas, read_with_duckdb, read_with_polars, read_with_datasets])
def test_others_read_the_same_maps(out: Path, read) -> None:
    keys, maps = read(out)
    want = [row for row in attnx.open(out) if row.map is not None]
    assert keys == [row.key for row in want]
    assert np.array_equal(maps, np.stack([row.map for row in want]))


def test_a_folder_of_version_0_1_0_opens() -> None:
    """A folder written by attnx 0.1.0: five pictures and one invalid file, uint8, two shards."""
    maxima = [0.0448946, 0.0308914, 0.0232622, 0.0558187, 0.1024749]
    maps = attnx.open(Path(__file__).parent / "data" / "job-0.1.0")
    assert list(maps.keys()) == [f"{i}.jpg" for i in range(6)]
    assert maps.planned == 6
    assert maps.settings["versions"]["attnx"] == "0.1.0"
    assert list(dict(maps.errors())) == ["5.jpg"]
    assert maps["4.jpg"].map.shape == (12, 12)
    assert maps[0].crop == (0.0, 0.0, 32.0, 24.0)
    assert [float(row.map.max()) for row in maps[:5]] == pytest.approx(maxima, rel=1e-5)
