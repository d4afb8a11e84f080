"""Options of the pictures that the commands draw."""

from dataclasses import dataclass

from attnx.figures.picture import check


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
        from matplotlib import colormaps

        check(self.cmap in colormaps, "cmap", "turbo, jet, viridis or another of matplotlib", repr(self.cmap))
        check(0 <= self.alpha <= 1, "alpha", "0..1", self.alpha)
        known = ("bilinear", "nearest")
        check(self.interpolation in known, "interpolation", "bilinear or nearest", repr(self.interpolation))
        check(self.scale in ("each", "shared"), "scale", "each or shared", repr(self.scale))
