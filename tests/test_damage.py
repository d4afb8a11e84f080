"""Damaged files of a job are detected: the error names the file, and a damaged shard is made again."""

import json
import multiprocessing
import os
import random
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from small_job import draw, files, made_job, opened, tools
from test_cli import fails, run

import attnx
from attnx.jobs.columns import MapRow
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.run import Report, run_job
from attnx.jobs.runfile import FORMAT, read_run, write_run
from attnx.jobs.runtime import Runtime
from attnx.jobs.shards import DamagedError, Part

HERE = RunOptions(batch_size=4, workers=0)
STORES = ("map", "full")
FIRST = "part-00000.parquet"
FIELDS = ("format", "sha256", "rows", "shard_size", "batch_size", "manifest_sha256", "source", "settings", "recipe")
MISSING = object()
VALUES: dict[str, Any] = {
    "0": 0, "-3": -3, "x": "x", "missing": MISSING, "huge": 10**30, "nested": {"a": [{"b": None}] * 50},
}  # fmt: skip


class Finished:
    """A finished job of 12 pictures in shards of 5, one picture truncated, with its files, rows and summary."""

    def __init__(self, pictures: Path, out: Path, store: str) -> None:
        rolling = {"residual": 0.5, "discard": 0.0, "start": 0, "preset": None}
        more = {} if store == "map" else {"store": store, "method": "rollout", "rolling": rolling}
        self.made: Runtime = tools(pictures, **more)
        self.out = out
        resume(self.made, out, shard_size=5)
        self.files = files(out)
        self.rows = [told(row) for row in attnx.open(out)]
        self.summary = summary(out, out.with_suffix(".summary"))[1]

    def copy(self, to: Path) -> Path:
        """Copy the folder of the job."""
        return Path(shutil.copytree(self.out, to, ignore=shutil.ignore_patterns(".lock*")))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Finished]:
    """A finished job for each value of `store`."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finished")
    pictures = draw(folder / "pictures", 12, broken=(7,))
    return {store: Finished(pictures, folder / store, store) for store in STORES}


@pytest.fixture(params=STORES)
def job(request: pytest.FixtureRequest, finished: dict[str, Finished]) -> Finished:
    return finished[request.param]


def resume(made: Runtime, out: Path, shard_size: int | None = None, **options: Any) -> Report:
    with opened(made, out, shard_size) as planned:
        return run_job(made, planned, HERE, **options)


def told(row: MapRow) -> tuple[Any, ...]:
    """A row as a tuple that can be compared."""
    amap = None if row.map is None else (row.map.shape, row.map.tobytes())
    return row.key, amap, row.error, row.width, row.height, row.crop, row.text


def summary(folder: Path, to: Path) -> tuple[int, Any]:
    """The exit code of `attnx summary`, and its result or its error line."""
    result = run("summary", folder, "--out", to, "--examples", 1)
    if result.exit_code == 0:
        found = json.loads((to / "summary.json").read_text())
        # Seconds depend on the times of files.
        return 0, {name: value for name, value in found.items() if "second" not in name}
    lines = result.stderr.strip().splitlines()
    assert (result.exit_code, len(lines)) == (2, 1), result.output
    assert lines[0].startswith("attnx: ")
    return 2, lines[0]


def compared(content: dict[str, bytes]) -> dict[str, Any]:
    """The content of files. run.json is parsed because its whitespace may differ."""
    return {name: json.loads(each) if name == "run.json" else each for name, each in content.items()}


def files_of(out: Path) -> dict[str, bytes]:
    """The files of a job, without locks and files that were set aside."""
    return {
        path.name: path.read_bytes()
        for path in sorted(out.iterdir())
        if path.suffix != ".damaged" and not path.name.startswith(".lock")
    }


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Flip, cut out or zero a random range of bytes: a byte, a block or the rest of the file."""
    while True:
        start = rng.randrange(len(content))
        size = rng.choice([1, 1, rng.randint(1, 64), rng.randint(1, 4096), len(content)])
        stop = min(start + size, len(content))
        kind = rng.choice(["flip", "cut", "zero"])
        if kind == "flip" and stop == start + 1:
            middle = bytes([content[start] ^ 1 << rng.randrange(8)])
        elif kind == "flip":
            middle = bytes(byte ^ 0xFF for byte in content[start:stop])
        else:
            middle = b"" if kind == "cut" else bytes(stop - start)
        changed = content[:start] + middle + content[stop:]
        if changed != content:
            return changed


