"""Launches that were prepared once, for inputs of the same shapes, strides, dtypes and alignment.

To prepare a launch takes Python longer than a small kernel takes on a GPU. A plan holds what does not change from call
to call: compiled kernels, grids, arguments, sizes of the tensors to allocate. A call fills in the addresses.
"""

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from attnx.kernels.configs import Launch

T = TypeVar("T")

_KEPT: dict[Hashable, "Plan"] = {}
_MOST = 1024  # plans; when there are more, all are dropped
_LOCAL = threading.local()


class _Step(NamedTuple):
    """A launch: a compiled kernel with its grid, all its arguments, and those to fill in.

    pointers: (position, number) of each argument that is the address of an input, or of an allocation. Allocations are
    numbered after the inputs. boxes: the same of tensors whose descriptors are arguments, with the box.
    """

    launch: Callable[..., None]
    args: list[Any]
    pointers: tuple[tuple[int, int], ...]
    boxes: tuple[tuple[int, int, Any], ...]


class _Allocation(NamedTuple):
    """A tensor to allocate."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


class Plan(NamedTuple):
    """Launches with the tensors that they need.

    results: numbers of the allocations that the call returns; single: one, and no tuple.
    """

    allocations: tuple[_Allocation, ...]
    steps: tuple[_Step, ...]
    results: tuple[int, ...]
    single: bool

    def run(self, first: Tensor, addresses: list[int]) -> Any:
        """Allocate, launch and return the results.

        Args:
            first: the first input, on whose device the plan runs.
            addresses: of all inputs; those of the allocations are appended.
        """
        if first.is_cuda and first.get_device() != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return self.run(first, addresses)
        made = [first.new_empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in self.allocations]
        addresses += [t.data_ptr() for t in made]
        for launch, fixed, pointers, boxes in self.steps:
            args = fixed.copy()
            for position, tensor in pointers:
                args[position] = addresses[tensor]
            for position, tensor, box in boxes:
                args[position] = box.descriptor(addresses[tensor])
            launch(*args)
        return made[self.results[0]] if self.single else tuple(made[i] for i in self.results)


class _Recording:
    """Notes the launches of a call, to make a plan of them."""

    def __init__(self, inputs: Sequence[Tensor | None]) -> None:
        self.inputs = {t.data_ptr(): i for i, t in reversed(list(enumerate(inputs))) if t is not None}
        self.count = len(inputs)
        self.made: dict[int, Tensor] = {}  # allocations, by the address of their memory
        self.steps: list[_Step] = []
        self.possible = True

    def note(self, launch: Launch, compiled: Any) -> None:
        """Note a launch that has run."""
        if compiled is None:
            self.possible = False
            return
        args: list[Any] = []
        pointers, boxes = [], []
        for position, name in enumerate(launch.kernel.arg_names):
            value = launch.all_args[name]
            box = None if isinstance(value, Tensor) or not hasattr(value, "descriptor") else value
            t = value if box is None else box.tensor
            if isinstance(t, Tensor):
                if box is None:
                    pointers.append((position, self._number(t)))
                else:
                    boxes.append((position, self._number(t), box.without_tensor()))
                value = None
            args.append(value)
        self.steps.append(_Step(compiled[(*launch.grid, 1, 1)[:3]], args, tuple(pointers), tuple(boxes)))

    def plan(self, result: Any) -> Plan | None:
        """The plan of the noted launches; None if these read or wrote parts of tensors, or did not write the result."""
        single, addresses = isinstance(result, Tensor), list(self.made)
        results = (result,) if single else tuple(result)
        numbers = [addresses.index(t.data_ptr()) if t.data_ptr() in self.made else -1 for t in results]
        # A launch may have seen another view of the same memory, such as all partial maps in one.
        made = self.made | {t.data_ptr(): t for t in results}
        whole = all(t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in made.values())
        if not self.possible or not whole or -1 in numbers:
            return None
        allocations = tuple(_Allocation(t.shape, t.stride(), t.dtype) for t in made.values())
        return Plan(allocations, tuple(self.steps), tuple(numbers), single)

    def _number(self, t: Tensor) -> int:
        """The number of the input or allocation that an argument is."""
        address = t.data_ptr()
        if address in self.inputs:
            return self.inputs[address]
        if address != t.untyped_storage().data_ptr():
            self.possible = False  # a part of a tensor
        self.made.setdefault(address, t)
        return self.count + list(self.made).index(address)


def planned(name: str, options: tuple[Hashable, ...], inputs: Sequence[Tensor | None], compute: Callable[[], T]) -> T:
    """The result of compute(), by the plan for inputs like these if there is one; else a plan is made.

    Args:
        name: of the computation.
        options: what it depends on besides the inputs.
        inputs: the tensors that it reads, the first on the device of all.
        compute: it may only allocate tensors and launch kernels, which read the inputs and the allocations.
    """
    first = inputs[0]
    if first is None or not is_planned(first) or getattr(_LOCAL, "recording", None) is not None:
        return compute()
    key, addresses = _key(name, options, inputs)
    plan = _KEPT.get(key)
    if plan is not None:
        result: T = plan.run(first, addresses)
        return result
    recording = _LOCAL.recording = _Recording(inputs)
    try:
        made = compute()
    finally:
        _LOCAL.recording = None
    plan = recording.plan(made)
    if plan is not None:
        if len(_KEPT) >= _MOST:
            _KEPT.clear()
        _KEPT[key] = plan
    return made


def by_plan(name: str, options: tuple[Hashable, ...], inputs: Sequence[Tensor | None]) -> Any:
    """The result of `planned` with these arguments if there is a plan; else None."""
    first = inputs[0]
    if first is None or not is_planned(first) or getattr(_LOCAL, "recording", None) is not None:
        return None
    key, addresses = _key(name, options, inputs)
    plan = _KEPT.get(key)
    return None if plan is None else plan.run(first, addresses)


def note(launch: Launch, compiled: Any) -> None:
    """Note a launch that has run, if a plan is being made in this thread."""
    recording: _Recording | None = getattr(_LOCAL, "recording", None)
    if recording is not None:
        recording.note(launch, compiled)


def is_planned(t: Tensor) -> bool:
    """True for tensors on a GPU. On a CPU Triton's interpreter compiles nothing."""
    return t.is_cuda


def _key(name: str, options: tuple[Hashable, ...], inputs: Sequence[Tensor | None]) -> tuple[Hashable, list[int]]:
    """The key of a plan, and the addresses of the inputs, 0 for None. The key tells which inputs start at one address.

    All inputs are on the device of the first.
    """
    key: list[Hashable] = [name, options]
    addresses = []
    for t in inputs:
        if t is None:
            key.append(None)
            addresses.append(0)
        else:
            address = t.data_ptr()
            addresses.append(address)
            key += (t.shape, t.stride(), t.dtype, address & 15)
            if len(addresses) == 1:
                key.append(t.get_device())
    if len(set(addresses)) < len(addresses):
        key += map(addresses.index, addresses)
    return tuple(key), addresses
