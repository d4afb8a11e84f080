"""Token layouts: the grid of patches and the tokens around it, read from the model and its actual input."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Number of prefix tokens of Hugging Face vision models by model_type, class token included, registers excluded.
_HF_PREFIX = {
    "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1, "dinov3_vit": 1, "ijepa": 0,
    "clip": 1, "clip_vision_model": 1, "siglip": 0, "siglip_vision_model": 0, "siglip2_vision_model": 0, "beit": 1,
    "videomae": 0, "vivit": 1, "detr": 0, "yolos": 1,
}  # fmt: skip

# Parameter names of class tokens [1, n, C] or [C], names of register tokens [1, n, C], and attributes that count
# register tokens, in the code of DINOv2, DINOv3 and DeiT.
_CLASS_TOKENS = ("cls_token", "class_token", "class_embedding", "cls_token_0")
_REGISTER_TOKENS = ("register_tokens", "storage_tokens")
_REGISTERS = ("num_register_tokens", "n_storage_tokens", "num_registers")

# Class names of embeddings that have a grid although they have no convolution.
_EMBEDDINGS = ("NaFlexEmbeds", "Siglip2VisionEmbeddings")
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d)
# Modules that may mix neighbouring tokens, besides those with a grid.
_SEQUENCE_MIXERS = (nn.Conv1d, nn.ConvTranspose1d, nn.MaxPool1d, nn.AvgPool1d, nn.RNNBase)
# Functions that do the same.
_CONVOLVE = frozenset({F.conv1d, F.conv2d, F.conv3d})
MIXERS = _CONVOLVE | {F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d}


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a map: `prefix` tokens (class token, registers, ...), the patches, row by row, `suffix` tokens.

    Args:
        prefix: number of tokens before the patches.
        grid: (rows, columns) of patches.
        cls: True if token 0 is a class token; None: True if there is a prefix.
        frames: number of grids that follow one another: the frames, or tubelets of frames, of a video.
        suffix: number of tokens after the patches, such as the detection tokens of YOLOS.

    Raises:
        ValueError: a negative prefix or suffix, an empty grid, no frames, or a class token without a prefix.

    Example:
        >>> import torch, attnx
        >>> layout = attnx.TokenLayout(prefix=1, grid=(2, 3))
        >>> layout.tokens, layout.cls
        (7, True)
        >>> layout.patches(torch.arange(7.0))
        tensor([[1., 2., 3.],
                [4., 5., 6.]])
    """

    prefix: int
    grid: tuple[int, int]
    cls: bool | None = None
    frames: int = 1
    suffix: int = 0

    def __post_init__(self) -> None:
        if min(self.prefix, self.suffix) < 0 or len(self.grid) != 2 or min(*self.grid, self.frames) < 1:
            raise ValueError(
                "TokenLayout: expected prefix and suffix >= 0, a grid of (rows, columns) >= 1 and frames >= 1; "
                f"got {self!r}"
            )
        if self.cls and not self.prefix:
            raise ValueError("TokenLayout: expected a prefix of at least 1 with cls=True; got prefix=0")
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.cls is None:
            object.__setattr__(self, "cls", self.prefix > 0)

    def __str__(self) -> str:
        patches = " * ".join(str(n) for n in (self.frames, *self.grid)[self.frames == 1 :])
        return f"{self.prefix} + {patches}{f' + {self.suffix}' * (self.suffix > 0)} tokens"

    @property
    def tokens(self) -> int:
        """Number of all tokens: the N of a map."""
        return self.prefix + self.patch_count + self.suffix

    @property
    def patch_count(self) -> int:
        """Number of patches of all frames."""
        return self.frames * self.grid[0] * self.grid[1]

    def patches(self, values: Tensor) -> Tensor:
        """The values of the patches: [..., N] -> [..., h, w], or [..., t, h, w] for t > 1 frames.

        Raises:
            ValueError: the last dimension is not the number of tokens.
        """
        if values.shape[-1] != self.tokens:
            raise ValueError(f"expected {self.tokens} tokens for {self!r}; got {list(values.shape)}")
        patches = values[..., self.prefix : self.prefix + self.patch_count]
        image: Tensor = patches.unflatten(-1, (self.frames, *self.grid)[self.frames == 1 :])
        return image