def by_iteration(out: Path) -> list[tuple[Any, ...]]:
    return [told(row) for row in attnx.open(out)]


def by_key(out: Path) -> list[tuple[Any, ...]]:
    maps = attnx.open(out)
    return [told(maps[key]) for key in list(maps.keys())]


def by_index(out: Path) -> list[tuple[Any, ...]]:
    maps = attnx.open(out)
    return [told(maps[i]) for i in range(len(maps))]


def answer(ask: Callable[[], Any]) -> Any:
    """The result of `ask`, or the message of its ValueError or OSError."""
    try:
        return ask()
    except (ValueError, OSError) as error:
        return str(error)


def check(job: Finished, out: Path, name: str, rng: random.Random, to: Path) -> None:
    """Damage one file of a copy, and check every reader."""
    (out / name).write_bytes(damaged(job.files[name], rng))
    for read in (by_iteration, by_key, by_index):
        found = answer(lambda read=read: read(out))
        assert name in found if isinstance(found, str) else found == job.rows, read
    code, found = summary(out, to)
    assert found == job.summary if code == 0 else name in found
    said: list[str] = []
    report = answer(lambda: resume(job.made, out, say=said.append))
    if isinstance(report, str):
        assert name in report
        assert not name.startswith("part-"), "a shard is made again"
        return
    assert (report.rows, report.maps, report.set_aside) == (12, 11, {})
    assert compared(files_of(out)) == compared(job.files)
    if name.startswith("part-"):
        assert len(said) == 1
        assert name in said[0]
        folder = out / f"{Path(name).stem}.damaged"
        assert (folder / name).exists()
        # The shard has one file or two.
        assert {path.name for path in folder.iterdir()} == {each for each in job.files if Path(each).stem == name[:10]}
    assert by_iteration(out) == job.rows


def damages(finished: dict[str, Finished], folder: Path, count: int, seed: int) -> None:
    """Check `count` damages, of all files in turn."""
    all_files = [(store, name) for store in STORES for name in finished[store].files]
    for number in range(count):
        store, name = all_files[number % len(all_files)]
        out = finished[store].copy(folder / str(number))
        try:
            check(finished[store], out, name, random.Random(f"{seed} {number}"), folder / "summary")
        except BaseException as error:
            error.add_note(f"damage {number} of seed {seed}: {name} of store {store}")
            raise
        shutil.rmtree(out)


