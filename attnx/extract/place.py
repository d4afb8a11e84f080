"""A token by its index, or by a place in the picture: the option `--token`."""

import re
from dataclasses import dataclass

from attnx.methods.token_map import token_layer
from attnx.trace.layout import TokenLayout
from attnx.trace.trace import Trace

_NUMBER = r"\d{1,6}(?:\.\d{1,6})?"


@dataclass(frozen=True)
class Place:
    """A token.

    Attributes:
        index: of the token; None: it is the patch at a place in the picture.
        x, y: the place, from the left and the top: in pixels, or with `share` in shares of the picture.
        share: see x, y.
    """

    index: int | None
    x: float = 0.0
    y: float = 0.0
    share: bool = False

    @classmethod
    def parse(cls, text: str) -> "Place":
        """The place in a text: "17" (an index), "320,240" (pixels), or "50%,25%" (shares of width and height).

        Raises:
            ValueError: the text has another form, or a share above 100 %.

        Example:
            >>> Place.parse("50%,25%")
            Place(index=None, x=0.5, y=0.25, share=True)
        """
        if re.fullmatch(r"-?\d{1,9}", text):
            return cls(int(text))
        pixels = re.fullmatch(rf"({_NUMBER}),\s*({_NUMBER})", text)
        if pixels:
            return cls(None, float(pixels[1]), float(pixels[2]))
        shares = re.fullmatch(rf"({_NUMBER})%,\s*({_NUMBER})%", text)
        x, y = (float(shares[i]) / 100 for i in (1, 2)) if shares else (2.0, 2.0)
        if x > 1 or y > 1:
            raise ValueError(
                f"token: expected X,Y in pixels such as 320,240, shares such as 50%,25%, or an index; got {text!r:.80}"
            )
        return cls(None, x, y, True)

    def token(self, layout: TokenLayout, size: tuple[int, int] | None) -> int:
        """Index of the token.

        Args:
            layout: of the tokens.
            size: (height, width) of the picture in pixels; None: pictures have different sizes.

        Raises:
            ValueError: a place in pixels without a size, or outside the picture.
        """
        if self.index is not None:
            return self.index
        if self.share:
            # The right and the bottom edge belong to the last patches.
            below_one = 1 - 1e-9
            return layout.token_at(min(self.x, below_one), min(self.y, below_one), (1, 1))
        if size is None:
            got = f"{self.x:g},{self.y:g}"
            raise ValueError(f"token: expected shares such as 50%,25%, since pictures have different sizes; got {got}")
        return layout.token_at(self.x, self.y, size)


def layout_of_tokens(trace: Trace) -> tuple[str, TokenLayout]:
    """The last layer over patches, or over windows of a known grid, and the layout of its tokens.

    Raises:
        ValueError: there is none.
    """
    layer = token_layer(trace)
    if layer is None:
        raise ValueError("token: expected a layer of self-attention over the patches of an image; got none")
    windows = trace.windows(layer)
    return layer, trace.layout_of(layer) if windows is None else TokenLayout(0, windows.grid)
