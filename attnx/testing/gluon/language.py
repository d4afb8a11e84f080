"""The functions of Gluon's language that the Hopper kernels use, on numpy.

Tensors are float32 or int64 arrays. Half precision is float32 rounded to it. Layouts have no effect.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from triton.experimental.gluon import language as gluon_language

from attnx.testing.gluon.machine import Barrier, HazardError, Product
from attnx.testing.gluon.values import Barriers, Descriptor, Int, Pointer, Shared, Tensor, machine, tensor


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
