"""The engine that makes shards with one process per device on this machine.

`python -m attnx.jobs.engines.local` is such a process. It reads shard numbers from its standard input, one per line,
and writes its answers as lines of JSON. It has three shards at a time: one is being written, one is being made, and
the first pictures of one are being decoded.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from attnx.jobs.engines.queue import RunError, Shards, by_the_model, is_fatal, why_of
from attnx.jobs.job import Job
from attnx.jobs.memory import usable_cores
from attnx.jobs.options import RunOptions
from attnx.jobs.worker import ShardResult, Stages
from attnx.messages import say, warnings_in_lines
from attnx.supervisor import ENDING, die_with

__all__ = ["run_on_devices"]

_AT_A_TIME = 3
_END = "end"
_GRACE = 5.0  # seconds for processes to exit by themselves
_Events: TypeAlias = "queue.Queue[tuple[_Process, dict[str, Any]]]"


def run_on_devices(
    job: Job,
    devices: Sequence[str],
    shards: Shards,
    options: RunOptions,
    advance: Callable[[ShardResult], None],
) -> Stages:
    """Make the shards with a process per device, and return the total time per stage.

    The CPU cores are divided among the processes. If a process dies, its shard is tried again.

    Args:
        devices: such as "cuda:0"; a device may be repeated.

    Raises:
        RunError: see `Shards.failed`.
    """
    cores = max(1, usable_cores() // len(devices))
    options = replace(options, workers=cores if options.workers is None else options.workers)
    stages = Stages()
    events: _Events = queue.Queue()
    processes: list[_Process] = []
    try:
        for device in devices:
            processes.append(_Process(job, device, options, cores, events))
        while not shards.finished:
            _hand_out([process for process in processes if process.ready], shards)
            process, answer = events.get()
            if "made" in answer:
                process.made(ShardResult(*answer["made"]), Stages(**answer["stages"]))
                shards.done()
                advance(ShardResult(*answer["made"]))
            elif "begun" in answer:
                process.begin(answer["begun"])
            elif process in processes:
                processes.remove(process)
                stages += process.stages
                processes += _replacement(process, answer, shards, len(processes))
        return sum((process.stages for process in processes), stages)
    finally:
        for process in processes:
            process.dismiss()
        for process in processes:
            process.end()
            for shard in process.begun:
                job.attempt(shard, died=False).withdraw()


def _replacement(process: _Process, answer: dict[str, Any], shards: Shards, others: int) -> list[_Process]:
    """A new process for the device of a process that ended; an empty list if the device failed too often."""
    why = answer.get("failed") or process.end()
    process.end()
    if "fatal" in answer:
        # The process has already withdrawn the attempt that failed.
        for shard in process.begun - {answer.get("shard")}:
            process.job.attempt(shard, died=False).withdraw()
        raise RunError(why) if answer["fatal"] is None else OSError(answer["fatal"], why)
    blamed = answer.get("shard", process.making)
    shards.give_back([shard for shard in process.queue if shard != blamed])
    # A shard that is made in pieces is expected to end processes, so the device is not to blame.
    failures = process.failures + (blamed is None or not shards.in_pieces(blamed))
    if blamed is not None:
        shards.failed(
            blamed, why, died="failed" not in answer or answer.get("hangs", False), model=answer.get("model", False)
        )
    if failures < shards.tries:
        return [process.again(failures)]
    if not others and not shards.finished:
        raise RunError(f"no device is left: {process.device} failed {shards.tries} times in a row; the last: {why}")
    shards.say(f"{process.device} is not used any more after {shards.tries} failures in a row: {why}")
    return []


def _hand_out(processes: list[_Process], shards: Shards) -> None:
    """Give shards to the processes, always to the one with the fewest."""
    while processes:
        process = min(processes, key=lambda each: len(each.queue))
        if len(process.queue) == _AT_A_TIME or (shard := shards.take()) is None:
            return
        process.submit(shard)


@dataclass(eq=False)
class _Process:
    """A process for a device.

    Attributes:
        failures: number of earlier processes in a row that ended on this device without a shard.
        ready: True when the model is loaded.
        making: the shard that it is making.
        begun: the shards that it has started and not written.
        queue: the shards that were sent to it and not written.
        stages: time of each stage.
        patience: seconds in which it may exit by itself.
    """

    job: Job
    device: str
    options: RunOptions
    cores: int
    events: _Events
    failures: int = 0
    ready: bool = False
    making: int | None = None
    begun: set[int] = field(default_factory=set)
    queue: deque[int] = field(default_factory=deque)
    stages: Stages = field(default_factory=Stages)
    patience: float = 0.0

    def __post_init__(self) -> None:
        lock = () if self.job.lock is None else (self.job.lock.descriptor,)
        arguments = [str(self.job.out.absolute()), self.device, json.dumps(asdict(self.options))]
        threads = {"OMP_NUM_THREADS": str(self.cores), "MKL_NUM_THREADS": str(self.cores)}
        # The process inherits the lock, so no other run can write before all processes have ended.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=lock, env=os.environ | threads,
        )  # fmt: skip
        threading.Thread(target=self._read_answers, daemon=True).start()

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as answers:
            for line in answers:
                # A killed process may leave an incomplete line.
                if line.endswith(b"\n"):
                    self.events.put((self, json.loads(line)))
        self.events.put((self, {}))

    def begin(self, shard: int | None) -> None:
        """Record that it started a shard; None: it is ready for the first one."""
        self.ready, self.making = True, shard
        if shard is not None:
            self.begun.add(shard)

    def made(self, made: ShardResult, stages: Stages) -> None:
        """Record that it wrote a shard."""
        self.queue.remove(made.shard)
        self.begun.discard(made.shard)
        self.making = None if self.making == made.shard else self.making
        self.stages, self.failures = stages, 0

    def again(self, failures: int) -> _Process:
        """A new process for the same device."""
        return _Process(self.job, self.device, self.options, self.cores, self.events, failures)

    def submit(self, shard: int) -> None:
        """Send a shard to the process."""
        self.queue.append(shard)
        self._write(str(shard))

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        # A process that ended is handled when its answers end.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()

    def dismiss(self) -> None:
        """Let an idle process clean up and exit by itself."""
        if self.ready and not self.queue:
            self._write(_END)
            self.patience = _GRACE

    def end(self) -> str:
        """End the process, and return a description of how it ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(self.patience)
        if self._process.poll() is None:
            self._process.kill()
        code = self._process.wait()
        return f"its process ended with {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"


