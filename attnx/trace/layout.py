"""Token layouts: the number of prefix tokens and the grid of patches, read from the model and its actual input."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Number of prefix tokens of Hugging Face vision models by model_type, class token included, registers excluded.
_HF_PREFIX = {
    "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1, "dinov3_vit": 1, "ijepa": 0,
    "clip": 1, "clip_vision_model": 1, "siglip": 0, "siglip_vision_model": 0, "siglip2_vision_model": 0, "beit": 1,
}  # fmt: skip

# Parameter names of class tokens, and attributes that count register tokens, in the code of DINOv2, DINOv3 and DeiT.
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}
_REGISTERS = ("num_register_tokens", "n_storage_tokens", "num_registers")


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a map: `prefix` tokens (class token, registers, ...), then the patches, row by row.

    Args:
        prefix: number of tokens before the patches.
        grid: (rows, columns) of patches.
        cls: True if token 0 is a class token; None: True if there is a prefix.

    Raises:
        ValueError: a negative prefix, an empty grid, or a class token without a prefix.

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

    def __post_init__(self) -> None:
        if self.prefix < 0 or len(self.grid) != 2 or min(self.grid) < 1:
            raise ValueError(f"TokenLayout: expected prefix >= 0 and a grid of (rows, columns) >= 1; got {self}")
        if self.cls and not self.prefix:
            raise ValueError("TokenLayout: expected a prefix of at least 1 with cls=True; got prefix=0")
        object.__setattr__(self, "grid", tuple(self.grid))
        if self.cls is None:
            object.__setattr__(self, "cls", self.prefix > 0)

    @property
    def tokens(self) -> int:
        """Number of prefix tokens and patches: the N of a map."""
        return self.prefix + self.grid[0] * self.grid[1]

    def patches(self, values: Tensor) -> Tensor:
        """The values of the patches: [..., N] -> [..., h, w].

        Raises:
            ValueError: the last dimension is not the number of tokens.
        """
        if values.shape[-1] != self.tokens:
            raise ValueError(f"expected {self.tokens} tokens for {self}; got {list(values.shape)}")
        image: Tensor = values[..., self.prefix :].unflatten(-1, self.grid)
        return image


def declared_prefix(model: nn.Module) -> tuple[int, bool] | None:
    """(number of prefix tokens, True if there is a class token) as the model declares them; None if it does not."""
    for module in model.modules():
        prefix = getattr(module, "num_prefix_tokens", None)
        if isinstance(prefix, int):
            return prefix, getattr(module, "cls_token", None) is not None
        config = getattr(module, "config", None)
        config = getattr(config, "vision_config", config)
        kind = getattr(config, "model_type", None)
        if kind == "vit_mae":
            return None  # ViT-MAE shuffles its patches: they form no grid
        if kind in _HF_PREFIX:
            return _HF_PREFIX[kind] + (getattr(config, "num_register_tokens", 0) or 0), _HF_PREFIX[kind] > 0
    own = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    if not own & _CLASS_TOKENS:
        return None
    counts = (getattr(model, name, 0) for name in _REGISTERS)
    return 1 + ("dist_token" in own) + next((n for n in counts if isinstance(n, int) and n), 0), True


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


def infer_layout(model: nn.Module, grids: Sequence[tuple[int, int]], tokens: int) -> TokenLayout:
    """The layout of maps over `tokens` tokens.

    Args:
        model: the model, which declares its prefix tokens.
        grids: (rows, columns) of the outputs of the patch convolutions for the actual input.
        tokens: number of tokens.

    Raises:
        ValueError: prefix and grid do not add up to `tokens`, or are unknown.
    """
    advice = "pass layout=attnx.TokenLayout(prefix=..., grid=(rows, columns))"
    declared = declared_prefix(model)
    if declared is None or not grids:
        missing = "number of prefix tokens" if declared is None else "patch grid"
        raise ValueError(f"{type(model).__name__} does not declare its {missing}; {advice}")
    prefix, cls = declared
    for grid in grids:
        if prefix + grid[0] * grid[1] == tokens:
            return TokenLayout(prefix, grid, cls)
    sums = ", ".join(f"{prefix} + {h} * {w}" for h, w in grids)
    raise ValueError(f"{type(model).__name__}: expected {sums} tokens; got maps of {tokens}; {advice}")


def grid_of(output: object) -> tuple[int, int] | None:
    """(rows, columns) of a patch convolution's output [B, C, h, w] or [C, h, w]; None for other outputs."""
    if isinstance(output, torch.Tensor) and output.dim() in (3, 4):
        return int(output.shape[-2]), int(output.shape[-1])
    return None
