"""The parts of Gluon's language that the Hopper kernels use, on numpy.

Tensors are float32 or int64 arrays. Half precision is float32 rounded to it. Layouts have no effect.
"""

import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gluon_language

from attnx.testing.gluon.machine import Barrier, HazardError, Machine, Place, Product

LOCAL = threading.local()
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


def load_box(descriptor: Descriptor, coordinates: Sequence[int], barrier: Barrier, result: Shared) -> None:
    """`tma.async_load`."""
    data = descriptor.read(coordinates)

    def write() -> None:
        result.data[...] = data.reshape(result.data.shape)

    machine().load(result.places[0], write, barrier, descriptor.block_type.nbytes)


def warpgroup_mma(a: Any, b: Shared, acc: Any, *, use_acc: Any = True, is_async: bool = False) -> Any:
    """a b, or acc + a b."""
    operands = [x for x in (a, b) if isinstance(x, Shared)]
    if not isinstance(a, Shared):
        tensor(a)

    def compute() -> np.ndarray:
        left, right = (np.asarray(x.data if isinstance(x, Shared) else x, np.float32) for x in (a, b))
        start = (acc.finish() if isinstance(acc, Product) else np.asarray(acc)) if use_acc else 0.0
        return tensor((left @ right + start).astype(np.float32))

    product = machine().multiply([place for x in operands for place in x.places], compute)
    if is_async:
        return product
    machine().wait_products(0)
    return product.finish()


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] = ()) -> Any:
    """Wait until at most `num_outstanding` products are in flight; their results, or those of earlier ones."""
    machine().wait_products(num_outstanding)
    for dep in deps:
        if isinstance(dep, Product) and dep.value is None:
            raise HazardError("a result is used while its product is in flight")
    results = tuple(dep.value if isinstance(dep, Product) else dep for dep in deps)
    return results[0] if len(results) == 1 else results


class _Mbarrier:
    @staticmethod
    def MBarrierLayout() -> None:  # noqa: N802  (Gluon's name)
        return None

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def arrive(barrier: Barrier, *, count: int = 1) -> None:
        machine().arrive(barrier, count)

    @staticmethod
    def expect(barrier: Barrier, nbytes: int) -> None:
        machine().arrive(barrier, 1, nbytes)

    @staticmethod
    def wait(barrier: Barrier, phase: int) -> None:
        machine().wait(barrier, int(phase) & 1)


class _Language:
    """`triton.experimental.gluon.language`."""

    float32, int64 = gluon_language.float32, gluon_language.int64
    SliceLayout = BlockedLayout = SwizzledSharedLayout = DotOperandLayout = staticmethod(lambda *args: None)

    @staticmethod
    def static_range(*bounds: int) -> Iterator[Int]:
        return map(Int, range(*map(int, bounds)))

    @staticmethod
    def cdiv(a: int, b: int) -> Int:
        return Int(-(-int(a) // int(b)))

    @staticmethod
    def program_id(axis: int) -> Int:
        return Int(machine().pid)

    @staticmethod
    def num_programs(axis: int) -> Int:
        return Int(machine().programs)

    @staticmethod
    def to_tensor(x: Any) -> Any:
        return Int(x) if isinstance(x, int) else x

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: Any, layout: Any = None) -> Tensor:
        return tensor(np.full([int(size) for size in shape], value, np.float32))

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Tensor:
        return tensor(np.arange(start, end))

    @staticmethod
    def expand_dims(x: Any, axis: int) -> Tensor:
        return tensor(np.expand_dims(tensor(x), axis))

    @staticmethod
    def convert_layout(x: Any, layout: Any) -> Tensor:
        return tensor(x)

    @staticmethod
    def exp2(x: Any) -> Tensor:
        return tensor(np.exp2(np.asarray(tensor(x), np.float32)))

    @staticmethod
    def log2(x: Any) -> Tensor:
        return tensor(np.log2(np.asarray(tensor(x), np.float32)))

    @staticmethod
    def max(x: Any, axis: int) -> Tensor:
        return tensor(np.fmax.reduce(np.asarray(tensor(x)), axis))  # skips NaN

    @staticmethod
    def sum(x: Any, axis: int) -> Tensor:
        return tensor(np.asarray(tensor(x)).sum(axis, dtype=np.float32))

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not any(isinstance(x, np.ndarray) for x in (condition, a, b)):
            return a if condition else b
        a, b = (np.float32(x) if isinstance(x, float) else tensor(x) for x in (a, b))
        return tensor(np.where(np.asarray(condition), a, b))

    @staticmethod
    def maximum(a: Any, b: Any, propagate_nan: Any = None) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return Int(max(a, b))
        return tensor((np.fmax if propagate_nan is None else np.maximum)(tensor(a), tensor(b)))

    @staticmethod
    def minimum(a: Any, b: Any, propagate_nan: Any = None) -> Any:
        if isinstance(a, int) and isinstance(b, int):
            return Int(min(a, b))
        return tensor((np.fmin if propagate_nan is None else np.minimum)(tensor(a), tensor(b)))

    @staticmethod
    def load(pointer: Pointer, mask: Any = None, other: float = 0.0) -> Tensor:
        offset = np.asarray(pointer.offset)
        valid = np.broadcast_to(True if mask is None else np.asarray(mask), offset.shape)
        values = np.full(offset.shape, other, np.float32)
        memory = pointer.memory
        values[valid] = memory.flat[memory.index(offset[valid])].float().numpy()
        return tensor(values)

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None) -> None:
        offset, memory = np.asarray(pointer.offset), pointer.memory
        valid = np.broadcast_to(True if mask is None else np.asarray(mask), offset.shape)
        at = memory.index(offset[valid])
        if memory.stored[at].any():
            raise HazardError("an element is stored twice")
        memory.stored[at] = True
        values = np.broadcast_to(np.asarray(tensor(value), np.float32), offset.shape)[valid]
        memory.flat[at] = torch.from_numpy(np.ascontiguousarray(values)).to(memory.flat.dtype)

    @staticmethod
    def allocate_shared_memory(dtype: Any, shape: Sequence[int], layout: Any = None) -> Any:
        count = int(shape[0])
        if dtype is gluon_language.int64:
            return Barriers([Barrier(f"barrier {i} of {count}") for i in range(count)])
        sizes = [int(size) for size in shape]
        name = "x".join(str(size) for size in sizes[1:] if size > 1)
        places = [machine().place(f"stage {i} of the {count} boxes of {name}") for i in range(count)]
        return Shared(np.full(sizes, np.nan, np.float32), dtype, places)

    @staticmethod
    def warp_specialize(groups: Sequence[Any], worker_warps: Any, worker_registers: Any) -> None:
        machine().specialize(groups)


gl, mbarrier = _Language(), _Mbarrier()
