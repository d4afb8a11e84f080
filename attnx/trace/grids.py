"""The grids of the outputs of convolutions, pools and embeddings of patches, and the modules that mix tokens."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_MOST_CHANNELS = 4  # of an image: a feature map has more

# Class names of embeddings that have a grid although they have no convolution.
_EMBEDDINGS = ("NaFlexEmbeds", "Siglip2VisionEmbeddings")
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# Modules that may mix neighbouring tokens, besides those with a grid.
_SEQUENCE_MIXERS = (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.RNNBase)
# Functions that do the same.
_CONVOLVE = frozenset({F.conv1d, F.conv2d, F.conv3d})
MIXERS = _CONVOLVE | {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d}


class Grid(NamedTuple):
    """The grid of the output of a convolution, a pool or an embedding.

    Attributes:
        shape: (rows, columns).
        channels: number of features of each position.
        frames: number of frames, or tubelets of frames.
        items: number of images of the batch; 0 if unknown.
        problem: reason that the images of the batch have no common grid; "" if they have one.
        each: (rows, columns) of each image, if there is padding after the patches of some.
        image: (rows, columns) of the module's input, if that may be an image; else (0, 0).
        step: rows and columns of the input from one position to the next; (0, 0) if unknown.
    """

    shape: tuple[int, int]
    channels: int = 0
    frames: int = 1
    items: int = 0
    problem: str = ""
    each: tuple[tuple[int, int], ...] = ()
    image: tuple[int, int] = (0, 0)
    step: tuple[int, int] = (0, 0)

    @property
    def tokens(self) -> int:
        """Number of positions; 0 if there is no common grid."""
        return 0 if self.problem else self.frames * self.shape[0] * self.shape[1]

    def of_item(self, index: int) -> "Grid":
        """The grid of one image of the batch."""
        return self._replace(shape=self.each[index] if self.each else self.shape, items=1, problem="", each=())

    def __str__(self) -> str:
        return " * ".join(str(n) for n in (self.frames, *self.shape)[self.frames == 1 :])


def is_patch_convolution(module: nn.Module) -> bool:
    """True for a convolution that cuts images into patches: its stride equals its kernel size and exceeds 1."""
    return isinstance(module, nn.Conv2d) and module.kernel_size == module.stride != (1, 1)


def patch_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions of a model that cut images into patches."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d) and is_patch_convolution(module)]


def is_grid_module(module: nn.Module) -> bool:
    """True for a module whose output may have the grid of tokens, or that may mix tokens.

    These are convolutions, pools, and embeddings.
    """
    kinds = (*_CONVOLUTIONS, *_SEQUENCE_MIXERS, nn.ConvTranspose2d)
    return isinstance(module, kinds) or type(module).__name__ in _EMBEDDINGS


def mixes_tokens(module: nn.Module) -> bool:
    """True for a recurrent network, and for a convolution or a pool over more than one position."""
    size = getattr(module, "kernel_size", 1)
    return isinstance(module, nn.RNNBase) or (size if isinstance(size, int) else max(size, default=1)) > 1


def function_mixes(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """True if a function of MIXERS is called with a kernel over more than one position."""
    kernel = args[1] if len(args) > 1 else kwargs.get("weight" if func in _CONVOLVE else "kernel_size", 1)
    size = kernel.shape[2:] if isinstance(kernel, Tensor) else kernel
    return (size if isinstance(size, int) else max(size, default=1)) > 1


def grid_of(module: nn.Module, args: Sequence[Any], output: object) -> Grid | None:
    """The grid of a call of a module that passes `is_grid_module`.

    Its output is [B, C, h, w], [C, h, w] or [B, C, t, h, w].

    None for other outputs.
    """
    kind = type(module).__name__
    if kind == "NaFlexEmbeds":
        x, shape = output if isinstance(output, tuple) and len(output) == 2 else (None, None)
        if not isinstance(x, Tensor) or not shape:
            return None
        return _of_patches(Grid((int(shape[0]), int(shape[1])), x.shape[-1], 1, len(x)), module)
    if not isinstance(output, Tensor) or isinstance(module, _SEQUENCE_MIXERS):
        return None
    if kind == "Siglip2VisionEmbeddings":
        shapes = args[1] if len(args) > 1 else None
        found = _common_grid(shapes, output) if isinstance(shapes, Tensor) else None
        return None if found is None else _of_patches(found, module)
    image, step = _seen(args), _pair(getattr(module, "stride", 0))
    if isinstance(module, nn.Conv3d):
        if output.dim() != 5:
            return None
        shape = int(output.shape[-2]), int(output.shape[-1])
        return Grid(shape, int(output.shape[1]), int(output.shape[2]), len(output), image=image, step=step)
    if output.dim() in (3, 4):
        shape = int(output.shape[-2]), int(output.shape[-1])
        items = len(output) if output.dim() == 4 else 1
        return Grid(shape, int(output.shape[-3]), items=items, image=image, step=step)
    return None


def _seen(args: Sequence[Any]) -> tuple[int, int]:
    """`Grid.image` of a call: the size of its input, if that has as few channels as an image."""
    x = args[0] if args else None
    if not isinstance(x, Tensor) or x.dim() not in (3, 4, 5):
        return 0, 0
    channels = x.shape[1] if x.dim() == 5 else x.shape[-3]
    return (int(x.shape[-2]), int(x.shape[-1])) if channels <= _MOST_CHANNELS else (0, 0)


def _of_patches(grid: Grid, module: nn.Module) -> Grid:
    """The grid of an embedding of patches, whose module has a patch size."""
    step = _pair(getattr(module, "patch_size", 0))
    return grid._replace(image=(grid.shape[0] * step[0], grid.shape[1] * step[1]), step=step)


def _pair(value: Any) -> tuple[int, int]:
    """The last two numbers of a tuple, or one number twice; (0, 0) for anything else."""
    if isinstance(value, int):
        return value, value
    return (int(value[-2]), int(value[-1])) if isinstance(value, tuple) and len(value) > 1 else (0, 0)


def _common_grid(shapes: Tensor, embedded: Tensor) -> Grid | None:
    """The grid that all images of a batch have.

    Args:
        shapes: (rows, columns) of each image, [B, 2].
        embedded: the embedded patches [B, N, C], with padding after the patches of an image.
    """
    if shapes.is_cuda and torch.cuda.is_current_stream_capturing():
        return None
    each = tuple((int(h), int(w)) for h, w in shapes.tolist())
    own = sorted(set(each))
    (h, w), n, problem = own[0], embedded.shape[1], ""
    if len(own) > 1:
        problem = f"the images have different grids, {own}; trace.item(i) gives the maps of image i"
    elif h * w != n:
        problem = f"expected {h} * {w} patches; got {n}, with padding; trace.item(i) has the maps of image i alone"
    return Grid((h, w), embedded.shape[-1], 1, len(embedded), problem, each if problem else ())
