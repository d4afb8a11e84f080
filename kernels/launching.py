"""Launches a kernel, and remembers by its arguments what was compiled for it.

Triton itself binds, specialises and looks up some forty arguments at every launch; on a GPU's host that takes longer
than a small kernel runs.
"""

from typing import Any

import torch
from torch import Tensor

_COMPILED: dict[tuple[Any, ...], Any] = {}
_ROOM = 4096  # launches that differ, before all are forgotten


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any]) -> None:
    """Launches it on the current device.

    Args:
        kernel: a `triton.jit` function.
        args: all its arguments by name, those that are known at compile time too.
        options: Triton's: num_warps and so on.
    """
    if not next(v for v in args.values() if isinstance(v, Tensor)).is_cuda:  # Triton's interpreter
        kernel[grid](**args, **options)
        return
    # What Triton specialises on follows from this: an integer is its own, of a pointer alignment counts.
    special = tuple(
        (value.dtype, value.data_ptr() % 16 == 0) if isinstance(value, Tensor) else value for value in args.values()
    )
    key = (id(kernel), torch.cuda.current_device(), *options.values(), *special)
    compiled = _COMPILED.get(key)
    if compiled is None:
        if len(_COMPILED) >= _ROOM:
            _COMPILED.clear()
        _COMPILED[key] = kernel[grid](**args, **options)
    else:
        compiled[(*grid, 1, 1)[:3]](*(args[name] for name in kernel.arg_names))
