"""Whoever makes the shards, the bytes are the same; who dies costs a shard's time."""

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_job import draw, files, opened, shards, tools

from attnx.jobs.engines.cluster import Cluster
from attnx.jobs.engines.here import device_of_rank, rank_of
from attnx.jobs.engines.queue import Shards
from attnx.jobs.job import Job, Rank
from attnx.jobs.recipe import Running, Tools
from attnx.jobs.rows import read_shards
from attnx.jobs.run import Report, run_job

RUNNING = Running(batch_size=4, workers=1)
TWO = {"devices": ["cpu", "cpu"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Tools:
    torch.set_num_threads(1)
    return tools(draw(tmp_path_factory.mktemp("pictures"), 40, broken=(10,)))


@pytest.fixture(scope="module")
def whole(made: Tools, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job in this process, in shards of 5."""
    out = tmp_path_factory.mktemp("whole")
    run(made, out)
    return out


@pytest.fixture(scope="module")
def ray():
    """A cluster on this machine."""
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=100 * 2**20)
    yield ray
    ray.shutdown()


def run(made: Tools, out: Path, **options) -> Report:
    with opened(made, out, 5) as job:
        return run_job(made, job, RUNNING, **options)


def children(parent: int, of: str) -> list[int]:
    """The processes below one whose command line has a word, by /proc."""
    found = []
    # They come and go meanwhile.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_bytes().decode()
                found += [child] * (of in command) + children(child, of)
    return found


def kill_once(kill: Callable[[], None]) -> Callable[[int, int], None]:
    """A progress that kills after the first shard."""
    left = [kill]

    def progress(done: int, total: int) -> None:
        if done and left:
            left.pop()()

    return progress


def test_a_process_for_each_device(made: Tools, whole: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    report = run(made, tmp_path, **TWO, progress=lambda *counts: told.append(counts))
    assert files(tmp_path) == files(whole)
    assert (report.maps, report.errors, report.made, report.makers) == (39, 1, 40, 2)
    assert told[0] == (0, 40)
    assert told[-1] == (40, 40)
    assert report.stages.model > 0
    assert report.stages.decoding > 0


def test_a_process_that_is_killed_costs_a_shard(made: Tools, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    kill = kill_once(lambda: os.kill(children(os.getpid(), "engines.local")[0], signal.SIGKILL))
    report = run(made, tmp_path, **TWO, progress=kill, say=said.append)
    assert files(tmp_path) == files(whole)
    assert (report.maps, report.set_aside) == (39, {})
    assert len(said) == 1
    assert "failed and is tried again: its process ended with SIGKILL" in said[0]


def test_a_shard_that_can_not_be_made_is_set_aside(made: Tools, whole: Path, tmp_path: Path) -> None:
    """A folder stands where its file should be."""
    said: list[str] = []
    (tmp_path / "part-00002.parquet" / "full").mkdir(parents=True)
    report = run(made, tmp_path, **TWO, say=said.append, tries=2)
    assert (list(report.set_aside), report.maps, report.errors) == ([2], 35, 0)
    assert "Is a directory" in report.set_aside[2]
    assert [text.split(":")[0] for text in said] == [
        "shard 2 failed and is tried again",
        "shard 2 is set aside after 2 tries",
    ]
    want = shards(whole)
    assert {name: (tmp_path / name).read_bytes() for name in want if name != "part-00002.parquet"} == {
        name: content for name, content in want.items() if name != "part-00002.parquet"
    }
    (tmp_path / "part-00002.parquet" / "full").rmdir()
    (tmp_path / "part-00002.parquet").rmdir()
    run(made, tmp_path)
    assert files(tmp_path) == files(whole)


def test_processes_that_all_fail_end_the_job(made: Tools, tmp_path: Path) -> None:
    with opened(made, tmp_path, 5) as job:
        changed = json.loads((tmp_path / "run.json").read_text())
        changed["settings"]["weights"] = "0"
        (tmp_path / "run.json").write_text(json.dumps(changed))
        with pytest.raises(RuntimeError, match=r"stopped after 2 failures in a row.*weights: '0' there"):
            run_job(made, job, RUNNING, **TWO, tries=2, say=lambda _: None)
    assert not children(os.getpid(), "engines.local")
    assert shards(tmp_path) == {}


def test_a_run_that_is_killed_takes_its_processes_with_it(made: Tools, whole: Path, tmp_path: Path) -> None:
    pictures, out = draw(tmp_path / "pictures", 120), tmp_path / "out"
    command = [sys.executable, "-c", "from attnx.cli import main; main()", "extract", str(pictures), "--out", str(out)]
    command += ["--device", "cpu,cpu", "--method", "cls", "--shard-size", "5", "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not out.exists() or not shards(out):
            assert process.poll() is None
            time.sleep(0.01)
        below = children(process.pid, "python")
        process.kill()
    assert len(below) >= 2
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [row.key for row in read_shards(out)] == [f"{i:03d}.jpg" for i in range(120)]
    assert not any(Path(f"/proc/{child}").exists() for child in below)
    assert not list(out.glob(".part*"))


def test_ranks_share_a_job(made: Tools, whole: Path, tmp_path: Path) -> None:
    """Three at once, each of which would plan."""
    command = [sys.executable, "-c", "from attnx.cli import main; main()", "extract", made.recipe.source, "--out"]
    command += [str(tmp_path), "--device", "cpu", "--method", "cls", "--shard-size", "5", "--batch-size", "4"]
    command += ["--engine", "ranks"]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "3", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(3)
    ]  # fmt: skip
    told = [rank.communicate(timeout=200) for rank in ranks]
    # 010.jpg is of shard 2.
    assert [rank.returncode for rank in ranks] == [0, 0, 1], told
    assert "rank 0 of 3: maps of 15 images in" in told[0][0]
    assert "rank 2 of 3: maps of 9 images in" in told[2][0]
    assert files(tmp_path) == files(whole)
    assert Job(tmp_path).done() == set(range(8))


def test_a_rank_does_its_part(made: Tools, whole: Path, tmp_path: Path) -> None:
    with opened(made, tmp_path, 5, Rank(1, 3)) as job:
        (tmp_path / ".part-00000-of-another.tmp").touch()
        report = run_job(made, job, RUNNING, rank=Rank(1, 3))
    assert Job(tmp_path).done() == {1, 4, 7}
    assert (report.rows, report.maps) == (15, 15)
    with opened(made, tmp_path, 5, Rank(2, 3)):
        assert (tmp_path / ".part-00000-of-another.tmp").exists()
    with opened(made, tmp_path, 5, Rank(0, 3)):
        assert not (tmp_path / ".part-00000-of-another.tmp").exists()


SRUN = {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}
ARRAY = {"SLURM_ARRAY_TASK_ID": "12", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "10"}


@pytest.mark.parametrize(
    ("given", "environment", "rank"),
    [
        ((2, 5), {"RANK": "0", "WORLD_SIZE": "2"}, Rank(2, 5)),
        ((None, None), {"RANK": "1", "WORLD_SIZE": "2"} | SRUN, Rank(1, 2)),
        ((None, None), SRUN, Rank(1, 4)),
        ((None, None), ARRAY, Rank(2, 3)),
        ((None, None), ARRAY | SRUN, Rank(9, 12)),
        ((None, None), ARRAY | {"SLURM_ARRAY_TASK_STEP": "2", "SLURM_ARRAY_TASK_COUNT": "2"}, Rank(1, 2)),
    ],
)
def test_launchers_say_which_rank(given: tuple, environment: dict[str, str], rank: Rank) -> None:
    assert rank_of(*given, environment) == rank


@pytest.mark.parametrize(
    ("gpus", "environment", "device"),
    [
        (8, {"LOCAL_RANK": "3"}, "cuda:3"), (4, {"SLURM_LOCALID": "5"}, "cuda:1"), (1, {"LOCAL_RANK": "0"}, None),
        (0, {"LOCAL_RANK": "1"}, None), (8, {}, None),
    ],
)  # fmt: skip
def test_ranks_of_a_machine_take_a_gpu_each(gpus: int, environment: dict[str, str], device: str | None) -> None:
    assert device_of_rank(gpus, environment) == device


def test_a_rank_that_nothing_says_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected --rank and --world, or in the environment RANK and WORLD_SIZE"):
        rank_of(None, None, {"RANK": "1"})
    with pytest.raises(ValueError, match="expected both or none; got rank 1, world None"):
        rank_of(1, None, {})
    with pytest.raises(ValueError, match="expected 0 <= rank < world; got rank 3 of a world of 3"):
        rank_of(3, 3, {})
    with pytest.raises(ValueError, match="expected a number in WORLD_SIZE; got 'two'"):
        rank_of(None, None, {"RANK": "1", "WORLD_SIZE": "two"})


def test_actors_of_a_cluster(ray, made: Tools, whole: Path, tmp_path: Path) -> None:
    report = run(made, tmp_path, cluster=Cluster(actors=2))
    assert files(tmp_path) == files(whole)
    assert (report.maps, report.errors, report.makers) == (39, 1, 2)
    assert report.stages.model > 0


def test_an_actor_that_is_killed_costs_a_shard(ray, made: Tools, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def kill() -> None:
        # Not our child, but one of the cluster's.
        os.kill(children(1, "ray::Maker")[0], signal.SIGKILL)

    report = run(made, tmp_path, cluster=Cluster(actors=2), progress=kill_once(kill), say=said.append)
    assert files(tmp_path) == files(whole)
    assert (report.maps, report.set_aside) == (39, {})
    assert len(said) == 1
    assert "tried again" in said[0]


def test_a_shard_that_no_actor_can_make_is_set_aside(ray, made: Tools, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "part-00002.parquet" / "full").mkdir(parents=True)
    report = run(made, tmp_path, cluster=Cluster(actors=1), say=said.append, tries=2)
    assert (list(report.set_aside), report.maps) == ([2], 35)
    assert "Is a directory" in report.set_aside[2]


def test_failures_in_a_row_end_a_run() -> None:
    said: list[str] = []
    queue = Shards([5, 6, 7], 2, said.append)
    assert [queue.take(), queue.take()] == [5, 6]
    queue.give_back([6])
    assert [queue.take(), queue.take(), queue.take()] == [6, 7, None]
    queue.done()
    queue.failed(6, "why")
    assert queue.take() == 6
    queue.failed(6, "still")
    assert (queue.set_aside, queue.finished) == ({6: "still"}, False)
    queue.done()
    assert queue.finished
    first = Shards([1, 2], 2, said.append)
    first.failed(None, "no model")
    with pytest.raises(RuntimeError, match="stopped after 2 failures in a row; the last, of shard 1: no model"):
        first.failed(1, "no model")
    with pytest.raises(ValueError, match="tries: expected at least 1, got 0"):
        Shards([1], 0, said.append)