def main(out: str, device: str, options: str) -> None:
    """The main function of a process of this engine."""
    # The parent handles signals, also those that a scheduler sends to all processes.
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    die_with(os.getppid())
    # Other output goes to the standard error.
    answers = os.dup(1)
    os.dup2(2, 1)
    requests: queue.Queue[int | None] = queue.Queue()
    threading.Thread(target=_read_requests, args=(requests,), daemon=True).start()

    def answer(shard: int, future: Future[ShardResult]) -> None:
        error = future.exception()
        if error is None:
            _answer(answers, made=future.result(), stages=vars(worker.stages))
        else:
            _fail(answers, error, shard)

    def hangs(why: str, which: int) -> None:
        say(f"{device}: {why}")
        _fail(answers, TimeoutError(why), which, hangs=True)

    shard: int | None = None
    try:
        import torch

        from attnx.jobs.recipe import recipe_of

        job = Job(Path(out))
        runtime = recipe_of(job.run["recipe"]).load(torch.device(device))
        job.check_settings(runtime.settings)
        with runtime.worker(job, RunOptions(**json.loads(options)), say, hangs) as worker:
            following: int | None = None
            # None: ready for the first shard.
            _answer(answers, begun=None)
            while True:
                shard = requests.get() if following is None else following
                if shard is None:
                    return
                following = requests.get_nowait() if not requests.empty() else None
                _answer(answers, begun=shard)
                worker.run_shard(shard, following).add_done_callback(functools.partial(answer, shard))
    except Exception as error:
        _fail(answers, error, shard)


def _read_requests(requests: queue.Queue[int | None]) -> None:
    for line in sys.stdin:
        requests.put(None if line.strip() == _END else int(line))
    # The parent has ended.
    os._exit(1)


def _answer(answers: int, **fields: Any) -> None:
    """Write an answer. One short write to a pipe is atomic, so two threads can answer."""
    os.write(answers, json.dumps(fields).encode() + b"\n")


def _fail(answers: int, error: BaseException, shard: int | None, hangs: bool = False) -> None:
    """Send an error and its shard, and exit at once. Unfinished files are temporary files."""
    fatal = {"fatal": getattr(error, "errno", None)} if is_fatal(error) else {}
    own = {} if shard is None else {"shard": shard, "hangs": hangs, "model": by_the_model(error)}
    _answer(answers, failed=why_of(error)[:500], **own, **fatal)
    os._exit(1)


if __name__ == "__main__":
    with warnings_in_lines():
        main(*sys.argv[1:])
