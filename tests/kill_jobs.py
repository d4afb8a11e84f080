"""Kills a job at random moments, goes on with it until it is done, and begins another, until it was killed so often.

`python kill_jobs.py SOURCE WHOLE FOLDER ENGINE KILLS`. Everything is imported once, and every run is forked from here,
so that more kills come while shards are made. WHOLE: the job as it should be. Prints how many jobs were done.
"""

import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import processes
from small_job import tools

from attnx.cli.main import main

ENGINES = {
    "local1": [["--device", "cpu"]],
    "local2": [["--device", "cpu,cpu"]],
    "ranks": [["--device", "cpu", "--engine", "ranks", "--rank", f"{rank}", "--world", "2"] for rank in range(2)],
    "ray": [["--device", "cpu", "--engine", "ray", "--actors", "2", "--actor-cpus", "1"]],
}
ENDED = (0, 2, -signal.SIGKILL)  # 2: an engine gave up, since what it starts is killed, too


def start(source: Path, out: Path, options: list[str]) -> int:
    """Forks a run, which is the first process of a session."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with (out.parent / "told").open("ab") as told:
        os.dup2(told.fileno(), 1)
        os.dup2(told.fileno(), 2)
    sys.argv = ["attnx", "extract", str(source), "--out", str(out), *processes.COMMON, *options]
    main()
    raise SystemExit


def kill(runs: list[int], choose: random.Random) -> None:
    """A session, only its first process, or one below that."""
    target = choose.choice(runs)
    how = choose.choice(["session", "first", "below"])
    below = processes.below(target)
    try:
        if how == "session":
            os.killpg(target, signal.SIGKILL)
        else:
            os.kill(choose.choice(below) if below and how == "below" else target, signal.SIGKILL)
    except ProcessLookupError:
        # Not yet a session of its own, or just gone.
        if how == "session":
            os.kill(target, signal.SIGKILL)


def reap(runs: list[int], patience: float) -> list[int]:
    """The runs that go on after so many seconds; those that ended must have ended in a way that can be expected."""
    until = time.monotonic() + patience
    while True:
        for run in list(runs):
            done, status = os.waitpid(run, os.WNOHANG)
            if done:
                assert os.waitstatus_to_exitcode(status) in ENDED, os.waitstatus_to_exitcode(status)
                runs.remove(run)
        if not runs or time.monotonic() >= until:
            return runs
        time.sleep(0.01)


def all_done(out: Path, whole: Path) -> bool:
    names = {path.name for path in whole.glob("part-*")}
    return names == {path.name for path in out.glob("part-*")}


def finish(source: Path, out: Path, whole: Path, engine: str) -> float:
    """Goes on until the job is done, undisturbed; in seconds."""
    begin = time.perf_counter()
    left = reap([start(source, out, options) for options in ENGINES[engine]], 400)
    assert not left, "a run that nobody disturbs does not end"
    assert processes.files(out) == processes.files(whole), out
    return time.perf_counter() - begin


def run(source: Path, whole: Path, folder: Path, engine: str, kills: int) -> int:
    # What is slow the first time is done here.
    tools(source)
    temporary = Path(tempfile.mkdtemp(prefix="kills-"))
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None
    seconds = min(finish(source, folder / name, whole, engine) for name in ("first", "second"))
    choose = random.Random(1)
    killed, jobs = 0, 0
    runs: list[int] = []
    while killed < kills:
        out = folder / str(jobs)
        if not runs:
            runs = [start(source, out, options) for options in ENGINES[engine]]
        runs = reap(runs, choose.uniform(0, seconds))
        if runs:
            kill(runs, choose)
            killed += 1
            print(f"{engine}: kill {killed}, job {jobs}", file=sys.stderr, flush=True)
            runs = reap(runs, 0.2)
        if not runs and all_done(out, whole):
            finish(source, out, whole, engine)
            jobs += 1
    for each in runs:
        os.killpg(each, signal.SIGKILL)
    reap(runs, 30)
    assert not processes.left(30), processes.left(0)
    told = time.time()
    finish(source, folder / str(jobs), whole, engine)
    assert not processes.left(30), processes.left(0)
    assert not (left := [(path, path.stat().st_mtime) for path in temporary.rglob("*")]), (left, time.time(), told)
    return jobs + 1


if __name__ == "__main__":
    source, whole, folder = map(Path, sys.argv[1:4])
    print(run(source, whole, folder, sys.argv[4], int(sys.argv[5])))
