"""Results of `attnx.word_maps` and `attnx.gradcam`: the maps of a caption's tokens, words and phrases."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from html import escape
from typing import TYPE_CHECKING, overload

import torch
from torch import Tensor

from attnx.images.inline import titled_heat

if TYPE_CHECKING:
    from attnx.models.loaded import Picture
    from attnx.models.tokenizer import Caption
    from attnx.page.page import Page


@dataclass(frozen=True, eq=False, repr=False)
class CaptionMaps:
    """The maps of one caption's words.

    Attributes:
        caption: the tokenised caption.
        maps: [T, h, w] float32, one for each token including [CLS] and [SEP], without padding.
        score: the logit of a match of image and caption, from `attnx.gradcam`; else None.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.albef import demo_albef
        >>> found = attnx.word_maps(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle"], layer=2)[0]
        >>> found.words, found.word_maps.shape
        (('a', 'red', 'circle'), torch.Size([3, 12, 12]))
        >>> found.phrase("red circle").shape
        torch.Size([12, 12])
    """

    caption: "Caption"
    maps: Tensor
    score: float | None = None

    @property
    def tokens(self) -> tuple[str, ...]:
        """The T word pieces."""
        return self.caption.tokens

    @property
    def words(self) -> tuple[str, ...]:
        """The W words."""
        return self.caption.words

    @property
    def unknown(self) -> tuple[str, ...]:
        """The words with a piece that is not in the vocabulary ([UNK]), in order, each once."""
        return self.caption.unknown

    @cached_property
    def word_maps(self) -> Tensor:
        """The maps of the words, [W, h, w]: the mean over the pieces of each word."""
        word_of = self.caption.word_of
        pieces = [[t for t, word in enumerate(word_of) if word == w] for w in range(len(self.words))]
        return torch.stack([self.maps[chosen].mean(0) for chosen in pieces])

    def explore(self, image: "Picture | None" = None) -> "Page":
        """An interactive page: the patches of each word, and the words of each patch.

        Args:
            image: the picture, or the path of one; None: the page has no picture.

        Example:
            >>> import torch, attnx
            >>> from attnx.demo.albef import demo_albef
            >>> found = attnx.word_maps(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle"], layer=2)[0]
            >>> found.explore().save("words.html")
        """
        from attnx.page.words import words_page

        return words_page({"maps": self}, image)

    def __repr__(self) -> str:
        score = "" if self.score is None else f", score={self.score:+.2f}"
        return f"{type(self).__name__}({self.caption.text!r}, {list(self.maps.shape)}{score})"

    def _repr_html_(self) -> str:
        """The map of each word, for notebooks."""
        score = "" if self.score is None else f" (match {self.score:+.2f})"
        words = zip(self.words, self.word_maps.float().cpu().numpy(), strict=True)
        return f"<div>{escape(self.caption.text)}{score}<br>{''.join(titled_heat(*each) for each in words)}</div>"

    @property
    def lavis(self) -> Tensor:
        """The maps in LAVIS's order, [T + 1, h, w]: [CLS], the mean of the words' tokens, the rest."""
        return torch.cat([self.maps[:1], self.maps[1:-1].mean(0, keepdim=True), self.maps[1:]])

    def phrase(self, phrase: str) -> Tensor:
        """The mean map of the words of a phrase, [h, w], at its first occurrence in the caption.

        Raises:
            ValueError: the phrase is not in the caption.
        """
        from attnx.models.tokenizer import pre_caption

        wanted = tuple(pre_caption(phrase).split(" "))
        for start in range(len(self.words) - len(wanted) + 1):
            if self.words[start : start + len(wanted)] == wanted:
                return self.word_maps[start : start + len(wanted)].mean(0)
        raise ValueError(f"phrase: expected consecutive words of {self.caption.text!r}; got {phrase!r}")


class WordMaps(Sequence[CaptionMaps]):
    """A sequence of `CaptionMaps` in the order of the captions.

    Example:
        >>> import torch, attnx
        >>> from attnx.demo.albef import demo_albef
        >>> maps = attnx.word_maps(demo_albef(), torch.rand(1, 3, 96, 96), ["a red circle", "a star"], layer=2)
        >>> maps
        WordMaps('a red circle': [5, 12, 12], 'a star': [4, 12, 12])
    """

    def __init__(self, captions: Sequence[CaptionMaps]) -> None:
        self._captions = tuple(captions)

    @overload
    def __getitem__(self, i: int) -> CaptionMaps: ...
    @overload
    def __getitem__(self, i: slice) -> "WordMaps": ...
    def __getitem__(self, i: int | slice) -> "CaptionMaps | WordMaps":
        return WordMaps(self._captions[i]) if isinstance(i, slice) else self._captions[i]

    def __len__(self) -> int:
        return len(self._captions)

    def __iter__(self) -> Iterator[CaptionMaps]:
        return iter(self._captions)

    def _repr_html_(self) -> str:
        """The maps of each caption's words, for notebooks."""
        return "".join(each._repr_html_() for each in self)

    def __repr__(self) -> str:
        return f"WordMaps({', '.join(f'{c.caption.text!r}: {list(c.maps.shape)}' for c in self)})"