class Grid(NamedTuple):
    """The grid of the output of a convolution, a pool or an embedding.

    Attributes:
        shape: (rows, columns).
        channels: number of features of each position.
        frames: number of frames, or tubelets of frames.
        items: number of images of the batch; 0 if unknown.
        problem: reason that the images of the batch have no common grid; "" if they have one.
        each: (rows, columns) of each image, if there is padding after the patches of some.
        step: (rows, columns) of the module's input from one position to the next; (0, 0) if unknown.
    """

    shape: tuple[int, int]
    channels: int = 0
    frames: int = 1
    items: int = 0
    problem: str = ""
    each: tuple[tuple[int, int], ...] = ()
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


class Declared(NamedTuple):
    """The tokens around the patches, as a model declares them: `prefix`, `cls` and `suffix` as in `TokenLayout`."""

    prefix: int
    cls: bool
    suffix: int = 0

    def layouts(self, grids: Iterable[Grid], tokens: int) -> set[TokenLayout]:
        """The layouts of `tokens` tokens with one of the grids."""
        made = (TokenLayout(self.prefix, g.shape, self.cls, g.frames, self.suffix) for g in grids if g.tokens)
        return {layout for layout in made if layout.tokens == tokens}


def declared_tokens(model: nn.Module) -> Declared | None:
    """The tokens around the patches of a model; None if it does not declare them."""
    for module in model.modules():
        prefix = getattr(module, "num_prefix_tokens", None)
        if isinstance(prefix, int):
            return Declared(prefix, getattr(module, "cls_token", None) is not None)
        config = getattr(module, "config", None)
        config = getattr(config, "vision_config", config)
        kind = getattr(config, "model_type", None)
        if kind == "vit_mae":
            return None  # ViT-MAE shuffles its patches: they form no grid
        if kind in _HF_PREFIX:
            prefix = _HF_PREFIX[kind] + (getattr(config, "num_register_tokens", 0) or 0)
            return Declared(prefix, _HF_PREFIX[kind] > 0, getattr(config, "num_detection_tokens", 0) or 0)
    own = {_own_prefix(module) for module in model.modules()} - {0}
    return Declared(own.pop(), True) if len(own) == 1 else None


def _own_prefix(module: nn.Module) -> int:
    """Number of prefix tokens that a module has as parameters; 0 if it has no class token."""
    own = dict(module.named_parameters(recurse=False))
    classes = next((own[name] for name in _CLASS_TOKENS if name in own), None)
    branches = getattr(module, "cls_token", None)
    if isinstance(branches, nn.ParameterList):
        classes = next(branches.parameters(), None)  # one for each branch of CrossViT
    if classes is None:
        return 0
    counts = [own[name].shape[1] for name in _REGISTER_TOKENS if name in own and own[name].dim() == 3]
    counts += [n for name in _REGISTERS if isinstance(n := getattr(module, name, 0), int) and n]
    registers = counts[0] if counts else 0
    return (classes.shape[1] if classes.dim() == 3 else 1) + ("dist_token" in own) + registers


