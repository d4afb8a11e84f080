"""Several passes of one capture: their traces, and the running mean of their maps."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from attnx.trace.tokens import Tokens

if TYPE_CHECKING:
    from attnx.trace.trace import Trace


class Calls(Sequence["Trace"]):
    """The passes of a capture.

    `calls[i]` is the Trace of pass i; `calls[name]` is {i: map} for each pass in which the layer attended.
    """

    def __init__(self, calls: "Sequence[Trace]") -> None:
        self._calls = tuple(calls)

    @overload
    def __getitem__(self, which: int) -> "Trace": ...
    @overload
    def __getitem__(self, which: slice) -> "Calls": ...
    @overload
    def __getitem__(self, which: str) -> dict[int, Tensor]: ...
    def __getitem__(self, which: int | slice | str) -> "Trace | Calls | dict[int, Tensor]":
        if isinstance(which, slice):
            return Calls(self._calls[which])
        if isinstance(which, str):
            found = {i: call[which] for i, call in enumerate(self._calls) if which in call}
            if not found:
                known = ", ".join(dict.fromkeys(name for call in self._calls for name in call)) or "none"
                raise KeyError(f"layer {which!r}: expected one of {known}")
            return found
        return self._calls[which]

    def __len__(self) -> int:
        return len(self._calls)

    def __repr__(self) -> str:
        return f"Calls({', '.join(map(repr, self._calls))})"


class RunningMeans:
    """The mean map of each layer over the passes in which it attended."""

    def __init__(self) -> None:
        self.maps: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}
        self._sides: dict[str, tuple[Tokens, Tokens]] = {}

    def add(self, layer: str, amap: Tensor, sides: tuple[Tokens, Tokens]) -> None:
        """Add a layer's map of one pass; a map that is the mean itself was added before and is ignored.

        Args:
            layer: name of the layer.
            amap: its map.
            sides: its queries and keys.

        Raises:
            ValueError: the map's shape or grid differs from that of earlier passes.
        """
        mean = self.maps.get(layer)
        if mean is None:
            self.maps[layer], self._counts[layer], self._sides[layer] = amap, 1, sides
            return
        if amap is mean:
            return
        if amap.shape != mean.shape:
            raise ValueError(
                f"calls='mean': expected maps of one shape; {layer} has {list(mean.shape)}, then "
                f"{list(amap.shape)}; use calls='all'"
            )
        for tokens, earlier in zip(sides, self._sides[layer], strict=True):
            if tokens.grid and earlier.grid and tokens.grid != earlier.grid:
                raise ValueError(
                    f"calls='mean': expected images of one grid; {layer} has {earlier.grid}, then {tokens.grid}; use "
                    "calls='all'"
                )
        self._counts[layer] += 1
        self.maps[layer] = torch.lerp(mean, amap, 1 / self._counts[layer])
