"""Kernel launches with a cache of compiled kernels.

Triton binds, specialises and looks up about forty arguments at each launch. On the host this takes longer than a small
kernel runs on the GPU. The cache skips these steps for arguments that were seen before.
"""

from typing import Any

import torch
from torch import Tensor

_COMPILED: dict[tuple[Any, ...], Any] = {}
_CACHE_SIZE = 4096  # entries; a full cache is emptied


def launch(kernel: Any, grid: tuple[int, ...], args: dict[str, Any], options: dict[str, Any]) -> Any:
    """Launch a kernel on the current device.

    Tensors that a kernel loads in boxes (`attnx.kernels.hopper.arguments.Box`) are passed as their descriptors.

    Args:
        kernel: a `triton.jit` function.
        grid: number of programs along each axis.
        args: all arguments by name, including the compile-time constants.
        options: Triton's launch options, such as num_warps.

    Returns:
        the compiled kernel, to be called as ``compiled[grid](*args)``; None if Triton's interpreter ran it.
    """
    if not next(v for v in args.values() if isinstance(v, Tensor)).is_cuda:
        kernel[grid](**args, **options)
        return None
    # Triton specialises on dtype and alignment of a pointer, and on the value of an integer.
    specialisation = tuple(
        (value.dtype, value.data_ptr() % 16 == 0)
        if isinstance(value, Tensor)
        else (value.tensor.dtype, value.rows, value.columns)
        if hasattr(value, "descriptor")
        else value
        for value in args.values()
    )
    args = {name: value.descriptor() if hasattr(value, "descriptor") else value for name, value in args.items()}
    key = (id(kernel), torch.cuda.current_device(), *options.values(), *specialisation)
    compiled = _COMPILED.get(key)
    if compiled is None:
        if len(_COMPILED) >= _CACHE_SIZE:
            _COMPILED.clear()
        compiled = _COMPILED[key] = kernel[grid](**args, **options)
    else:
        compiled[(*grid, 1, 1)[:3]](*(args[name] for name in kernel.arg_names))
    return compiled
