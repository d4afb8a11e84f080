"""The windows of the block that runs, read from its attributes and its input."""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

from torch import Tensor, nn

from attnx.trace.facts import parameters
from attnx.trace.windows import Pair, Windows, grid_index, window_index


def windows_of(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Windows | None:
    """The windows of a block, while the attention inside the block runs; None for other modules.

    Call it then and not before: blocks of transformers set `window_size` and `shift_size` in their forward. Blocks are
    recognised by class and package. Copies of microsoft's code are recognised by the names that their forward uses.

    Args:
        module: the block, or the attention itself in torchvision and Twins.
        args, kwargs: arguments of the block's call.
    """
    kind: Any = type(module)
    read = _reader(kind)
    if read is None:
        return None
    given = dict(zip(parameters(kind), args, strict=False)) | dict(kwargs)
    x = given.get(next(iter(parameters(kind)), ""))
    if not isinstance(x, Tensor):
        return None
    try:
        return read(module, x, next((given[name] for name in _SIZES if name in given), None))
    except (AttributeError, TypeError, ValueError):
        return None  # another class of this name


@cache
def may_have_windows(kind: Any) -> bool:
    """True for a class that `windows_of` may know."""
    return _reader(kind) is not None


def _reader(kind: Any) -> "_Reader | None":
    """The function that reads the windows of a class."""
    readers, source = _READERS.get(kind.__name__, {}), kind.__module__ + "."
    return next((read for package, read in readers.items() if package and source.startswith(package)), readers.get(""))


def _pair(value: Any) -> Pair:
    """(rows, columns) from a pair, or from one number for both."""
    rows, columns = value if isinstance(value, list | tuple) else (value, value)
    return int(rows), int(columns)


def _windows(grid: Any, window: Any, shift: Any = 0, roll_first: bool = False) -> Windows:
    return _cached(_pair(grid), _pair(window), _pair(shift), roll_first)


@lru_cache(maxsize=256)
def _cached(grid: Pair, window: Pair, shift: Pair, roll_first: bool) -> Windows:
    return Windows(window_index(grid, window, shift, roll_first), grid)


@lru_cache(maxsize=256)
def _spread(grid: Pair, size: Pair) -> Windows:
    return Windows(grid_index(grid, size), grid)


def _timm_swin(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of timm's Swin: [B, H, W, C]."""
    return _windows(x.shape[1:3], module.window_size, module.shift_size, roll_first=True) if x.dim() == 4 else None


def _torchvision_block(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of torchvision's Swin: [B, H, W, C]."""
    return _torchvision(module.attn, x, size)


def _microsoft(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of microsoft's code and its copies, such as LAVT's: [B, H * W, C].

    The code for classification has one resolution and no padding; SwinIR's has (H, W) as second argument. In that for
    detection the layer sets H and W for each input, and the block pads and then rolls.
    """
    names = getattr(getattr(type(module).forward, "__code__", None), "co_names", ())
    if not {"roll", "window_partition", "window_reverse", "window_size", "shift_size"} <= set(names):
        return None
    if "pad" in names:
        grid = (module.H, module.W) if names.index("pad") < names.index("roll") else None
    elif len(parameters(type(module))) > 1:
        grid = size
    else:
        grid = module.input_resolution
    if x.dim() != 3 or grid is None or x.shape[1] != grid[0] * grid[1]:
        return None
    return _windows(grid, module.window_size, module.shift_size)


def _torchvision(module: Any, x: Tensor, size: Any) -> Windows | None:
    """ShiftedWindowAttention [B, H, W, C]. An axis of one window is not shifted."""
    if x.dim() != 4:
        return None
    grid, window, shift = _pair(x.shape[1:3]), _pair(module.window_size), _pair(module.shift_size)
    rows, columns = (0 if n <= of else by for n, of, by in zip(grid, window, shift, strict=True))
    return _windows(grid, window, (rows, columns))


def _transformers(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Swin layers of transformers: [B, H * W, C], and (H, W) as second argument."""
    return None if size is None else _windows(size, module.window_size, module.shift_size)


def _maxvit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Window or grid attention of MaxViT: [B, H, W, C], or [B, C, H, W] for PartitionAttention2d."""
    if x.dim() != 4:
        return None
    grid = _pair(x.shape[2:] if type(module).__name__ == "PartitionAttention2d" else x.shape[1:3])
    if module.partition_block:
        return _windows(grid, module.partition_size)
    return _spread(grid, _pair(module.partition_size))


def _davit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """SpatialBlock [B, C, H, W]."""
    return _windows(x.shape[2:], module.window_size) if x.dim() == 4 else None


def _sam(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of SAM's image encoder, [B, H, W, C]; window_size 0: no windows."""
    window = getattr(module, "window_size", 0)
    return _windows(x.shape[1:3], window) if x.dim() == 4 and isinstance(window, int) and window > 0 else None


def _twins(module: Any, x: Tensor, size: Any) -> Windows | None:
    """LocallyGroupedAttn: [B, H * W, C], and (H, W) as second argument."""
    return None if size is None else _windows(size, module.ws)


def _gcvit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of GC ViT, [B, H, W, C]. If the queries are of the whole image, each token of a window has one."""
    return _windows(x.shape[1:3], module.window_size) if x.dim() == 4 else None


def _nest(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Levels of NesT, [B, C, H, W] before the level's pool, which halves H and W."""
    if x.dim() != 4:
        return None
    divisor = 1 if isinstance(module.pool, nn.Identity) else 2
    return _windows([n // divisor for n in x.shape[2:]], module.block_size)


def _mobilevit(module: Any, x: Tensor, size: Any) -> Windows | None:
    """MobileViT's blocks [B, C, H, W]. A window has one pixel of each patch; the grid is resized to whole patches."""
    if x.dim() != 4:
        return None
    patch = module.patch_size if hasattr(module, "patch_size") else (module.patch_height, module.patch_width)
    halved = getattr(module, "downsampling_layer", None)  # transformers
    stride = 1 if halved is None else halved.conv_3x3.convolution.stride[0]
    rows, columns = (-(-n // (stride * by)) for n, by in zip(x.shape[2:], patch, strict=True))
    return _spread((rows * patch[0], columns * patch[1]), (rows, columns))


def _attnx_swin(module: Any, x: Tensor, size: Any) -> Windows | None:
    """Blocks of `attnx.models.lavt_swin`: [B, H * W, C], and (H, W) as second argument."""
    if size is None or not hasattr(module, "window") or not hasattr(module, "shift"):
        return None
    return _windows(size, module.window, module.shift)


_SIZES = ("input_dimensions", "size", "grid", "x_size")  # names of the arguments that hold (H, W)
_Reader = Callable[[Any, Tensor, Any], Windows | None]
_TRANSFORMERS: dict[str, _Reader] = {"transformers.": _transformers}
# {class: {start of its module's name: reader}}; "": any module.
_READERS: dict[str, dict[str, _Reader]] = {
    "SwinBlock": {"attnx.": _attnx_swin},
    "SwinTransformerBlock": {"timm.": _timm_swin, "torchvision.": _torchvision_block, "": _microsoft},
    "SwinTransformerBlockV2": {"torchvision.": _torchvision_block},
    "SwinTransformerV2Block": {"timm.": _timm_swin},
    "SwinTransformerV2CrBlock": {"timm.": _timm_swin},
    "ShiftedWindowAttention": {"torchvision.": _torchvision},
    "ShiftedWindowAttentionV2": {"torchvision.": _torchvision},
    "SwinLayer": _TRANSFORMERS,
    "Swinv2Layer": _TRANSFORMERS,
    "DonutSwinLayer": _TRANSFORMERS,
    "MaskFormerSwinLayer": _TRANSFORMERS,
    "PartitionAttentionCl": {"timm.": _maxvit},
    "PartitionAttention2d": {"timm.": _maxvit},
    "SpatialBlock": {"timm.": _davit},
    "Block": {"timm.models.vision_transformer_sam.": _sam, "segment_anything.": _sam},
    "SamVisionLayer": {"transformers.": _sam},
    "LocallyGroupedAttn": {"timm.": _twins},
    "GlobalContextVitBlock": {"timm.": _gcvit},
    "NestLevel": {"timm.": _nest},
    "MobileVitBlock": {"timm.": _mobilevit},
    "MobileViTLayer": {"transformers.": _mobilevit},
}
