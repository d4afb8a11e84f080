"""Timing: contestant and floor run alternately in the same process.

The ratio is the contestant's median over the median of the floor that ran between its rounds, so changes of the
machine's speed affect both. The ratio of the floor to itself shows the noise.

On a GPU an attention call takes less time than its launch from Python. Its calls are therefore recorded in a CUDA
graph, over several input sets that together exceed the L2 cache. One round is one replay between two CUDA events, so
launches don't count. A contestant that can't be recorded is not run. Models are timed by wall clock, from an idle
device to an idle device.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.op import NotRun

Seconds = Callable[[], float]

ROUND = 2e-3  # minimum seconds of a round on a GPU, far above the resolution of events


class Clock:
    """A timer for pytest-benchmark that advances only by the measured seconds."""

    __name__ = "attnx_clock"
    now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def wall_timer(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]], grad: bool = False) -> Seconds:
    """A function that runs `call` on the next input set and returns its seconds. grad: not in inference mode."""
    turn = itertools.cycle(sets)

    def once() -> float:
        args = next(turn)
        with torch.inference_mode(not grad):
            synchronize()
            start = time.perf_counter()
            result = call(*args)  # noqa: F841  do not time the deallocation
            synchronize()
            return time.perf_counter() - start

    return once


def synchronize() -> None:
    """Wait for the GPU, if this process uses one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def graph_timer(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]) -> Seconds:
    """A function that returns the seconds of one call on the GPU, from a CUDA graph with a whole round of calls.

    Raises:
        NotRun: the call can't be recorded.
    """
    with torch.inference_mode():
        call(*sets[0])  # compile first
        turns = whole_turns(len(sets), _between_events(lambda: call(*sets[0])))

        def calls() -> None:
            for i in range(turns):
                call(*sets[i % len(sets)])

        calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # A failed capture may leave its own stream as the current one, so the outer context restores it.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                calls()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            torch.cuda.synchronize()
            raise NotRun(f"CUDA graph: {first_line(error)}") from error
    return lambda: _between_events(graph.replay) / turns


def whole_turns(sets: int, seconds: float) -> int:
    """Number of calls in a round: every input set equally often, for at least about `ROUND` seconds."""
    return sets * max(1, min(-(-100 // sets), round(ROUND / (seconds * sets))))


def _between_events(run: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def race(
    contestant: Seconds, floor: Seconds, seconds: float = 6.0, quick: bool = False, benchmark: Any = None
) -> dict[str, float]:
    """Times of the contestant and the floor, which run alternately 5 (slow ones 3) to 30 times within `seconds`.

    `benchmark`, the fixture of pytest-benchmark, shows the contestant's rounds. All times are milliseconds per call.
    """
    pair = _warm_up(contestant, floor, 0.0 if quick else 0.2)
    rounds = 2 if quick else max(5 if pair < 0.5 or seconds > 5 else 3, min(30, int(seconds / pair)))
    floors: list[float] = []
    times: list[float] = []

    def run_floor() -> None:
        floors.append(1e3 * floor())

    def run_contestant() -> None:
        times.append(1e3 * contestant())
        CLOCK.now += times[-1] / 1e3

    if benchmark is not None:
        benchmark.pedantic(run_contestant, setup=run_floor, rounds=rounds)
    else:
        for _ in range(rounds):
            run_floor()
            run_contestant()
    return {
        "median_ms": median(times), "min_ms": min(times), "max_ms": max(times), "iqr_ms": _quartile_range(times),
        "rounds": len(times), "floor_ms": median(floors), "floor_iqr_ms": _quartile_range(floors),
        "ratio_to_floor": median(times) / median(floors),
    }  # fmt: skip


def try_to(measure: Callable[[], dict[str, Any]]) -> dict[str, Any] | str:
    """The measurement, or the reason why there is none: out of memory or `NotRun`.

    The exception is not returned, because its traceback keeps tensors alive.
    """
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return f"out of memory: {first_line(error)}"
    except NotRun as error:
        return str(error)


def first_line(error: BaseException) -> str:
    """The first line of the message, at most 300 characters."""
    return (str(error).strip().splitlines() or [""])[0][:300]


def _quartile_range(values: list[float]) -> float:
    low, high = sorted(values)[len(values) // 4], sorted(values)[-1 - len(values) // 4]
    return high - low


def _warm_up(contestant: Seconds, floor: Seconds, seconds: float) -> float:
    """Run both for `seconds`, at least twice unless it is 0, and return the wall seconds of the last pair."""
    start = time.perf_counter()
    for i in itertools.count(1):
        before = time.perf_counter()
        contestant()
        floor()
        now = time.perf_counter()
        if now - start >= seconds and (i > 1 or seconds == 0 or now - start > 2):
            return now - before
    raise AssertionError("unreachable")
