"""Translate a Gluon kernel to Python functions on `language`, and run a launch with them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import FunctionType
from typing import Any
from unittest import mock

import numpy as np
import torch
from triton import JITFunction
from triton.experimental.gluon import language as gluon_language
from triton.experimental.gluon._runtime import GluonJITFunction
from triton.experimental.gluon.language.nvidia.hopper import mbarrier as gluon_mbarrier

from attnx.kernels.configs import Launch
from attnx.kernels.hopper.arguments import Box
from attnx.testing.gluon import language, values
from attnx.testing.gluon.machine import Machine

_REPLACED = {id(gluon_language): language.gl, id(gluon_mbarrier): language.mbarrier}
_NAMES = ("load_box", "warpgroup_mma", "warpgroup_mma_wait")


def run(launch: Launch, seed: int = 0, early_loads: bool = True, early_products: bool = False) -> None:
    """Run a launch of a Gluon kernel on CPU tensors, one program after another.

    Args:
        launch: its tensors are on the CPU.
        seed: decides the order in which the groups of warps run.
        early_loads: loads land at once; else as late as possible.
        early_products: products read shared memory at once; else as late as possible.

    Raises:
        HazardError: an access that no barrier orders, a deadlock, an access outside a tensor, an element stored twice.
    """
    function = translated(launch.kernel)
    args = [_argument(launch.args[name]) for name in launch.kernel.arg_names]
    for pid in range(launch.grid[0]):
        machine = Machine(pid, launch.grid[0], seed, early_loads, early_products)
        with mock.patch.dict(values.CURRENT, machine=machine), np.errstate(all="ignore"):
            function(*args)


@contextmanager
def emulated(seed: int = 0, early_loads: bool = True, early_products: bool = False) -> Iterator[list[Launch]]:
    """A context manager in which CPU tensors run the Hopper kernels with backend="hopper".

    Yields:
        the launches of Gluon kernels, in order.

    Raises:
        RuntimeError: another kernel takes part, and Triton's interpreter is off.
    """
    import_module("attnx.ops.backends.triton")  # its kernels must not be taken for interpreted ones
    done: list[Launch] = []
    run_compiled = Launch.run

    def run_here(launch: Launch) -> None:
        if not isinstance(launch.kernel, GluonJITFunction):
            if isinstance(launch.kernel, JITFunction):
                raise RuntimeError(
                    f"{launch.kernel.__name__}: expected Triton's interpreter, since this is no kernel for Hopper; set "
                    "TRITON_INTERPRET=1 before triton is imported"
                )
            run_compiled(launch)
            return
        done.append(launch)
        run(launch, seed, early_loads, early_products)

    here = mock.patch.dict(os.environ, TRITON_INTERPRET="1")
    with (
        here,
        mock.patch.object(Launch, "run", run_here),
        mock.patch("attnx.ops.backends.hopper.missing", return_value=""),
    ):
        yield done


def translated(kernel: Any, done: dict[int, Any] | None = None) -> Any:
    """A Gluon function as a Python function, and with it the functions that it calls."""
    done = {} if done is None else done
    if id(kernel) in done:
        return done[id(kernel)]
    source = kernel.fn
    names: dict[str, Any] = {"range": lambda *bounds: map(values.Int, range(*map(int, bounds)))}
    done[id(kernel)] = function = FunctionType(source.__code__, names, source.__name__, source.__defaults__)
    for name in source.__code__.co_names:
        if name not in source.__globals__:
            continue
        value = source.__globals__[name]
        if name in _NAMES:
            value = getattr(language, name)
        elif isinstance(value, GluonJITFunction):
            value = translated(value, done)
        elif isinstance(value, gluon_language.constexpr):
            value = value.value
        names[name] = _REPLACED.get(id(value), value)
    return function


def _argument(value: Any) -> Any:
    if isinstance(value, Box):
        return values.Descriptor(value.tensor, value.rows, value.columns)
    if isinstance(value, torch.Tensor):
        return values.Pointer(values.Memory(value))
    return values.Int(value) if isinstance(value, int) and not isinstance(value, bool) else value
