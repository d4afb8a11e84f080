"""The values of a kernel on numpy: scalars, tensors, pointers, shared memory, barriers and descriptors."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gluon_language

from attnx.testing.gluon.machine import Barrier, HazardError, Machine, Place, Product

CURRENT: dict[str, Machine] = {}


def machine() -> Machine:
    """The program that runs."""
    return CURRENT["machine"]


class Int(int):
    """A scalar of a kernel."""

    def to(self, dtype: Any) -> "Int":
        """The same: scalars have no width here."""
        return self


def _operator(name: str) -> Any:
    of_int = getattr(int, name)

    def apply(self: int, other: Any) -> Any:
        if isinstance(other, np.ndarray | Pointer):
            return NotImplemented
        result = of_int(self, other)
        return Int(result) if type(result) is int else result

    return apply


for _name in ["add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift"]:
    for _form in (f"__{_name}__", f"__r{_name}__"):
        setattr(Int, _form, _operator(_form))


class Tensor(np.ndarray):
    """A tensor of a kernel."""

    def to(self, dtype: Any) -> "Tensor":
        """Rounded to a dtype of torch or of the language."""
        if isinstance(dtype, torch.dtype):
            return tensor(torch.from_numpy(np.array(self, np.float32)).to(dtype).float().numpy())
        return tensor(np.asarray(self).astype(np.int64 if dtype is gluon_language.int64 else np.float32))


def tensor(x: Any) -> Tensor:
    """The array as a tensor; scores that are not waited for are a HazardError."""
    if isinstance(x, Product):
        raise HazardError("the result of a product is used before the wait")
    return np.asarray(x).view(Tensor)


class Pointer:
    """Pointers to elements of a torch tensor's memory, from its first element on."""

    __array_priority__ = 1e9
    __array_ufunc__ = None

    def __init__(self, memory: "Memory", offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset
        self.dtype = SimpleNamespace(element_ty=memory.flat.dtype)

    def __add__(self, offset: Any) -> "Pointer":
        return Pointer(self.memory, np.asarray(self.offset) + np.asarray(offset))

    __radd__ = __add__


class Memory:
    """The memory of a torch tensor. Each element may be stored once in a launch."""

    def __init__(self, t: torch.Tensor) -> None:
        extent = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        self.flat = t.as_strided((extent,), (1,))
        self.stored = np.zeros(extent, bool)

    def index(self, offset: np.ndarray) -> torch.Tensor:
        """Offsets as an index. Raise HazardError outside the tensor."""
        if offset.size and (offset.min() < 0 or offset.max() >= len(self.stored)):
            raise HazardError(f"access at {offset.min()}..{offset.max()} of a tensor of {len(self.stored)} elements")
        return torch.from_numpy(np.ascontiguousarray(offset, np.int64))


class Shared:
    """Shared memory: an array, and the place of each of its boxes."""

    def __init__(self, data: np.ndarray, dtype: Any, places: Sequence[Place]) -> None:
        self.data, self.dtype, self.places = data, dtype, places

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes."""
        return tuple(map(Int, self.data.shape))

    def index(self, i: int) -> "Shared":
        """The box i."""
        if not 0 <= i < len(self.places):
            raise HazardError(f"box {i} of {len(self.places)}")
        return Shared(self.data[int(i)], self.dtype, [self.places[int(i)]])

    def reshape(self, shape: Sequence[int]) -> "Shared":
        """The same in another shape."""
        return Shared(self.data.reshape([int(size) for size in shape]), self.dtype, self.places)

    def slice(self, start: int, length: int, dim: int = 0) -> "Shared":
        """Consecutive rows."""
        if not 0 <= start <= start + length <= self.data.shape[0]:
            raise HazardError(f"rows {start}..{start + length - 1} of {self.data.shape[0]}")
        return Shared(self.data[int(start) : int(start + length)], self.dtype, self.places)

    def permute(self, order: Sequence[int]) -> "Shared":
        """The dimensions in another order."""
        return Shared(self.data.transpose([int(dim) for dim in order]), self.dtype, self.places)

    def load(self, layout: Any) -> Tensor:
        """The values, in registers."""
        for place in self.places:
            machine().read(place)
        return tensor(self.data.copy())

    def store(self, value: np.ndarray) -> None:
        """Store values."""
        for place in self.places:
            machine().store(place)
        self.data[...] = value


class Barriers:
    """A ring of barriers."""

    def __init__(self, barriers: list[Barrier]) -> None:
        self.barriers = barriers

    def index(self, i: int) -> Barrier:
        """The barrier i."""
        if not 0 <= i < len(self.barriers):
            raise HazardError(f"barrier {i} of {len(self.barriers)}")
        return self.barriers[int(i)]


class Descriptor:
    """Boxes of a tensor [B, H, rows, columns]; what lies outside of it is zero."""

    layout = None

    def __init__(self, t: torch.Tensor, rows: int, columns: int) -> None:
        self.t, self.dtype = t, t.dtype
        shape = [Int(1), Int(1), Int(rows), Int(columns)]
        self.block_type = SimpleNamespace(shape=shape, nbytes=Int(rows * columns * t.element_size()))

    def read(self, coordinates: Sequence[int]) -> np.ndarray:
        """The box at these coordinates."""
        b, h, row, column = map(int, coordinates)
        rows, columns = self.block_type.shape[2:]
        result = np.zeros((rows, columns), np.float32)
        if 0 <= b < self.t.shape[0] and 0 <= h < self.t.shape[1]:
            inside = self.t[b, h, row : row + rows, column : column + columns].float().numpy()
            result[: inside.shape[0], : inside.shape[1]] = inside
        return result