@pytest.mark.long
def test_no_damage_of_forty_goes_unseen(finished: dict[str, Finished], tmp_path: Path) -> None:
    damages(finished, tmp_path, 40, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_no_damage_of_a_thousand_goes_unseen(finished: dict[str, Finished], tmp_path: Path) -> None:
    damages(finished, tmp_path, 1000, seed=2)


def test_every_byte_of_a_shard_is_under_a_checksum(job: Finished, tmp_path: Path) -> None:
    """The first and last byte, and the bytes between columns, which no reader reads."""
    out = job.copy(tmp_path / "out")
    for name in (name for name in job.files if name.startswith("part-00000")):
        content = job.files[name]
        size = len(content)
        for at in {*range(20), *range(20, size, max(1, size // 150)), *range(size - 20, size)}:
            (out / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
            with pytest.raises(DamagedError, match=name):
                Job(out).open_part(0).check(everything=True)
        (out / name).write_bytes(content)
    Job(out).open_part(0).check(everything=True)


def test_another_shard_in_a_shards_place_is_found(job: Finished, tmp_path: Path) -> None:
    """The other shard has the same number of rows, so only its metadata shows the difference."""
    out = job.copy(tmp_path / "out")
    for path in out.glob("part-00001.*"):
        shutil.copy(path, out / f"part-00000{path.suffix}")
    with pytest.raises(DamagedError, match=rf"{FIRST} is damaged: expected shard 0; got 1"):
        by_iteration(out)
    assert f"{FIRST} is damaged" in fails("summary", out, "--out", tmp_path / "summary")
    said: list[str] = []
    resume(job.made, out, say=said.append)
    assert len(said) == 1
    assert FIRST in said[0]
    assert files_of(out) == job.files


def test_a_shard_of_another_job_is_found(job: Finished, tmp_path: Path) -> None:
    other = made_job(draw(tmp_path / "pictures", 15), tmp_path / "other", 5)
    out = job.copy(tmp_path / "out")
    shutil.copy(other / FIRST, out / FIRST)
    with pytest.raises(DamagedError, match=rf"{FIRST} is damaged: expected manifest \w+; got \w+"):
        by_index(out)
    assert f"{FIRST} is damaged" in fails("summary", out, "--out", tmp_path / "summary")
    resume(job.made, out, say=lambda text: None)
    assert files_of(out) == job.files


def test_a_flipped_tensor_is_found_and_both_files_are_set_aside(finished: dict[str, Finished], tmp_path: Path) -> None:
    job = finished["full"]
    out = job.copy(tmp_path / "out")
    first = "part-00000.safetensors"
    content = bytearray((out / first).read_bytes())
    content[-1] ^= 1
    (out / first).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{first} is damaged: the checksum of tensor \d is wrong"):
        by_iteration(out)
    resume(job.made, out, say=lambda text: None)
    assert files_of(out) == job.files
    assert {path.name for path in (out / "part-00000.damaged").iterdir()} == {FIRST, first}
    assert (out / "part-00000.damaged" / first).read_bytes() == content


def test_a_newer_format_is_refused_and_nothing_is_touched(job: Finished, tmp_path: Path) -> None:
    out = job.copy(tmp_path / "out")
    planned = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**planned, "format": FORMAT + 1}))
    before = files(out)
    for refused in (lambda: attnx.open(out), lambda: resume(job.made, out)):
        with pytest.raises(ValueError, match=rf"run\.json has format {FORMAT + 1}, of a newer attnx"):
            refused()
    assert "of a newer attnx" in fails("summary", out, "--out", tmp_path / "summary")
    assert "of a newer attnx" in fails(*extract(job, out))
    assert files(out) == before


def extract(job: Finished, out: Path, *more: object) -> list[object]:
    """The arguments of the command that made a job."""
    how = ["--model", "demo", "--method", "cls"] if job.made.recipe.store == "map" else ["--store", "full"]
    most = ["--max-pixels", job.made.recipe.max_pixels, "--batch-size", 4, "--workers", 0, "--device", "cpu"]
    return ["extract", job.made.recipe.source, "--out", out, *how, *most, "--model", "demo", *more]


@pytest.mark.parametrize(
    "name",
    [
        "part-1.parquet",
        "part-000001.parquet",
        "part-0000\u0661.parquet",
        "part-00001 (copy).parquet",
        "part-00003.parquet",
    ],
)
def test_a_second_file_of_a_shard_is_none(finished: dict[str, Finished], tmp_path: Path, name: str) -> None:
    """A file with another spelling of the number, or a number after the last shard, would duplicate rows."""
    job = finished["map"]
    out = job.copy(tmp_path / "out")
    shutil.copy(out / "part-00001.parquet", out / name)
    for read in (by_iteration, by_key, by_index):
        with pytest.raises(DamagedError, match=re.escape(name)):
            read(out)
    assert name in fails("summary", out, "--out", tmp_path / "summary")
    result = run(*extract(job, out))
    assert f"{name} is not a shard of this job; it was moved to " in result.stderr
    assert files_of(out) == job.files
    assert [path.name for path in out.glob("*.damaged/*")] == [name]


def test_a_folder_whose_only_shard_is_none_is_named(tmp_path: Path) -> None:
    (tmp_path / FIRST).mkdir()
    with pytest.raises(DamagedError, match=rf"{FIRST} is damaged: expected a regular file"):
        attnx.open(tmp_path)


@pytest.mark.parametrize("how", ["file", "link", "folder"])
def test_what_was_set_aside_gives_way(finished: dict[str, Finished], tmp_path: Path, how: str) -> None:
    """Files that are set aside replace older ones. The target of a link is not changed."""
    job = finished["map"]
    out = job.copy(tmp_path / "out")
    aside, elsewhere = out / "part-00000.damaged", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").touch()
    {"file": aside.touch, "link": lambda: aside.symlink_to(elsewhere), "folder": aside.mkdir}[how]()
    (out / FIRST).write_bytes(b"PAR1")
    said: list[str] = []
    resume(job.made, out, say=said.append)
    assert files_of(out) == job.files
    assert f"{FIRST} is damaged" in said[0]
    assert not aside.is_symlink()
    assert [path.name for path in aside.iterdir()] == [FIRST]
    assert (elsewhere / "kept").exists()


@pytest.mark.parametrize("value", [-5, 0, True, 1.5, [1], "x", float("inf"), float("nan"), 10**400])
def test_limits_in_run_json_are_not_believed(finished: dict[str, Finished], tmp_path: Path, value: object) -> None:
    job = finished["map"]
    out = job.copy(tmp_path / "out")
    planned = read_run(out)
    write_run(out, {**planned, "settings": {**planned["settings"], "max_pixels": value}})
    line = fails("extract", job.made.recipe.source, "--out", out, "--device", "cpu", "--method", "cls")
    assert "run.json is damaged" in line
    with pytest.raises(DamagedError, match=r"run\.json is damaged"):
        attnx.open(out)


@pytest.mark.parametrize("how", ["pipe", "folder", "link"])
def test_a_lock_is_a_regular_file(finished: dict[str, Finished], tmp_path: Path, how: str) -> None:
    job = finished["map"]
    out = job.copy(tmp_path / "out")
    lock = out / ".lock"
    {"pipe": lambda: os.mkfifo(lock), "folder": lock.mkdir, "link": lambda: lock.symlink_to("/dev/zero")}[how]()
    assert f"out: expected {lock} to be a regular file" in fails(*extract(job, out))
    assert files_of(out) == job.files


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", FIELDS)
def test_an_edited_run_json_is_one_line(finished: dict[str, Finished], tmp_path: Path, name: str, value: str) -> None:
    job = finished["map"]
    out = job.copy(tmp_path / "out")
    planned = json.loads((out / "run.json").read_text())
    edited = {**planned, name: VALUES[value]}
    if VALUES[value] is MISSING:
        del edited[name]
    (out / "run.json").write_text(json.dumps(edited))
    before = files(out)
    with pytest.raises(ValueError, match=r"run\.json") as raised:
        attnx.open(out)
    assert len(str(raised.value).splitlines()) == 1
    line = fails(*extract(job, out))
    assert line.startswith("attnx: ")
    assert "run.json" in line
    assert len(line) <= 300
    assert files(out) == before


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", FIELDS[2:])
def test_so_is_one_with_a_new_checksum(finished: dict[str, Finished], tmp_path: Path, name: str, value: str) -> None:
    """A changed field with a valid checksum of run.json is found, or the rows do not depend on it."""
    job = finished["map"]
    out = job.copy(tmp_path / "out")
    planned = read_run(out)
    planned[name] = VALUES[value]
    if VALUES[value] is MISSING:
        del planned[name]
    write_run(out, planned)
    read = answer(lambda: by_iteration(out))
    assert "is damaged" in read if isinstance(read, str) else read == job.rows
    code, found = summary(out, tmp_path / "summary")
    assert found["rows"] == 12 if code == 0 else "damaged" in found or "recipe" in found


@pytest.mark.parametrize(
    "content", [b"", b"[" * 10**6, b"{}", b"[]", b"null", b'{"format": 1e999}', b"\xff\xfe", b"9" * 5000]
)
def test_any_other_run_json_is_one_line(finished: dict[str, Finished], tmp_path: Path, content: bytes) -> None:
    out = finished["map"].copy(tmp_path / "out")
    (out / "run.json").write_bytes(content)
    with pytest.raises(DamagedError, match=r"run\.json is damaged"):
        attnx.open(out)
    assert "run.json is damaged" in summary(out, tmp_path / "summary")[1]


def test_verify_reads_what_is_otherwise_too_much(
    job: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --verify only footers and sizes of large jobs are checked. Here every job counts as large."""
    monkeypatch.setattr("attnx.jobs.run._VERIFIED", 0)
    out = job.copy(tmp_path / "out")
    name = "part-00001.parquet" if job.made.recipe.store == "map" else "part-00001.safetensors"
    content = bytearray(job.files[name])
    content[len(content) // 2 if name.endswith("tensors") else 200] ^= 0x10
    (out / name).write_bytes(content)
    quick = run(*extract(job, out))
    assert quick.exit_code == 1, quick.output
    assert "12" in quick.output
    assert "damaged" not in quick.output
    assert (out / name).read_bytes() == content
    thorough = run(*extract(job, out, "--verify"))
    assert thorough.exit_code == 1, thorough.output
    assert f"{name} is damaged" in thorough.stderr
    assert "shard 1 is made again" in thorough.stderr
    assert files_of(out) == job.files
    aside = out / "part-00001.damaged"
    assert {path.name for path in aside.iterdir()} == {each for each in job.files if each.startswith("part-00001")}
    assert (aside / name).read_bytes() == content


def test_a_cut_file_is_found_without_verify(job: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("attnx.jobs.run._VERIFIED", 0)
    for name in (name for name in job.files if name.startswith("part-00002")):
        out = job.copy(tmp_path / name)
        (out / name).write_bytes(job.files[name][:-1])
        said: list[str] = []
        resume(job.made, out, say=said.append)
        assert len(said) == 1
        assert name in said[0]
        assert files_of(out) == job.files


def test_other_readers_read_the_shards(job: Finished) -> None:
    """Other readers can verify the page checksums."""
    wanted = [row[0] for row in job.rows]
    paths = sorted(str(path) for path in job.out.glob("part-*.parquet"))
    checked = [pq.read_table(path, page_checksum_verification=True) for path in paths]
    assert [key for table in checked for key in table.column("key").to_pylist()] == wanted
    assert [key for path in paths for key in pq.read_table(path).column("key").to_pylist()] == wanted
    found = duckdb.sql(f"select key, error from read_parquet({paths!r}) order by key").fetchall()
    assert [key for key, _ in found] == wanted
    assert [key for key, error in found if error is not None] == ["007.jpg"]
    if job.made.recipe.store == "map":
        values = duckdb.sql(f"select map[1] * scale from '{paths[0]}'").fetchall()
        np.testing.assert_allclose(values[0], [np.frombuffer(job.rows[0][1][1], np.float32)[0]], rtol=1e-3)


def test_pages_have_checksums_of_their_own(finished: dict[str, Finished], tmp_path: Path) -> None:
    """Readers other than ours find the damage, too."""
    job = finished["map"]
    path = tmp_path / FIRST
    column = Part(job.out / FIRST).metadata.row_group(0).column(2)
    content = bytearray(job.files[FIRST])
    content[column.data_page_offset + column.total_compressed_size - 1] ^= 1
    path.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.read_table(path, page_checksum_verification=True)


@pytest.mark.parametrize("replace", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
@pytest.mark.parametrize("name", [FIRST, "part-00000.safetensors", "run.json", "manifest.parquet"])
def test_what_is_no_file_is_an_error_at_once(
    finished: dict[str, Finished], tmp_path: Path, name: str, replace: Callable[[Path], None]
) -> None:
    """A pipe would block a reader."""
    job = finished["full"]
    out = job.copy(tmp_path / "out")
    (out / name).unlink()
    replace(out / name)
    start = time.perf_counter()
    for read in (by_iteration, by_key, by_index):
        with pytest.raises((ValueError, OSError), match=name):
            read(out)
    if name != "part-00000.safetensors":
        # For whole maps, the summary reads only the rows.
        assert name in fails("summary", out, "--out", tmp_path / "summary")
    result = run(*extract(job, out))
    if name == FIRST:
        assert f"{name} is not a shard of this job; it was moved to {out / 'part-00000.damaged'}" in result.stderr
        assert files_of(out) == job.files
    else:
        assert name in result.stderr
        assert result.exit_code == 2 or files_of(out) == job.files
    assert time.perf_counter() - start < 60


def read_again_and_again(part: Part, want: int) -> None:
    """Read in a forked process, whose files share their positions with those of the other processes."""
    for _ in range(100):
        part._checked.clear()
        assert part.table().num_rows == want


def test_forked_processes_read_the_same_shard(finished: dict[str, Finished]) -> None:
    """The workers of a DataLoader do this."""
    part = Part(finished["map"].out / FIRST)
    context = multiprocessing.get_context("fork")
    readers = [context.Process(target=read_again_and_again, args=(part, part.rows)) for _ in range(3)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert [reader.exitcode for reader in readers] == [0, 0, 0]
