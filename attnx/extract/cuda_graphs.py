"""CUDA graphs of a function of one tensor: recorded once for each kind of tensor, then replayed without Python."""

import gc
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Protocol

import torch
from torch import Tensor

_WARM_UP = 3
_MOST = 4  # graphs, and four times as many kinds of tensors that were seen once
_TOLERANCE = 1e-3  # of the largest number: the order of a sum may differ


class Recorded(Protocol):
    """A recorded function."""

    nbytes: int
    """Bytes of memory that the recording takes."""

    def __call__(self, x: Tensor) -> Tensor:
        """The result of the function for another tensor of the same kind."""


class CudaGraph:
    """A function that was recorded for tensors of the shape, dtype and strides of `x`. It has memory of its own.

    Args:
        function: maps a tensor to a tensor on one CUDA device. It runs the same operations for all inputs of a kind
            and does not synchronise with the device.
        x: an input.
    """

    def __init__(self, function: Callable[[Tensor], Tensor], x: Tensor) -> None:
        with torch.cuda.device(x.device):
            gc.collect()
            torch.cuda.empty_cache()
            before = torch.cuda.memory_reserved()
            self._input, self._graph, self._done = x.clone(), torch.cuda.CUDAGraph(), torch.cuda.Event()
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(_WARM_UP):
                    function(self._input)
            torch.cuda.current_stream().wait_stream(side)
            # Other threads may synchronise with events during the capture.
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._result = function(self._input)
            self.nbytes = max(0, torch.cuda.memory_reserved() - before)

    def __call__(self, x: Tensor) -> Tensor:
        """The result of the function for another tensor of the same kind."""
        with torch.cuda.device(x.device):
            stream = torch.cuda.current_stream()
            stream.wait_event(self._done)  # the last call may have been on another stream
            self._input.copy_(x)
            self._graph.replay()
            result = self._result.clone()
            self._done.record(stream)
            return result


class Graphs:
    """Calls a function, by graphs that it records. A graph is checked once: it must give what the function gives.

    At most four graphs are kept, those used last, in at most a quarter of the GPU's memory. Without `auto`, the newest
    is kept whatever it takes. All are dropped when the state changes.

    Attributes:
        problem: the reason that no more graphs are recorded; "" if they are.

    Args:
        function: as in `CudaGraph`.
        state: returns what the function depends on besides its input, or raises ValueError if it can't be recorded.
        auto: record at the second call with a kind of tensor, and where that fails warn once and call the function.
            False: record at the first call, and raise the error.
        record: makes a graph of the function for an input.
        limit: returns the most bytes that graphs may take on the device of a tensor.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Tensor],
        state: Callable[[], Any],
        auto: bool,
        record: Callable[[Callable[[Tensor], Tensor], Tensor], Recorded] = CudaGraph,
        limit: Callable[[Tensor], int] | None = None,
    ) -> None:
        self.function, self.state, self.auto = function, state, auto
        self.problem = ""
        self._record, self._limit = record, _quarter if limit is None else limit
        self._kept: OrderedDict[Hashable, Recorded] = OrderedDict()
        self._seen: OrderedDict[Hashable, None] = OrderedDict()
        self._state: Any = None
        self._warned: set[str] = set()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the graphs take."""
        return sum(graph.nbytes for graph in self._kept.values())

    def note(self, x: Tensor) -> None:
        """Note that the function was called with a tensor."""
        self._seen[_kind(x)] = None
        while len(self._seen) > 4 * _MOST:
            self._seen.popitem(last=False)

    def __call__(self, x: Tensor) -> Tensor:
        """The result of the function.

        Raises:
            RuntimeError, ValueError: the function can't be recorded, unless `auto`.
        """
        if self.problem:
            return self.function(x)
        try:
            state = self.state()
        except ValueError as error:
            if not self.auto:
                raise ValueError(f"compile: {error}") from error
            self._warn(str(error), stacklevel=4)
            return self.function(x)
        if state != self._state:
            self._kept.clear()
            self._state = state
        kind = _kind(x)
        graph = self._kept.get(kind)
        if graph is not None:
            self._kept.move_to_end(kind)
            return graph(x)
        if self.auto and kind not in self._seen:
            self.note(x)
            return self.function(x)
        return self._first(kind, x)

    def _first(self, kind: Hashable, x: Tensor) -> Tensor:
        """The result of the function, which is recorded for the next inputs of the kind."""
        expected = self.function(x)
        try:
            graph = self._record(self.function, x)
            replayed = graph(x)
            if not _same(replayed, expected):
                raise RuntimeError("the graph's results differ from those of the model")
        except Exception as error:
            if not self.auto:
                raise RuntimeError(f"compile: expected a pass that can be recorded as a CUDA graph; {error}") from error
            self._give_up(f"{type(error).__name__}: {error}".partition("\n")[0])
            return expected
        self._kept[kind] = graph
        while len(self._kept) > _MOST or (len(self._kept) > 1 and self.nbytes > self._limit(x)):
            self._kept.popitem(last=False)
        if self.auto and self.nbytes > self._limit(x):
            self._give_up(f"a graph takes {self.nbytes:,} bytes, more than {self._limit(x):,}")
        return expected

    def _give_up(self, problem: str) -> None:
        """Drop all graphs for good."""
        self.problem = problem
        self._kept.clear()
        self._warn(problem, stacklevel=6)

    def _warn(self, problem: str, stacklevel: int) -> None:
        """Warn once for each reason, in the line of the user's call."""
        if problem not in self._warned:
            self._warned.add(problem)
            warnings.warn(f"attnx: Extractor runs without CUDA graphs: {problem}", stacklevel=stacklevel)


def _kind(x: Tensor) -> Hashable:
    """The properties of the input, and the settings of torch, that a graph depends on."""
    device = x.device.type
    settings = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device), torch.get_float32_matmul_precision()
    return x.shape, x.dtype, x.stride(), x.device, settings, torch.are_deterministic_algorithms_enabled()


def _same(a: Tensor, b: Tensor) -> bool:
    """True if the tensors are equal up to rounding."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    most = b[b.isfinite()].abs().max() if b.isfinite().any() else 1.0
    return torch.allclose(a, b, rtol=0.0, atol=_TOLERANCE * float(most), equal_nan=True)


def _quarter(x: Tensor) -> int:
    """A quarter of the memory of the tensor's GPU."""
    total: int = torch.cuda.get_device_properties(x.device).total_memory
    return total // 4
