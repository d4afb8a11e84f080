"""How things are timed: contestant and floor in turn, one after the other, in the same process.

A ratio is the contestant's median over the median of the floor that ran between its rounds, so a machine that slows
down, or a neighbour that comes and goes, slows both. The floor against itself gives the spread.

On a GPU an attention call takes less time than Python needs to launch it. Its calls are therefore recorded in a CUDA
graph, over several input sets that together are larger than the L2 cache, and one round is one replay between two
CUDA events: what the kernels take, without launches. Where a contestant can't be recorded, neither is its floor: both
are timed with their launches. Models are timed as their users call them: wall clock, from an idle device to an idle
device.
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

ROUND = 2e-3  # seconds that a round on a GPU takes at least, beside which the events' own resolution is nothing


class Clock:
    """A timer for pytest-benchmark that stands still, except that measured work adds what it took."""

    __name__ = "attnx_clock"

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


CLOCK = Clock()


def wall_timer(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]) -> Seconds:
    """A function that runs `call` on the next of the input sets and gives the seconds it took."""
    turn = itertools.cycle(sets)
    synchronize = torch.cuda.synchronize if sets[0][0].is_cuda else lambda: None

    def once() -> float:
        args = next(turn)
        with torch.inference_mode():
            synchronize()
            start = time.perf_counter()
            result = call(*args)  # noqa: F841  freeing it is not timed
            synchronize()
            return time.perf_counter() - start

    return once


def graph_timer(
    call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]], record: bool = True
) -> tuple[Seconds, str]:
    """A function that gives the seconds of one call on the GPU, and how it is measured: "graph" or "stream".

    "stream" is for a call that can't be recorded, or is not to be: the same calls are launched one by one between the
    events.
    """
    with torch.inference_mode():
        call(*sets[0])  # compiles what is to be compiled
        one = _between_events(lambda: call(*sets[0]))
    turns = whole_turns(len(sets), one)

    def calls() -> None:
        for i in range(turns):
            call(*sets[i % len(sets)])

    run, how = _recorded(calls) if record else (calls, "stream")

    def once() -> float:
        with torch.inference_mode():
            return _between_events(run) / turns

    return once, how


def whole_turns(sets: int, seconds: float) -> int:
    """How many calls make a round: every input set equally often, until `ROUND` is filled."""
    return sets * max(1, min(-(-100 // sets), round(ROUND / (seconds * sets))))


def _recorded(calls: Callable[[], None]) -> tuple[Callable[[], None], str]:
    """The calls as a CUDA graph's replay; the calls themselves where they can't be recorded."""
    with torch.inference_mode():
        calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            # A capture that fails may leave its own stream the current one: the outer context sets it back.
            with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
                calls()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            torch.cuda.synchronize()
            return calls, "stream"
    return graph.replay, "graph"


def _between_events(run: Callable[[], Any]) -> float:
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def race(
    benchmark: Any, contestant: Seconds, floor: Seconds, seconds: float = 6.0, quick: bool = False
) -> dict[str, float]:
    """Runs floor and contestant in turn, 5 (slow ones 3) to 30 times as `seconds` allow; the row's times.

    pytest-benchmark counts the contestant's rounds. median, min, max, iqr of a call and the floor's median and iqr are
    in milliseconds.
    """
    pair = _warm_up(contestant, floor, 0.0 if quick else 0.2)
    rounds = 2 if quick else max(5 if pair < 0.5 or seconds > 5 else 3, min(30, int(seconds / pair)))
    floors: list[float] = []

    def target() -> None:
        CLOCK.now += contestant()

    benchmark.pedantic(target, setup=lambda: floors.append(floor()), rounds=rounds)
    stats = benchmark.stats.stats
    times = {f"{name}_ms": 1e3 * getattr(stats, name) for name in ("median", "min", "max", "iqr")}
    return {
        **times,
        "rounds": rounds,
        "floor_ms": 1e3 * median(floors),
        "floor_iqr_ms": 1e3 * _quartile_range(floors),
        "ratio_to_floor": stats.median / median(floors),
    }


def try_to(measure: Callable[[], dict[str, Any]], foreign: bool = False) -> dict[str, Any] | str:
    """What it measured; or why it can't: no memory, `NotRun`, and of a foreign contestant whatever it raises.

    The error itself is let go of: its traceback would hold on to the tensors that did not fit.
    """
    try:
        return measure()
    except torch.OutOfMemoryError as error:
        return f"out of memory: {_first_line(error)}"
    except NotRun as error:
        return str(error)
    except Exception as error:
        if not foreign:
            raise
        return f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [""])[0][:300]


def _quartile_range(values: list[float]) -> float:
    low, high = sorted(values)[len(values) // 4], sorted(values)[-1 - len(values) // 4]
    return high - low


def _warm_up(contestant: Seconds, floor: Seconds, seconds: float) -> float:
    """Runs both until `seconds` have passed, at least twice unless that is 0; the wall seconds a last pair took."""
    start = time.perf_counter()
    for i in itertools.count(1):
        before = time.perf_counter()
        contestant()
        floor()
        now = time.perf_counter()
        if now - start >= seconds and (i > 1 or seconds == 0 or now - start > 2):
            return now - before
    raise AssertionError("unreachable")


def cuda_peak_mb(call: Callable[..., Any], args: tuple[Tensor, ...]) -> float | None:
    """Megabytes (10^6) that one call holds at its peak above what was allocated before; None on a CPU."""
    if not args[0].is_cuda:
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        result = call(*args)  # noqa: F841  held until the peak is read
        torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
