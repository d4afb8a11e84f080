"""Pictures of maps over images: `attnx.picture.overlay(photo, amap)`.

A map is a torch tensor (any device, any real dtype) or a numpy array; an image is a `PIL.Image`, the path of a file, or
a uint8 array [H, W, 3]. `overlay`, `mask_contour`, `contact_sheet` and `captioned` return an RGB `PIL.Image`;
`heads_grid` and `layers_figure` return a `Sheet`, which writes PNG, PDF and SVG. Invalid arguments raise `ValueError`
with their name, the expected and the actual value.
"""

from attnx.figures.picture import heat, mask_contour, overlay
from attnx.figures.sheets import Sheet, captioned, contact_sheet, heads_grid, layers_figure

__all__ = ["Sheet", "captioned", "contact_sheet", "heads_grid", "heat", "layers_figure", "mask_contour", "overlay"]
