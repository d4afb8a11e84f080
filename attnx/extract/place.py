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
        x, y: the place, from the left and the top, in pixels.
        share: True if x and y are shares of what the model sees instead.
    """

    index: int | None
    x: float = 0.0
    y: float = 0.0
    share: bool = False

    @classmethod
    def parse(cls, text: str) -> "Place":
        """The place in a text: "17" (an index), "320,240" (pixels), or "50%,25%" (shares of width and height).

        Raises:
            ValueError: the text has another form, a share is above 100 %, or pixels are all below 1.

        Example:
            >>> Place.parse("50%,25%")
            Place(index=None, x=0.5, y=0.25, share=True)
        """
        if re.fullmatch(r"-?\d{1,9}", text):
            return cls(int(text))
        expected = "token: expected X,Y in pixels such as 320,240, shares such as 50%,25%, or an index"
        found = re.fullmatch(rf"({_NUMBER})(%?),\s*({_NUMBER})(%?)", text)
        if found is None or found[2] != found[4]:
            raise ValueError(f"{expected}; got {text!r:.80}")
        x, y, share = float(found[1]), float(found[3]), found[2] == "%"
        if share and (x > 100 or y > 100):
            raise ValueError(f"token: expected shares of at most 100%; got {text!r}")
        if not share and 0 < max(x, y) < 1:
            raise ValueError(f"token: expected pixels, or shares such as {100 * x:g}%,{100 * y:g}%; got {text!r}")
        return cls(None, x / 100, y / 100, True) if share else cls(None, x, y)

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
        try:
            return layout.token_at(self.x, self.y, size)
        except ValueError as error:
            raise ValueError(str(error).replace("token_at:", "token:", 1)) from error


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
