"""A function of one tensor as CUDA graphs: recorded once for every shape, replayed without Python."""

from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP = 3


class Graphs:
    """`function`, recorded on the first call with every shape and dtype. Graphs keep their memory while this lives.

    Args:
        function: [...] -> tensor, on one CUDA device; does the same with every input of a shape, without waiting for
            the device.
    """

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.recorded: dict[tuple[object, ...], tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """What `function` gives.

        Raises:
            ValueError: x is not on a CUDA device.
        """
        if not x.is_cuda:
            raise ValueError(f"compile: expected images on a CUDA device; got {x.device}")
        key = (x.shape, x.dtype, x.stride(), x.device)
        if key not in self.recorded:
            with torch.cuda.device(x.device):
                self.recorded[key] = self._record(x)
        graph, given, result = self.recorded[key]
        with torch.cuda.device(x.device):
            given.copy_(x)
            graph.replay()
            return result.clone()

    def _record(self, x: Tensor) -> tuple[torch.cuda.CUDAGraph, Tensor, Tensor]:
        given = x.clone()
        side = torch.cuda.Stream(x.device)
        side.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                self.function(given)
        torch.cuda.current_stream(x.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Another thread may wait for an event meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            result = self.function(given)
        return graph, given, result
