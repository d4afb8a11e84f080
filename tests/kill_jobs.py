"""Kill a job at random moments and resume it until it is done, then start another, until KILLS kills were sent.

`python kill_jobs.py SOURCE WHOLE FOLDER ENGINE KILLS`. Everything is imported once and every run is forked from this
process, so that more kills happen while shards are made. WHOLE is the expected result. Prints the number of jobs done.
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
ENDED = (0, 2, -signal.SIGKILL)  # 2: an engine gave up, because its child processes are killed, too


def start(source: Path, out: Path, options: list[str]) -> int:
    """Fork a run as the first process of a new session."""
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
    """Kill a whole session, its first process, or a descendant of that process."""
    target = choose.choice(runs)
    how = choose.choice(["session", "first", "below"])
    below = processes.below(target)
    try:
        if how == "session":
            os.killpg(target, signal.SIGKILL)
        else:
            os.kill(choose.choice(below) if below and how == "below" else target, signal.SIGKILL)
    except ProcessLookupError:
        # The process has no session yet, or it has just ended.
        if how == "session":
            os.kill(target, signal.SIGKILL)


def reap(runs: list[int], patience: float) -> list[int]:
    """The runs that still run after `patience` seconds. The others must have ended with an exit code in ENDED."""
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
    """Run the job to its end without kills, and return the seconds that it took."""
    begin = time.perf_counter()
    left = reap([start(source, out, options) for options in ENGINES[engine]], 400)
    assert not left, "a run that nobody disturbs does not end"
    assert processes.files(out) == processes.files(whole), out
    return time.perf_counter() - begin


def run(source: Path, whole: Path, folder: Path, engine: str, kills: int) -> int:
    # Loading is slow the first time, so it is done before the runs are forked.
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