def declared_input(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of the images that a timm or Hugging Face model declares as its input; else None."""
    convolutions = patch_convolutions(model)
    if not convolutions:
        return None
    size = (getattr(model, "pretrained_cfg", None) or {}).get("input_size", (0,))[1:]
    size = getattr(getattr(model, "patch_embed", None), "img_size", None) or size
    config = getattr(model, "config", None)
    size = size or getattr(getattr(config, "vision_config", config), "image_size", None)
    height, width = (size, size) if isinstance(size, int) else size if size and len(size) == 2 else (0, 0)
    return (convolutions[0].in_channels, height, width) if height else None


def patch_convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """The convolutions that cut images into patches: those whose stride equals their kernel size and exceeds 1."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride != (1, 1)]


def grid_modules(model: nn.Module) -> list[nn.Module]:
    """The modules whose output may have the grid of tokens, or that may mix tokens: convolutions, pools, embeddings."""
    return [m for m in model.modules() if is_grid_module(m)]


def is_grid_module(module: nn.Module) -> bool:
    """True for a module that `grid_modules` lists."""
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


def infer_layout(model: nn.Module, grids: Sequence[Grid], tokens: int) -> TokenLayout:
    """The layout of maps over `tokens` tokens.

    Args:
        model: the model, which declares its prefix tokens.
        grids: grids that the tokens may have, for the actual input.
        tokens: number of tokens.

    Raises:
        ValueError: prefix and grid do not add up to `tokens`, are unknown, or several grids do.
    """
    advice = "pass layout=attnx.TokenLayout(prefix=..., grid=(rows, columns)) to attnx.capture or Extractor"
    problem = next((grid.problem for grid in grids if grid.problem), None)
    if problem is not None:
        raise ValueError(f"{type(model).__name__}: {problem}")
    declared = declared_tokens(model)
    if declared is None or not grids:
        missing = "number of prefix tokens" if declared is None else "patch grid"
        raise ValueError(f"{type(model).__name__} does not declare its {missing}; {advice}")
    fitting = declared.layouts(grids, tokens)
    if len(fitting) == 1:
        return fitting.pop()
    after = f" + {declared.suffix}" if declared.suffix else ""
    sums = ", ".join(dict.fromkeys(f"{declared.prefix} + {grid}{after}" for grid in grids))
    if fitting:
        raise ValueError(f"{type(model).__name__}: several grids make {tokens} tokens: {sums}; {advice}")
    raise ValueError(f"{type(model).__name__}: expected {sums} tokens; got maps of {tokens}; {advice}")


def grid_of(module: nn.Module, args: Sequence[Any], output: object) -> Grid | None:
    """The grid of a module of `grid_modules` from a call: its output is [B, C, h, w], [C, h, w] or [B, C, t, h, w].

    None for other outputs.
    """
    kind = type(module).__name__
    if kind == "NaFlexEmbeds":
        x, shape = output if isinstance(output, tuple) and len(output) == 2 else (None, None)
        if not isinstance(x, Tensor) or not shape:
            return None
        return Grid((int(shape[0]), int(shape[1])), x.shape[-1], 1, len(x), step=_step(module))
    if not isinstance(output, Tensor) or isinstance(module, _SEQUENCE_MIXERS):
        return None
    if kind == "Siglip2VisionEmbeddings":
        shapes = args[1] if len(args) > 1 else None
        found = _common_grid(shapes, output) if isinstance(shapes, Tensor) else None
        return None if found is None else found._replace(step=_step(module))
    if isinstance(module, nn.Conv3d):
        if output.dim() != 5:
            return None
        shape = int(output.shape[-2]), int(output.shape[-1])
        return Grid(shape, int(output.shape[1]), int(output.shape[2]), len(output), step=_step(module))
    if output.dim() in (3, 4):
        shape = int(output.shape[-2]), int(output.shape[-1])
        return Grid(shape, int(output.shape[-3]), items=len(output) if output.dim() == 4 else 1, step=_step(module))
    return None


def _step(module: nn.Module) -> tuple[int, int]:
    """`Grid.step` of a module: its stride, or the patch size of an embedding of patches."""
    step = getattr(module, "stride", None) or getattr(module, "patch_size", None) or (0, 0)
    step = (step, step) if isinstance(step, int) else tuple(step)[-2:]
    return (int(step[0]), int(step[1])) if len(step) == 2 else (0, 0)


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
