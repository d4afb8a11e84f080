"""Options of the pictures that the commands draw."""

from dataclasses import dataclass

from attnx.figures.picture import check, check_colours


@dataclass(frozen=True)
class Style:
    """Options of the pictures.

    Attributes:
        cmap: a name in `matplotlib.colormaps`.
        alpha: opacity of the colours, 0 to 1.
        interpolation: "bilinear" or "nearest".
        mass: share of each map's mass inside its mask, see `attnx.mass_mask`.
        tile: pixels of the longer side of the pictures of a sheet; None: the image's own size.
        scale: "each" or "shared", see `attnx.picture.heads_grid`.
        colorbar: draw the colours and their values.

    Raises:
        ValueError: an unknown name, or an opacity out of range.
    """

    cmap: str = "turbo"
    alpha: float = 0.5
    interpolation: str = "bilinear"
    mass: float = 0.6
    tile: int | None = 256
    scale: str = "each"
    colorbar: bool = False

    def __post_init__(self) -> None:
        check_colours(self.cmap, self.alpha, self.interpolation)
        check(self.scale in ("each", "shared"), "scale", "each or shared", repr(self.scale))
