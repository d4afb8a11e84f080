"""An image at which the model raises, dies or hangs gives an error row on every engine; killed runs leave nothing."""

import dataclasses
import importlib.util
import itertools
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import processes
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from small_job import draw, files, opened, shards, tools

from attnx.images import read_image
from attnx.jobs.attempts import DIED, Attempt, noted
from attnx.jobs.engines.queue import RunError, Shards
from attnx.jobs.job import Job
from attnx.jobs.options import RunOptions
from attnx.jobs.run import Report, run_job
from attnx.jobs.runtime import Runtime
from attnx.jobs.shards import part_name, parts
from attnx.jobs.tasks import ImageTask
from attnx.jobs.watch import Hang, Watch
from attnx.supervisor import temporary_folder

BAD = 17
LOCAL1, LOCAL2 = ("--device", "cpu"), ("--device", "cpu,cpu")
RAY = ("--device", "cpu", "--engine", "ray", "--actors", "2", "--actor-cpus", "1")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    """The runtime of a job on 40 pictures, one of them white."""
    torch.set_num_threads(1)
    folder = draw(tmp_path_factory.mktemp("pictures"), 40)
    Image.new("RGB", (60, 40), (255, 255, 255)).save(folder / f"{BAD:03d}.jpg")
    return tools(folder)


