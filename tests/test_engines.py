"""Every engine writes the same bytes; a process that dies costs the time of one shard."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_job import draw, files, opened, shards, tools

import attnx
from attnx.jobs.engines.cluster import Cluster, _sizes
from attnx.jobs.engines.queue import Shards
from attnx.jobs.engines.ranks import device_of_rank, rank_of
from attnx.jobs.job import Job, Rank
from attnx.jobs.options import RunOptions
from attnx.jobs.plan import writing
from attnx.jobs.run import Report, run_job
from attnx.jobs.runfile import write_run
from attnx.jobs.runtime import Runtime

RUNNING = RunOptions(batch_size=4, workers=1)
TWO = {"devices": ["cpu", "cpu"]}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    torch.set_num_threads(1)
    return tools(draw(tmp_path_factory.mktemp("pictures"), 40, broken=(10,)))


@pytest.fixture(scope="module")
def whole(made: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job run in this process, in shards of 5."""
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


def run(made: Runtime, out: Path, **options) -> Report:
    with opened(made, out, 5) as job:
        return run_job(made, job, RUNNING, **options)


def children(parent: int, of: str) -> list[int]:
    """The descendants of a process whose command line contains a word, read from /proc."""
    found = []
    # Processes start and end during the search.
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{parent}/task").iterdir():
            for child in map(int, (task / "children").read_text().split()):
                command = Path(f"/proc/{child}/cmdline").read_bytes().decode()
                found += [child] * (of in command) + children(child, of)
    return found


def alive(process: int) -> bool:
    """True if the process runs. A zombie has no command line."""
    with contextlib.suppress(OSError):
        return bool(Path(f"/proc/{process}/cmdline").read_bytes())
    return False


class KillOnce:
    """A progress callback that kills a process after the first shard."""

    def __init__(self, kill: Callable[[], None]) -> None:
        self.kill, self.killed = kill, False

    def __call__(self, done: int, total: int) -> None:
        if done and not self.killed:
            self.kill()
            self.killed = True


def block(part: Path) -> Callable[[int, int], None]:
    """A progress callback that creates a folder at a shard's path, so that the shard can't be written."""

    def progress(done: int, total: int) -> None:
        (part / "full").mkdir(parents=True, exist_ok=True)

    return progress


