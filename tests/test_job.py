"""A job is planned once, resumes after it was stopped, and is locked by one run at a time."""

import dataclasses
import json
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
from small_job import draw, files, opened, shards, tools

import attnx
from attnx.images import read_image
from attnx.jobs.job import Job, Rank
from attnx.jobs.options import RunOptions
from attnx.jobs.plan import open_job, writing
from attnx.jobs.run import Report, run_job
from attnx.jobs.runtime import Runtime
from attnx.jobs.shards import parts
from attnx.jobs.sources import Entry, open_source

HERE = RunOptions(batch_size=4, workers=0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The runtime of a job on 30 pictures. Pictures 9 and 29 are truncated."""
    torch.set_num_threads(1)
    return tools(draw(tmp_path_factory.mktemp("pictures"), 30, broken=(10, 29)))


@pytest.fixture(scope="module")
def whole(made: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The undisturbed job, in shards of 7."""
    out = tmp_path_factory.mktemp("whole")
    run(made, out)
    return out


def run(made: Runtime, out: Path, running: RunOptions = HERE, shard_size: int | None = 7, **options: object) -> Report:
    with opened(made, out, shard_size) as job:
        return run_job(made, job, running, **options)


def test_a_job_is_its_files(made: Runtime, whole: Path) -> None:
    parts = [f"part-{i:05d}.parquet" for i in range(5)]
    assert list(files(whole)) == ["manifest.parquet", *parts, "run.json"]
    rows = list(attnx.open(whole))
    assert [row.key for row in rows] == [f"{i:03d}.jpg" for i in range(30)]
    assert [row.key for row in rows if row.map is None] == ["010.jpg", "029.jpg"]
    assert all("can't be read" in (row.error or "") for row in rows if row.map is None)
    assert (rows[3].width, rows[3].height) == (53, 40)
    planned = json.loads((whole / "run.json").read_text())
    assert planned["settings"]["weights"] == made.loaded.fingerprint()
    assert planned["settings"]["pixels"]["kind"] == "whole"
    assert (planned["rows"], planned["shard_size"]) == (30, 7)
    pixels, crop = made.pixels(read_image(Path(made.recipe.source, "000.jpg")))
    want = made.task.extract(made.pixels.normalise(torch.from_numpy(pixels.copy())[None]))[0].numpy()
    np.testing.assert_allclose(rows[0].map, want, rtol=1e-3, atol=1e-4 * want.max())
    assert rows[0].crop == crop


def test_it_goes_on_where_it_was_stopped(made: Runtime, whole: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    with opened(made, tmp_path, 7) as job, made.worker(job, HERE) as worker:
        worker.run_shard(3).result()
    (tmp_path / ".part-00002-0123.tmp").write_bytes(b"left by a kill")
    report = run(made, tmp_path, shard_size=None, progress=lambda *counts: told.append(counts))
    assert told == [(7, 30), (14, 30), (21, 30), (28, 30), (30, 30)]
    assert (report.rows, report.maps, report.errors, report.before, report.made) == (30, 28, 2, 7, 23)
    assert files(tmp_path) == files(whole)
    again = run(made, tmp_path)
    assert (again.before, again.made, again.maps) == (30, 0, 28)


def test_other_settings_are_refused_with_each_difference(made: Runtime, whole: Path, tmp_path: Path) -> None:
    before = files(whole)
    other = tools(Path(made.recipe.source), map_dtype="uint8", heads="max")
    with pytest.raises(ValueError, match=r"other settings. heads: 'mean' in the job, 'max' now; map_dtype: 'float16' "):
        run(other, whole)
    with pytest.raises(ValueError, match="shard_size: 7 in the job, 8 now"):
        run(made, whole, shard_size=8)
    moved = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, source=str(draw(tmp_path / "x", 1))))
    with pytest.raises(ValueError, match=r"source.path: .* in the job, .* now"):
        run(moved, whole)
    assert files(whole) == before