@pytest.fixture(scope="module")
def whole(made: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """The undisturbed job for a batch size."""
    jobs: dict[int, Path] = {}

    def of(batch_size: int) -> Path:
        if batch_size not in jobs:
            jobs[batch_size] = tmp_path_factory.mktemp("whole")
            run(made, jobs[batch_size], batch_size)
        return jobs[batch_size]

    return of


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files. Its path is short enough for sockets."""
    with tempfile.TemporaryDirectory(prefix="attnx-t-") as folder:
        yield Path(folder)


def run(made: Runtime, out: Path, batch_size: int = 4, shard_size: int = 4, **options: object) -> Report:
    with opened(made, out, shard_size) as job:
        return run_job(made, job, RunOptions(batch_size=batch_size, workers=0), **options)


def attempts(out: Path) -> list[Path]:
    """The attempt files in a folder."""
    return sorted(out.glob(".attempt-*"))


def rows(out: Path) -> list[dict]:
    return pq.read_table(parts(out)).to_pylist()


def only_the_bad_row_differs(out: Path, whole: Path) -> str:
    """Check that only the bad row differs, and return its error."""
    assert list(shards(out)) == list(shards(whole))
    now, before = rows(out), rows(whole)
    assert [i for i in range(40) if now[i] != before[i]] == [BAD]
    assert now[BAD]["map"] is None
    return now[BAD]["error"]


def raising(made: Runtime, bad: Callable[[torch.Tensor], bool], error: BaseException) -> Runtime:
    """The runtime with a model that raises `error` for batches where `bad` is true."""
    assert isinstance(made.task, ImageTask)
    extract = made.task.extract

    def raises(images: torch.Tensor) -> torch.Tensor:
        if bad(images):
            raise error
        return extract(images)

    return dataclasses.replace(made, task=dataclasses.replace(made.task, extract=raises))


def images_of(made: Runtime) -> list[torch.Tensor]:
    """The input of the model for every picture."""
    source = Path(made.recipe.source)
    pixels = [made.pixels(read_image(path))[0] for path in sorted(source.iterdir())]
    return list(made.pixels.normalise(torch.stack([torch.from_numpy(each.copy()) for each in pixels])))


def any_white(images: torch.Tensor) -> bool:
    return bool((images.std(dim=(2, 3)).sum(1) < 1e-6).any())


def test_a_note_counts_what_was_begun_and_not_finished(tmp_path: Path) -> None:
    for begun in (1, 2):
        note = Attempt.of(tmp_path, 7)
        note.begin()
        assert Attempt.of(tmp_path, 7).begun == begun
    assert [path.name for path in attempts(tmp_path)] == [".attempt-00007.json"]
    Attempt.of(tmp_path, 7).withdraw()
    assert Attempt.of(tmp_path, 7).begun == 1
    Attempt.of(tmp_path, 7).withdraw()
    assert attempts(tmp_path) == []
    note = Attempt.of(tmp_path, 7)
    note.begin()
    note.fail(0, 4, "why")
    note.withdraw()
    assert (Attempt.of(tmp_path, 7).begun, Attempt.of(tmp_path, 7).failed) == (0, [[0, 4, 1, "why"]])
    note.end()
    note.end()
    assert attempts(tmp_path) == []


def test_a_note_of_another_job_is_none(tmp_path: Path) -> None:
    Attempt.of(tmp_path, 7, "one").begin()
    assert Attempt.of(tmp_path, 7, "other").begun == 0
    assert Attempt.of(tmp_path, 7, "one").begun == 1
    Attempt.of(tmp_path, 7, "one").excuse()
    assert Attempt.of(tmp_path, 7, "one").runs == 1
    Attempt.of(tmp_path, 7, "other").excuse()
    assert attempts(tmp_path) == []


def test_an_attempt_that_we_ended_blames_no_image(tmp_path: Path) -> None:
    note = Attempt.of(tmp_path, 7)
    note.begin()
    note.begin_piece(1, 2)
    Attempt.of(tmp_path, 7, died=False).withdraw()
    assert attempts(tmp_path) == []


@pytest.mark.parametrize(
    "damaged",
    [
        b"", b"{", b"\xff\x00", b"[]", b"null", b"[" * 100_000, b'{"begun": 1}',
        b'{"begun": Infinity, "under_way": null, "failed": [], "limit": null, "runs": 0}',
        b'{"begun": 1, "under_way": [1], "failed": [], "limit": null, "runs": 0}',
        b'{"begun": 1, "under_way": null, "failed": [3], "limit": null, "runs": 0}',
        b'{"begun": 1, "under_way": null, "failed": [[0, 4]], "limit": null, "runs": 0}',
        b'{"begun": 1, "under_way": null, "failed": [], "limit": "long", "runs": 0}',
    ],
)  # fmt: skip
def test_a_damaged_note_is_a_new_one(tmp_path: Path, damaged: bytes) -> None:
    (tmp_path / ".attempt-00003.json").write_bytes(damaged)
    note = Attempt.of(tmp_path, 3)
    assert note == Attempt(tmp_path / ".attempt-00003.json", 3)
    note.begin()
    assert Attempt.of(tmp_path, 3).begun == 1


def test_a_death_in_a_piece_is_noted_by_the_next_reader(tmp_path: Path) -> None:
    def die(start: int, stop: int) -> Attempt:
        Attempt.of(tmp_path, 0).begin_piece(start, stop)
        return Attempt.of(tmp_path, 0)

    note = die(0, 2)
    assert note.failed == [[0, 2, 1, DIED]]
    assert Attempt.of(tmp_path, 0).failed == note.failed, "once, however often it is read"
    assert note.why_not(0, 2) == DIED
    assert note.why_not(0, 1) is None
    # A single kill may have another cause.
    assert die(1, 2).why_not(1, 2) is None
    assert die(1, 2).why_not(1, 2) == DIED
    note.fail(0, 1, "it raises")
    assert note.why_not(0, 1) == "it raises"
    note.begin_piece(2, 3)
    note.end_piece()
    assert len(Attempt.of(tmp_path, 0).failed) == len(note.failed)


def whole_runs_that_die(made: Runtime, out: Path, most: int) -> int:
    """The number of whole runs, at most `most`, that die at the white picture before one completes."""

    def dies(images: torch.Tensor) -> bool:
        return any_white(images) and os.kill(os.getpid(), signal.SIGKILL) is None

    for number in range(most):
        if (child := os.fork()) == 0:
            run(raising(made, dies, AssertionError()), out)
            os._exit(0)
        if (code := os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])) == 0:
            return number
        assert code == -signal.SIGKILL
    return most


def test_kills_of_whole_runs_blame_no_image(made: Runtime, whole: Callable[[int], Path], tmp_path: Path) -> None:
    """Every kill is at the same image, as with a scheduler that ends every run after the same time."""
    assert whole_runs_that_die(made, tmp_path, 9) == 9
    known = Attempt.of(tmp_path, BAD // 4, Job(tmp_path).identity)
    assert (known.begun, known.runs) == (9, 8)
    run(made, tmp_path)
    assert files(tmp_path) == files(whole(4))


def test_an_image_at_which_whole_runs_die_again_and_again_costs_its_row(
    made: Runtime, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    assert 9 < whole_runs_that_die(made, tmp_path, 25) < 25
    assert only_the_bad_row_differs(tmp_path, whole(4)) == DIED
    assert attempts(tmp_path) == []


@pytest.fixture
def hung(monkeypatch: pytest.MonkeyPatch) -> Callable[[Watch, float, Attempt], bool]:
    """A function that returns True if a watch reports a section of `seconds` as hung. Ticks are short."""
    monkeypatch.setattr("attnx.jobs.watch._TICK", 0.01)

    def takes(watch: Watch, seconds: float, attempt: Attempt) -> bool:
        found.clear()
        with watch.section(attempt, 0, 4):
            return found.wait(seconds)

    return takes


found = threading.Event()


def hang(where: Hang) -> None:
    assert (where.start, where.stop) == (0, 4)
    found.set()


def test_a_section_that_takes_longer_than_its_limit_hangs(
    hung: Callable[[Watch, float, Attempt], bool], tmp_path: Path
) -> None:
    with Watch(0.3, hang) as watch:
        assert not hung(watch, 0.01, Attempt(tmp_path))
        assert hung(watch, 20, Attempt(tmp_path))


def test_without_a_limit_sections_before_and_the_note_say_what_is_long(
    hung: Callable[[Watch, float, Attempt], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_FIRST", 0.3), ("_TIMES", 5.0)):
        monkeypatch.setattr(f"attnx.jobs.watch.{name}", value)
    note = Attempt(tmp_path / "note")

    def limit(earlier: float | None = None, first: float = 0.0) -> float:
        """The limit that is reported for a hung section after a section of `earlier` seconds."""
        limits: list[float] = []

        def hang(where: Hang) -> None:
            limits.append(where.limit)
            found.set()

        with Watch(None, hang, least=0.2, first=first) as watch:
            if earlier is not None:
                assert not hung(watch, earlier, note)
            assert hung(watch, 20, note)
        return limits[0]

    assert limit() == 0.3
    assert limit(first=0.4) == 0.4
    note.limit = 0.5
    assert limit() == 0.5
    assert limit(earlier=0.0, first=10.0) == 0.2
    assert 0.5 <= limit(earlier=0.1, first=10.0) < 10


def test_a_process_that_was_stopped_is_not_blamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances an hour between readings, and only a second of it counts."""
    hours = itertools.count(step=3600.0)
    clock = SimpleNamespace(monotonic=lambda: next(hours), perf_counter=time.perf_counter)
    monkeypatch.setattr("attnx.jobs.watch.time", clock)
    monkeypatch.setattr("attnx.jobs.watch._TICK", 0.01)
    found.clear()
    with Watch(1000.0, hang) as watch, watch.section(Attempt(tmp_path), 0, 4):
        assert not found.wait(0.5)
    assert next(hours) > 3600


def test_without_somebody_to_tell_nothing_is_watched(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    with Watch(0.001, None) as watch, watch.section(Attempt(tmp_path), 0, 4):
        assert "attnx-watch" not in {thread.name for thread in set(threading.enumerate()) - before}


def test_a_shard_at_which_the_model_fails_is_made_in_pieces_once() -> None:
    said: list[str] = []
    queue = Shards([5, 6], 2, said.append)
    assert [queue.take(), queue.take()] == [5, 6]
    queue.done()
    for in_pieces in (False, True):
        queue.failed(5, "why", model=True)
        assert queue.take() == 5
        assert queue.in_pieces(5) == in_pieces
    assert (queue.set_aside, queue.finished) == ({}, False)
    queue.failed(5, "why", model=True)
    assert (queue.take(), queue.set_aside, queue.finished) == (None, {5: "why"}, True)
    assert said == [
        "shard 5 failed and is tried again: why", "shard 5 failed and is made in pieces: why",
        "shard 5 is set aside after 3 tries: why",
    ]  # fmt: skip


def test_a_shard_that_kills_one_process_after_another_is_set_aside_at_last() -> None:
    queue = Shards([5, 6], 2, lambda text: None)
    queue.done()
    deaths = 0
    while not queue.set_aside:
        queue.failed(5, "died", died=True)
        deaths += 1
        assert deaths < 200
    assert deaths == 2 + 100
    assert (queue.set_aside, queue.finished) == ({5: "died"}, True)


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_a_model_that_raises_at_one_image_costs_its_row(
    made: Runtime, whole: Callable[[int], Path], tmp_path: Path, batch_size: int
) -> None:
    said: list[str] = []
    report = run(raising(made, any_white, IndexError("too\nlong")), tmp_path, batch_size, say=said.append)
    error = only_the_bad_row_differs(tmp_path, whole(batch_size))
    assert error.startswith("the model fails for this image: IndexError: too")
    assert (report.maps, report.errors, report.set_aside) == (39, 1, {})
    assert "shard 4 failed and is made in pieces" in said[-1]
    assert processes.stray(tmp_path) == []
    # Only its row is done again. Its map may be rounded differently in a batch with others.
    again = run(made, tmp_path, batch_size, retry_failed=True)
    assert (again.made, again.errors) == (1, 0)
    now, before = rows(tmp_path), rows(whole(batch_size))
    assert now[:BAD] + now[BAD + 1 :] == before[:BAD] + before[BAD + 1 :]


def test_a_model_whose_process_always_dies_ends_the_job() -> None:
    queue = Shards([5, 6], 2, lambda text: None)
    with pytest.raises(RunError, match="no shard was made: 17 processes died; the last: died"):
        for _ in range(100):
            queue.failed(queue.take(), "died", died=True)


@pytest.mark.parametrize("shard_size", [1, 4, 10])
def test_a_model_that_raises_at_every_image_ends_the_job(made: Runtime, tmp_path: Path, shard_size: int) -> None:
    broken = raising(made, lambda images: True, IndexError("always"))
    with pytest.raises(RunError, match=r"the model fails for every image; the last error: .*IndexError: always"):
        run(broken, tmp_path, shard_size=shard_size)
    # With one image per shard, two shards are needed to tell the model's fault from the image's.
    assert len(shards(tmp_path)) == (shard_size == 1)
    again = run(made, tmp_path, shard_size=shard_size, retry_failed=True)
    assert (again.maps, again.errors) == (40, 0)


def test_bad_images_in_the_first_shards_cost_their_rows(made: Runtime, tmp_path: Path) -> None:
    """The bad images come before any shard is made, and there are more of them than tries."""
    whole = tmp_path / "whole"
    run(made, whole, 4)
    bad = {0, 5, 9, 14}
    seen = dict(enumerate(images_of(made)))

    def any_bad(images: torch.Tensor) -> bool:
        return any(torch.equal(image, seen[i]) for image in images for i in bad)

    report = run(raising(made, any_bad, IndexError("why")), tmp_path / "out", 4)
    assert (report.errors, report.set_aside) == (len(bad), {})
    now, before = rows(tmp_path / "out"), rows(whole)
    assert {i for i in range(40) if now[i] != before[i]} == bad


def test_tries_are_counted_across_runs_but_for_those_that_were_interrupted(
    made: Runtime, whole: Callable[[int], Path], tmp_path: Path
) -> None:
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(raising(made, any_white, KeyboardInterrupt()), tmp_path)
        assert attempts(tmp_path) == []
    stopped = raising(made, any_white, OSError(28, "No space left on device"))
    with pytest.raises(OSError, match="No space"):
        run(stopped, tmp_path)
    assert attempts(tmp_path) == []
    # The state after a killed process, which may have written the shard.
    job = Job(tmp_path)
    job.attempt(0).begin()
    for _ in range(3):
        job.attempt(4).begin()
    said: list[str] = []
    run(raising(made, any_white, IndexError("why")), tmp_path, say=said.append)
    assert said == [], "it is made in pieces at once"
    assert "IndexError: why" in only_the_bad_row_differs(tmp_path, whole(4))
    assert attempts(tmp_path) == []


POISON = """
import importlib.abc, importlib.util, os, signal, sys, time

def poisoned(start):
    def run(self, images, groups):
        if (images.std(dim=(2, 3)).sum(1) < 1e-6).any():
            how = os.environ["POISON"]
            if how == "raise":
                raise IndexError("poison\\nand more")
            if how == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "deaf":
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                print("deaf", file=sys.stderr, flush=True)
            time.sleep(10**6)
        return start(self, images, groups)
    return run

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "attnx.jobs.tasks":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            module.ImageTask.start = poisoned(module.ImageTask.start)
        spec.loader.exec_module = exec_module
        return spec

sys.meta_path.insert(0, Finder())
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a sitecustomize.py that makes the model fail at a white picture."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(POISON)
    return tmp_path / "site"


def poison(how: str, name: str, options: tuple[str, ...], batch: int, slow: bool = True) -> object:
    marks = (pytest.mark.slow, pytest.mark.timeout(600)) if slow else pytest.mark.long
    return pytest.param(how, options, batch, id=f"{how}-{name}-{batch}", marks=marks)


@pytest.mark.parametrize(
    ("how", "options", "batch"),
    [
        poison("die", "local1", LOCAL1, 1, slow=False),
        poison("hang", "local2", LOCAL2, 1),
        *(
            poison(how, name, options, 4)
            for how in ("raise", "die", "hang")
            for name, options in (("local1", LOCAL1), ("local2", LOCAL2), ("ray", RAY))
        ),
    ],
)
def test_an_image_that_the_model_does_not_survive_costs_its_row(
    made: Runtime, whole: Callable[[int], Path], site: Path, temporary: Path, tmp_path: Path, how: str,
    options: tuple[str, ...], batch: int,
) -> None:  # fmt: skip
    if "ray" in options and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    env, out = processes.marked(temporary, site, POISON=how), tmp_path / "out"
    more = ("--batch-size", str(batch), "--tries", "1", *(("--shard-timeout", "3") if how == "hang" else ()))
    with processes.start(Path(made.recipe.source), out, *options, *more, env=env) as process:
        _, told = process.communicate(timeout=550)
    assert process.returncode == 1, told
    assert "Traceback" not in told
    error = only_the_bad_row_differs(out, whole(batch))
    assert error.startswith(
        {
            "raise": "the model fails for this image: IndexError: poison",
            "die": DIED,
            "hang": "the model took longer than 3 s",
        }[how]
    )
    assert processes.stray(out) == []
    assert processes.left(30, temporary.name) == []
    assert list(temporary.iterdir()) == []


def test_the_temporary_files_of_a_run_that_was_killed_are_removed_by_the_next(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The files of a run that is still active stay."""
    script = "import time; from attnx.supervisor import temporary_folder as t\nwith t() as f: print(f); time.sleep(600)"
    env = processes.marked(temporary, PYTHONUNBUFFERED="1")
    with (
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) as killed,
        subprocess.Popen([sys.executable, "-c", script], env=env, stdout=subprocess.PIPE, text=True) as under_way,
    ):
        assert killed.stdout is not None
        assert under_way.stdout is not None
        left, used = Path(killed.stdout.readline().strip()), Path(under_way.stdout.readline().strip())
        (left / "deep").mkdir()
        (left / "deep" / "file").touch()
        killed.kill()
        killed.wait()
        assert {left, used} == set(temporary.iterdir())
        monkeypatch.setenv("TMPDIR", str(temporary))
        monkeypatch.setattr(tempfile, "tempdir", None)
        with temporary_folder() as own:
            assert {own, used} == set(temporary.iterdir())
            assert tempfile.gettempdir() == str(own)
        assert {used} == set(temporary.iterdir())
        under_way.kill()


def wait_for_a_shard(process: subprocess.Popen, out: Path) -> None:
    while not out.exists() or not shards(out):
        assert process.poll() is None
        time.sleep(0.01)


@pytest.mark.long
def test_a_run_that_is_killed_or_told_to_end_leaves_nothing(temporary: Path, tmp_path: Path) -> None:
    """The run gets SIGKILL in all processes (the next run cleans up) or SIGTERM in its first process.

    The kill leaves the notes of the shards that were under way: one being made, and maybe one being written. They stay
    until these shards are made, so SIGTERM is sent after that.
    """
    pictures, out, env = draw(tmp_path / "pictures", 400), tmp_path / "out", processes.marked(temporary)
    options = (*LOCAL1, "--batch-size", "1")
    with processes.start(pictures, out, *options, env=env) as process:
        wait_for_a_shard(process, out)
        os.killpg(process.pid, signal.SIGKILL)
    assert [path.name.startswith("attnx-run-") for path in temporary.iterdir()] == [True]
    assert processes.left(30, temporary.name) == []
    before, under_way = len(shards(out)), [out / part_name(shard) for shard in noted(out)]
    with processes.start(pictures, out, *options, env=env) as process:
        while len(shards(out)) == before or not all(part.exists() for part in under_way):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 143, told
    assert told.count("ended by SIGTERM") == 1
    assert "Traceback" not in told
    assert before < len(shards(out)) < 100
    assert processes.stray(out) == []
    assert processes.left(30, temporary.name) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.long
def test_a_second_interrupt_ends_what_does_not_obey_the_first(
    made: Runtime, site: Path, temporary: Path, tmp_path: Path
) -> None:
    env, out = processes.marked(temporary, site, POISON="deaf"), tmp_path / "out"
    with processes.start(Path(made.recipe.source), out, *LOCAL1, env=env) as process:
        assert process.stderr is not None
        while (line := process.stderr.readline()) != "deaf\n":
            assert line, "it ended"
        process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(3)
        process.send_signal(signal.SIGINT)
        process.wait(60)
    assert process.returncode == 130
    assert processes.left(30, temporary.name) == []
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("engine", "kills"), [("local1", 90), ("local2", 50), ("ranks", 50), ("ray", 10)])
def test_two_hundred_kills_lose_nothing_and_leave_nobody(
    made: Runtime, whole: Callable[[int], Path], temporary: Path, tmp_path: Path, engine: str, kills: int
) -> None:
    """Kills are at random moments: all processes of a run, the first one, or a descendant."""
    if engine == "ray" and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed")
    script = str(Path(__file__).with_name("kill_jobs.py"))
    command = [sys.executable, script, made.recipe.source, str(whole(4)), str(tmp_path), engine, str(kills)]
    env = processes.marked(temporary)
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=3500, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 2, "kills must fall everywhere, at the beginning of a job too"
    for out in tmp_path.iterdir():
        assert not out.is_dir() or files(out) == files(whole(4)), out
