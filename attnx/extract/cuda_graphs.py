"""CUDA graphs of a function of one tensor: recorded once for each shape, then replayed without Python."""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3


class Graphs:
    """CUDA graphs of `function`, recorded on the first call with each shape and dtype. All graphs stay in memory.

    Args:
        function: maps a tensor to a tensor on one CUDA device. It runs the same operations for all inputs of a shape
            and does not synchronise with the device.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.recorded: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """The result of `function`.

        Raises:
            ValueError: `x` is not on a CUDA device.
        """
        if not x.is_cuda:
            raise ValueError(f"compile: expected images on a CUDA device; got {x.device}")
        key = (x.shape, x.dtype, x.stride(), x.device)
        if key not in self.recorded:
            with torch.cuda.device(x.device):
                self.recorded[key] = self._record(x)
        graph, static_input, result = self.recorded[key]
        with torch.cuda.device(x.device):
            static_input.copy_(x)
            graph.replay()
            return result.clone()

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        static_input = x.clone()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.function(static_input)
        torch.cuda.current_stream(x.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads may synchronise with events during the capture.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(static_input)
        return graph, static_input, result