def test_a_plan_without_shards_makes_room_for_another(made: Runtime, whole: Path, tmp_path: Path) -> None:
    with opened(made, tmp_path, 3):
        pass
    with pytest.raises(ValueError, match="shard_size: 3 in the job, 7 now"), opened(made, tmp_path, 7, Rank(0, 2)):
        pass
    (tmp_path / "part-00000.safetensors").write_bytes(b"left by a kill")
    assert run(made, tmp_path).made == 30
    assert files(tmp_path) == files(whole)


def test_only_one_run_writes(made: Runtime, tmp_path: Path) -> None:
    with opened(made, tmp_path, 7), pytest.raises(ValueError, match="another run writes to"):
        run(made, tmp_path)
    with opened(made, tmp_path, 7, Rank(0, 2)):
        with pytest.raises(ValueError, match="another run writes to"):
            run(made, tmp_path)
        with pytest.raises(ValueError, match="another run writes to"), writing(tmp_path, Rank(0, 2)):
            pass
        with pytest.raises(ValueError, match="another run writes to"), writing(tmp_path, Rank(1, 3)):
            pass
        with writing(tmp_path, Rank(1, 2)):
            pass
    assert run(made, tmp_path).maps == 28


def test_failed_rows_are_done_again_and_no_others(made: Runtime, whole: Path, tmp_path: Path) -> None:
    pictures = draw(tmp_path / "pictures", 30, broken=(10, 29))
    changed = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, source=str(pictures)))
    out = tmp_path / "out"
    run(changed, out)
    draw(pictures, 29)
    old = {name: os.stat(out / name).st_ino for name in shards(out)}
    report = run(changed, out, retry_failed=True)
    assert (report.maps, report.errors, report.made) == (29, 1, 2)
    new = {name: os.stat(out / name).st_ino for name in shards(out)}
    assert [name for name in old if old[name] != new[name]] == ["part-00001.parquet", "part-00004.parquet"]
    rows, before = (pq.read_table(parts(folder)).to_pylist() for folder in (out, whole))
    assert [row["key"] for row in rows] == [row["key"] for row in before]
    # The last row's error contains the path of its file, which differs.
    assert [i for i in range(29) if rows[i] != before[i]] == [10]
    assert rows[10]["error"] is None
    assert rows[10]["map"] is not None


def test_a_folder_that_is_no_job_is_refused(made: Runtime, whole: Path, tmp_path: Path) -> None:
    (tmp_path / "part-00000.parquet").write_bytes((whole / "part-00000.parquet").read_bytes())
    with pytest.raises(ValueError, match=r"has shards and no run\.json"):
        run(made, tmp_path)
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(OSError, match="expected a writable folder"):
        run(made, file)


def test_keys_that_come_twice_leave_no_job(made: Runtime, tmp_path: Path) -> None:
    class Twice:
        kind = "twice"

        def entries(self) -> list[Entry]:
            return [Entry("a", "a.png"), Entry("b", "b.png"), Entry("a", "c.png")]

    with pytest.raises(ValueError, match=r"expected every key once; 'a' is in rows 0, 2"):
        open_job(tmp_path, Twice(), {}, {}).__enter__()
    assert list(files(tmp_path)) == []


def test_nothing_is_written_outside_the_folder(made: Runtime, tmp_path: Path) -> None:
    """Keys are never used as parts of a path."""
    draw(tmp_path / "pictures", 1)
    hard = ["../../up", "/etc/passwd", "a/b\\c", "ключ-键", "x" * 5000, "nul\0l", "<script>alert(1)</script>"]
    lines = [json.dumps({"path": "pictures/000.jpg", "key": key, "caption": "<b>a & b</b>"}) for key in hard]
    table = tmp_path / "table.jsonl"
    table.write_text("\n".join(lines))
    out = tmp_path / "deep" / "out"
    listed = dataclasses.replace(made, recipe=dataclasses.replace(made.recipe, source=str(table), kind="table"))
    run(listed, out)
    rows = list(attnx.open(out))
    assert [row.key for row in rows] == hard
    assert {row.text for row in rows} == {"<b>a & b</b>"}
    assert [row.key for row in rows if row.map is None] == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "pictures", "table.jsonl"]
    assert [p.name for p in out.parent.iterdir()] == ["out"]


