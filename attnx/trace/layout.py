"""Token layouts: the grid of patches and the tokens around it, read from the model and its actual input."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor, nn

from attnx.trace.grids import Grid, patch_convolutions

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
        >>> layout.token(1, 2), layout.token_at(250, 90, size=(100, 300))  # size: (height, width)
        (6, 6)
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

    def token(self, row: int, column: int, frame: int = 0) -> int:
        """Index of the patch in a row and a column of the grid, among all tokens.

        Raises:
            ValueError: the grid has no such row, column or frame.
        """
        rows, columns = self.grid
        if not (0 <= row < rows and 0 <= column < columns and 0 <= frame < self.frames):
            video = f" and frame in 0..{self.frames - 1}" if self.frames > 1 or frame else ""
            got = f"{row}, {column}" + (f" and frame {frame}" if video else "")
            raise ValueError(f"token: expected row in 0..{rows - 1}, column in 0..{columns - 1}{video}; got {got}")
        return self.prefix + (frame * rows + row) * columns + column

    def token_at(
        self, x: float, y: float, size: tuple[int, int], crop: Sequence[float] | None = None, frame: int = 0
    ) -> int:
        """Index of the patch that shows a place of the picture, among all tokens.

        Args:
            x, y: the place in pixels, from the picture's left and top.
            size: (height, width) of the picture in pixels. PIL's `image.size` is (width, height).
            crop: the part of the picture that the model saw, (left, top, right, bottom) in pixels; None: all of it.
            frame: of a video.

        Raises:
            ValueError: the place is outside the picture, or outside the part of it that the model saw.
        """
        height, width = size
        left, top, right, bottom = (0, 0, width, height) if crop is None else crop
        if not (max(left, 0) <= x < min(right, width) and max(top, 0) <= y < min(bottom, height)):
            seen = (
                "" if crop is None else f", of which the model saw x in {left:g}..{right:g}, y in {top:g}..{bottom:g}"
            )
            raise ValueError(
                f"token_at: expected a place in a picture {width} wide and {height} high{seen}; got {x:g}, {y:g}"
            )
        # Rounding may give the index after the last one.
        row = min(int((y - top) / (bottom - top) * self.grid[0]), self.grid[0] - 1)
        column = min(int((x - left) / (right - left) * self.grid[1]), self.grid[1] - 1)
        return self.token(row, column, frame)

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
