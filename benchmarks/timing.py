"""How things are timed: contestant and floor in turn, one after the other, in the same process.

A ratio is the contestant's median over the median of the floor that ran between its rounds, so a machine that slows
down, or a neighbour that comes and goes, slows both. The floor against itself gives the spread.

On a GPU an attention call takes less time than Python needs to launch it. Its calls are therefore recorded in a CUDA
graph, over several input sets that together are larger than the L2 cache, and one round is one replay between two
CUDA events: what the kernels take, without launches. Models are timed as their users call them: wall clock, from an
idle device to an idle device.
"""

import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

Seconds = Callable[[], float]


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


def graph_timer(call: Callable[..., Any], sets: Sequence[tuple[Tensor, ...]]) -> tuple[Seconds, str]:
    """A function that gives the seconds of one call on the GPU, and how it is measured: "graph" or "stream".

    "stream" is for a call that can't be recorded: the same calls are launched one by one between the events.
    """
    turns = [sets[i % len(sets)] for i in range(max(10, len(sets)))]

    def calls() -> None:
        for args in turns:
            call(*args)

    with torch.inference_mode():
        calls()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                calls()
            run, how = graph.replay, "graph"
        except RuntimeError:
            torch.cuda.synchronize()
            run, how = calls, "stream"

    def once() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.inference_mode():
            torch.cuda.synchronize()
            start.record()
            run()
            stop.record()
            torch.cuda.synchronize()
        return start.elapsed_time(stop) / 1e3 / len(turns)

    return once, how


def race(benchmark: Any, contestant: Seconds, floor: Seconds, quick: bool = False) -> None:
    """Runs floor and contestant in turn; the contestant's rounds go to pytest-benchmark, the ratio to extra_info."""
    pair = _warm_up(contestant, floor, 0.0 if quick else 0.2)
    rounds = 2 if quick else max(5, min(30, int(6 / pair)))
    took: list[float] = []
    floors: list[float] = []

    def target() -> None:
        took.append(contestant())
        CLOCK.now += took[-1]

    benchmark.pedantic(target, setup=lambda: floors.append(floor()), rounds=rounds)
    benchmark.extra_info["floor_ms"] = 1e3 * median(floors)
    benchmark.extra_info["ratio_to_floor"] = median(took) / median(floors)


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