@pytest.mark.long
def test_a_process_for_each_device_and_one_that_is_killed_costs_a_shard(
    made: Runtime,
    whole: Path,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setenv("TMPDIR", str(temporary))
    said: list[str] = []
    told: list[tuple[int, int]] = []
    kill = KillOnce(lambda: os.kill(children(os.getpid(), "engines.local")[0], signal.SIGKILL))

    def progress(done: int, total: int) -> None:
        told.append((done, total))
        kill(done, total)

    report = run(made, tmp_path, **TWO, progress=progress, say=said.append)
    assert files(tmp_path) == files(whole)
    assert (report.maps, report.errors, report.makers, report.set_aside) == (39, 1, 2, {})
    # One shard less if the process was killed after writing it: then only its failed rows are done again.
    assert 35 <= report.made <= 40
    assert (told[0], told[-1]) == ((0, 40), (report.made, 40))
    assert report.stages.model > 0
    assert report.stages.decoding > 0
    assert kill.killed
    # There is no message if the process was killed between two shards.
    assert len(said) <= 1
    for text in said:
        assert "failed and is tried again: its process ended with SIGKILL" in text
    # Only the killed process leaves its temporary folder.
    assert len(list(temporary.iterdir())) <= 1


@pytest.mark.long
def test_a_device_that_fails_is_left_to_the_others(made: Runtime, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []

    def progress(done: int, total: int) -> None:
        # The other device must fail before all shards are done.
        if not said:
            time.sleep(2)

    report = run(made, tmp_path, devices=["cpu", "cuda:99"], say=said.append, tries=1, progress=progress)
    assert files(tmp_path) == files(whole)
    assert (report.maps, report.set_aside) == (39, {})
    (text,) = said
    assert text.startswith("cuda:99 is not used any more after 1 failures in a row: ")


@pytest.mark.long
def test_a_shard_that_can_not_be_made_is_set_aside(made: Runtime, whole: Path, tmp_path: Path) -> None:
    """A folder exists at the path of the shard's file."""
    said: list[str] = []
    report = run(made, tmp_path, **TWO, say=said.append, tries=1, progress=block(tmp_path / "part-00002.parquet"))
    assert (list(report.set_aside), report.maps, report.errors) == ([2], 35, 0)
    assert "Is a directory" in report.set_aside[2]
    assert said[0].startswith("shard 2 is set aside after 1 tries: IsADirectoryError")
    want = shards(whole)
    assert {name: (tmp_path / name).read_bytes() for name in want if name != "part-00002.parquet"} == {
        name: content for name, content in want.items() if name != "part-00002.parquet"
    }
    run(made, tmp_path, say=said.append)
    assert "part-00002.parquet is not a shard of this job; it was moved to" in said[-1]
    shutil.rmtree(tmp_path / "part-00002.damaged")
    assert files(tmp_path) == files(whole)


@pytest.mark.long
def test_processes_that_all_fail_end_the_job(made: Runtime, tmp_path: Path) -> None:
    said: list[str] = []
    with opened(made, tmp_path, 5) as job:
        write_run(tmp_path, {**job.run, "settings": {**job.run["settings"], "weights": "0"}})
        with pytest.raises(RuntimeError, match=r"no device is left: cpu failed 1 times.*weights: '0' in the job"):
            run_job(made, job, RUNNING, **TWO, tries=1, say=said.append)
    assert said[0].startswith("cpu is not used any more after 1 failures in a row: ValueError")
    assert not children(os.getpid(), "engines.local")
    assert shards(tmp_path) == {}


@pytest.mark.long
def test_a_run_that_is_killed_takes_its_processes_with_it(made: Runtime, whole: Path, tmp_path: Path) -> None:
    pictures, out = draw(tmp_path / "pictures", 120), tmp_path / "out"
    command = [
        sys.executable,
        "-m",
        "attnx",
        "extract",
        str(pictures),
        "--out",
        str(out),
    ]
    command += ["--device", "cpu,cpu", "--method", "cls", "--shard-size", "5", "--batch-size", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not out.exists() or not shards(out):
            assert process.poll() is None
            time.sleep(0.01)
        below, writers = children(process.pid, "python"), children(process.pid, "engines.local")
        process.kill()
    assert len(writers) == 2
    # A process that holds the lock is the only writer.
    with writing(out):
        assert not any(map(alive, writers))
    whole_job = tools(pictures)
    with opened(whole_job, out) as job:
        run_job(whole_job, job, RunOptions(workers=0))
    assert [row.key for row in attnx.open(out)] == [f"{i:03d}.jpg" for i in range(120)]
    # Decoders end by themselves when their parent has died.
    until = time.monotonic() + 30
    while any(map(alive, below)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(map(alive, below))
    assert not list(out.glob(".part*"))


@pytest.mark.long
def test_ranks_share_a_job(made: Runtime, whole: Path, tmp_path: Path) -> None:
    """Ranks start at the same time, and each could plan the job."""
    command = [sys.executable, "-m", "attnx", "extract", made.recipe.source, "--out"]
    command += [str(tmp_path), "--device", "cpu", "--method", "cls", "--shard-size", "5", "--batch-size", "4"]
    command += ["--engine", "ranks"]
    ranks = [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=200) for rank in ranks]
    # 010.jpg is in shard 2.
    assert [rank.returncode for rank in ranks] == [1, 0], told
    assert "rank 0 of 2: maps of 19 images in" in told[0][0]
    assert "rank 1 of 2: maps of 20 images in" in told[1][0]
    assert files(tmp_path) == files(whole)
    assert Job(tmp_path).done() == set(range(8))


def test_a_rank_does_its_part(made: Runtime, whole: Path, tmp_path: Path) -> None:
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


def test_an_array_with_gaps_does_not_say_which_rank() -> None:
    array = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_ARRAY_TASK_MIN": "1"}
    assert rank_of(None, None, array | {"SLURM_ARRAY_TASK_MAX": "13", "SLURM_ARRAY_TASK_STEP": "6"}) == Rank(1, 3)
    with pytest.raises(ValueError, match=r"array of all numbers from 1 to 7; got 3 of them.*set --rank and --world"):
        rank_of(None, None, array | {"SLURM_ARRAY_TASK_MAX": "7"})


def test_a_rank_that_nothing_says_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected --rank and --world, or in the environment RANK and WORLD_SIZE"):
        rank_of(None, None, {"RANK": "1"})
    with pytest.raises(ValueError, match="expected both or none; got rank 1, world None"):
        rank_of(1, None, {})
    with pytest.raises(ValueError, match="expected 0 <= rank < world; got rank 3 of a world of 3"):
        rank_of(3, 3, {})
    with pytest.raises(ValueError, match="expected a number in WORLD_SIZE; got 'two'"):
        rank_of(None, None, {"RANK": "1", "WORLD_SIZE": "two"})


@pytest.mark.long
def test_actors_of_a_cluster(ray, made: Runtime, whole: Path, tmp_path: Path) -> None:
    """One actor is killed, and one shard can't be made because a folder is at its path."""
    said: list[str] = []
    blocked = block(tmp_path / "part-00006.parquet")
    # The actor is a child of the cluster, not of this process.
    kill = KillOnce(lambda: os.kill(children(1, "ray::ShardActor")[0], signal.SIGKILL))

    def progress(done: int, total: int) -> None:
        blocked(done, total)
        kill(done, total)

    report = run(made, tmp_path, cluster=Cluster(actors=2, cpus=1), progress=progress, say=said.append, tries=2)
    want = {name: content for name, content in shards(whole).items() if name != "part-00006.parquet"}
    assert {name: (tmp_path / name).read_bytes() for name in want} == want
    assert (report.maps, report.errors, report.makers, list(report.set_aside)) == (34, 1, 2, [6])
    assert "Is a directory" in report.set_aside[6]
    assert report.stages.model > 0
    assert kill.killed
    assert sum("Is a directory" in text for text in said) == 2
    # A busy machine adds messages about actors that wait for resources.
    assert len([text for text in said if "wait for resources" not in text]) == 3
    assert not list(tmp_path.glob(".part*"))


def test_here_too_a_shard_is_set_aside(made: Runtime, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    report = run(made, tmp_path, say=said.append, tries=2, progress=block(tmp_path / "part-00007.parquet"))
    assert (list(report.set_aside), report.maps, len(said)) == ([7], 34, 2)
    assert shards(whole).items() >= {name: (tmp_path / name).read_bytes() for name in list(shards(whole))[:7]}.items()


def node(cpus: float, gpus: float = 0, alive: bool = True) -> dict:
    return {"Alive": alive, "Resources": {"CPU": cpus} | ({"GPU": gpus} if gpus else {})}


@pytest.mark.parametrize(
    ("nodes", "cluster", "sizes"),
    [
        ([node(8)], Cluster(), (1, 8, 0)),
        ([node(4), node(4), node(64, alive=False)], Cluster(), (2, 4, 0)),
        ([node(4), node(4)], Cluster(actors=1), (1, 4, 0)),
        ([node(4), node(4)], Cluster(actors=3), (3, 2, 0)),
        ([node(32), node(8, 1), node(8, 1)], Cluster(), (2, 8, 1)),
        ([node(64, 8), node(32, 8)], Cluster(), (16, 4, 1)),
        ([node(64, 8)], Cluster(gpus=0.5), (16, 4, 0.5)),
        ([node(8)], Cluster(actors=32, gpus=1, cpus=6), (32, 6, 1)),
        ([node(8)], Cluster(cpus=3), (1, 3, 0)),
    ],
)
def test_an_actor_has_room_on_a_machine(nodes: list[dict], cluster: Cluster, sizes: tuple) -> None:
    assert _sizes(nodes, cluster) == sizes


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