KILLED = """
    import json, os, random, signal, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    sys.path.insert(0, {tests!r})
    from small_job import opened, tools
    from attnx.jobs.options import RunOptions
    from attnx.jobs.run import run_job
    import pyarrow.parquet

    made, running = tools(Path({source!r})), RunOptions(batch_size=4, workers=0)
    out, kills, of_this_job, finished = Path({out!r}), 0, 0, 0

    def once(folder):
        with opened(made, folder, 7) as job:
            run_job(made, job, running)

    def forked(folder):
        child = os.fork()
        if not child:
            once(folder)
            os._exit(0)
        return child

    # What is slow the first time is done here, and every child begins where it matters.
    once(out / "warm")
    start = time.perf_counter()
    assert os.waitpid(forked(out / "timed"), 0)[1] == 0
    seconds = time.perf_counter() - start
    random.seed(1)
    while kills < 50:
        child = forked(out / str(finished))
        # After ten kills at one shard, its images may get error rows. So each job is killed at most nine times.
        if of_this_job < 9:
            time.sleep(random.uniform(0, seconds))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        assert os.WIFSIGNALED(status) or status == 0, status
        kills += os.WIFSIGNALED(status)
        of_this_job += os.WIFSIGNALED(status)
        if status == 0:
            finished, of_this_job = finished + 1, 0
    assert os.waitpid(forked(out / str(finished)), 0)[1] == 0
    print(finished + 1)
"""


@pytest.mark.long
def test_fifty_kills_lose_nothing(made: Runtime, whole: Path, tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), source=made.recipe.source, out=str(tmp_path))
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
    finished = int(done.stdout.split()[-1])
    assert finished >= 3, "kills must fall everywhere, at the beginning of a job too"
    for out in (tmp_path / "timed", *(tmp_path / str(i) for i in range(finished))):
        assert files(out) == files(whole), out


@pytest.mark.long
def test_an_interrupt_leaves_whole_shards(tmp_path: Path) -> None:
    """The signal is sent to every process of the command, as a terminal does."""
    pictures, out = draw(tmp_path / "pictures", 300), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "attnx",
        "extract",
        str(pictures),
        "--out",
        str(out),
    ]
    command += [
        "--device",
        "cpu",
        "--method",
        "cls",
        "--shard-size",
        "7",
        "--batch-size",
        "4",
        "--workers",
        "2",
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        while not out.exists() or not shards(out):
            assert process.poll() is None
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        told = process.communicate(timeout=60)[1]
    assert process.returncode == 130, told
    assert "Traceback" not in told
    assert 0 < len(shards(out)) < 43
    assert not list(out.glob(".part*"))
    again = tools(pictures)
    with opened(again, out) as job:
        run_job(again, job, HERE)
    assert [row.key for row in attnx.open(out)] == [f"{i:03d}.jpg" for i in range(300)]


def test_a_full_disk_stops_the_job_and_loses_nothing(made: Runtime, whole: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"needs a small disk, and can't mount one: {mounted.stderr.decode().strip()}")
    try:
        out = disk / "out"
        with opened(made, out, 7):
            pass
        filler = disk / "filler"
        free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
        filler.write_bytes(bytes(free - 3 * 8192))
        with pytest.raises(OSError, match="No space left on device"):
            run(made, out)
        there = shards(out)
        assert 0 < len(there) < 5
        assert there.items() <= shards(whole).items()
        assert not list(out.glob(".part*"))
        filler.unlink()
        run(made, out)
        assert files(out).keys() == files(whole).keys()
        assert shards(out) == shards(whole)
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_shard_of_large_maps_has_few_rows(made: Runtime, tmp_path: Path) -> None:
    with open_job(tmp_path, open_source(Path(made.recipe.source)), {}, {}, row_bytes=100 * 2**20) as job:
        assert (job.shard_size, job.shards) == (2, 15)
    assert Job(tmp_path).rows_of(14) == 2
