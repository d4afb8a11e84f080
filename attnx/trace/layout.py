"""Which tokens are the prefix and which are patches, and on what grid. Read from the model and its actual input."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

# Prefix tokens, class token among them, of Hugging Face vision models by model_type; registers come on top.
_HF_PREFIX = {
    "vit": 1, "deit": 2, "dinov2": 1, "dinov2_with_registers": 1, "dinov3_vit": 1, "ijepa": 0,
    "clip": 1, "clip_vision_model": 1, "siglip": 0, "siglip_vision_model": 0, "siglip2_vision_model": 0, "beit": 1,
}  # fmt: skip

# Names of parameters, and of attributes that count further tokens: in the original code of DINOv2, DINOv3 and DeiT.
_CLASS_TOKENS = {"cls_token", "class_token", "class_embedding"}
_REGISTERS = ("num_register_tokens", "n_storage_tokens", "num_registers")


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a map: `prefix` tokens (class token, registers, ...) and then the patches, row by row.

    Args:
        prefix: number of tokens before the patches.
        grid: (rows, columns) of patches.
        cls: whether token 0 is a class token; whether there is a prefix at all, unless given.
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
        """Prefix and patches together: the N of a map."""
        return self.prefix + self.grid[0] * self.grid[1]

    def patches(self, values: Tensor) -> Tensor:
        """[..., N] values of the tokens -> [..., h, w] of the patches.

        Raises:
            ValueError: the last dimension is not the number of tokens.
        """
        if values.shape[-1] != self.tokens:
            raise ValueError(f"expected {self.tokens} tokens for {self}; got {list(values.shape)}")
        return values[..., self.prefix :].unflatten(-1, self.grid)


def declared_prefix(model: nn.Module) -> tuple[int, bool] | None:
    """(prefix tokens, has a class token) as the model itself declares them; None if it doesn't."""
    for module in model.modules():
        prefix = getattr(module, "num_prefix_tokens", None)
        if isinstance(prefix, int):
            return prefix, getattr(module, "cls_token", None) is not None
        config = getattr(module, "config", None)
        config = getattr(config, "vision_config", config)
        kind = getattr(config, "model_type", None)
        if kind == "vit_mae":
            return None  # it shuffles its patches: no grid is theirs
        if kind in _HF_PREFIX:
            return _HF_PREFIX[kind] + (getattr(config, "num_register_tokens", 0) or 0), _HF_PREFIX[kind] > 0
    own = {name.rpartition(".")[2] for name, _ in model.named_parameters()}
    if not own & _CLASS_TOKENS:
        return None
    counts = (getattr(model, name, 0) for name in _REGISTERS)
    return 1 + ("dist_token" in own) + next((n for n in counts if isinstance(n, int) and n), 0), True


def declared_input(model: nn.Module) -> tuple[int, int, int] | None:
    """(channels, height, width) of the images that a timm or Hugging Face model says it was made for; else None."""
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
    """The convolutions that cut images into patches: those whose stride is their kernel, greater than 1."""
    return [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == m.stride != (1, 1)]


def infer_layout(model: nn.Module, grids: Sequence[tuple[int, int]], tokens: int) -> TokenLayout:
    """The layout of maps over `tokens` tokens, from the grids that patch convolutions gave for the actual input.

    Raises:
        ValueError: the model's prefix and grid don't add up to the tokens, or are not known.
    """
    way_out = "pass layout=attnx.TokenLayout(prefix=..., grid=(rows, columns))"
    declared = declared_prefix(model)
    if declared is None or not grids:
        missing = "how many prefix tokens it has" if declared is None else "its patch grid"
        raise ValueError(f"{type(model).__name__} doesn't say {missing}; {way_out}")
    prefix, cls = declared
    for grid in grids:
        if prefix + grid[0] * grid[1] == tokens:
            return TokenLayout(prefix, grid, cls)
    sums = ", ".join(f"{prefix} + {h} * {w}" for h, w in grids)
    raise ValueError(f"{type(model).__name__}: expected {sums} tokens; got maps of {tokens}; {way_out}")


def grid_of(output: object) -> tuple[int, int] | None:
    """(rows, columns) of a patch convolution's output [B, C, h, w] or [C, h, w]."""
    if isinstance(output, torch.Tensor) and output.dim() in (3, 4):
        return int(output.shape[-2]), int(output.shape[-1])
    return None
