"""LAVT's maps of images for each word of an expression: the attention of its stages from pixels to words."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnx.extract.captions import CaptionMaps, WordMaps
from attnx.extract.lavt_rollout import lavt_word_rollout
from attnx.extract.pairs import flat, padded
from attnx.models.lavt import Lavt
from attnx.models.tokenizer import Caption, pre_caption
from attnx.trace.capture import capture
from attnx.trace.trace import Trace

LAVT_METHODS = ("attention", "rollout")
_WORDS = "layers.{}.fusion.image_lang_att"


@overload
def lavt_word_maps(
    model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor, stage: None = None, *, backend: str = "auto"
) -> list[Tensor]: ...
@overload
def lavt_word_maps(
    model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor, stage: int, *, backend: str = "auto"
) -> Tensor: ...
def lavt_word_maps(
    model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor, stage: int | None = None, *, backend: str = "auto"
) -> list[Tensor] | Tensor:
    """The attention from every pixel of a stage's grid to each word piece, mean of the heads.

    Pixels are queries and words are keys: ``map[b, t, y, x] = P[b, (y, x), t]``. At every pixel the weights of all
    pieces, [CLS] and [SEP] included, sum to 1, and those of padding are 0. The forward pass ends with the last stage
    that is asked for.

    Args:
        model: an `attnx.models.lavt.Lavt` in eval mode.
        images: [B, 3, height, width] float, normalised with ImageNet's mean and std.
        ids, mask: [B, T] word pieces, int64, and bool, False for padding; see `pad_captions`.
        stage: 0 to 3; None: all stages.
        backend: as in `attnx.attention`.

    Returns:
        [B, T, h_s, w_s] float32 of stage s, with h_s = ceil(ceil(height / 4) / 2^s); for stage=None the list of all.

    Raises:
        ValueError: no Lavt in eval mode, another stage, or invalid images, ids or masks.

    Reference:
        Yang et al., "LAVT", https://arxiv.org/abs/2112.02244; https://github.com/yz93/LAVT-RIS

    Example:
        >>> import torch
        >>> from attnx.models.lavt import Lavt, LavtConfig
        >>> config = LavtConfig(24, (1, 1, 1, 1), (1, 2, 4, 8), 4, text_width=32, text_depth=1, text_heads=2)
        >>> ids, mask = torch.tensor([[101, 3899, 102]]), torch.ones(1, 3, dtype=torch.bool)
        >>> maps = lavt_word_maps(Lavt(config).eval(), torch.rand(1, 3, 64, 48), ids, mask)
        >>> [list(m.shape) for m in maps]
        [[1, 3, 16, 12], [1, 3, 8, 6], [1, 3, 4, 3], [1, 3, 2, 2]]
    """
    lavt, stages = _checked(model, images, ids, mask), _stages(stage)
    names = [_WORDS.format(s) for s in stages]
    with torch.inference_mode():
        trace = _captured(lavt, images, ids, mask, names, stages[-1], backend)
        grids = lavt.grids(images)
        maps = [trace[name].mT.unflatten(2, grids[s]) for name, s in zip(names, stages, strict=True)]
    return maps if stage is None else maps[0]


@dataclass(frozen=True, eq=False, repr=False)
class ExpressionMaps(CaptionMaps):
    """The maps of one expression's words, where word pieces are keys: weights are added, not averaged."""

    @cached_property
    def word_maps(self) -> Tensor:
        """The maps of the words, [W, h, w]: the sum over the pieces of each word."""
        return sum_pieces(self.maps, self.caption)

    def phrase(self, phrase: str) -> Tensor:
        """The sum of the maps of the words of a phrase, [h, w], at its first occurrence; punctuation is not compared.

        Raises:
            ValueError: the phrase is not in the caption.
        """
        wanted, own = ([pre_caption(word) for word in words] for words in (phrase.split(), self.words))
        for start in range(len(own) - len(wanted) + 1):
            if wanted and own[start : start + len(wanted)] == wanted:
                return self.word_maps[start : start + len(wanted)].sum(0)
        raise ValueError(f"phrase: expected consecutive words of {self.caption.text!r}; got {phrase!r}")


def expression_maps(
    model: nn.Module,
    images: Tensor,
    captions: Sequence[str] | Sequence[Sequence[str]],
    stage: int | None = None,
    *,
    method: str = "attention",
    backend: str = "auto",
) -> WordMaps:
    """LAVT's word maps, see `attnx.word_maps`: [T, h, w] of each caption.

    Args:
        model: an `attnx.models.lavt.Lavt` with a tokenizer, in eval mode.
        images, captions, backend: as in `attnx.word_maps`.
        stage: 0 to 3. None: the mean of all stages; for "attention" interpolated to the grid of stage 0, which is exact
            for images whose sides are multiples of 32. With other sides, the grids of the stages reach beyond the image
            by up to one cell.
        method: "attention": the attention of the stage, on its grid. "rollout": carried on to the grid of stage 0
            through the Swin blocks, see `attnx.extract.lavt_rollout`; each word's map sums to 1.

    Raises:
        ValueError: another method or stage, an invalid model or image, or a caption without words.

    Warns:
        UserWarning: a caption has more pieces than the model takes and was cut.

    Example:
        >>> import torch
        >>> from attnx.models.lavt import Lavt, LavtConfig
        >>> from attnx.models.tokenizer import Tokenizer
        >>> config = LavtConfig(24, (1, 1, 1, 1), (1, 2, 4, 8), 4, text_width=32, text_depth=1, text_heads=2)
        >>> vocab = Tokenizer(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog"], 20, plain=True)
        >>> model = Lavt(config, vocab).eval()
        >>> (found,) = expression_maps(model, torch.rand(1, 3, 64, 48), ["a dog"], 2, method="rollout")
        >>> found.word_maps.shape
        torch.Size([2, 16, 12])
    """
    check_method(method)
    lavt = _lavt(model)
    lavt.grids(images)
    texts, owner = flat(captions, len(images))
    read, ids, mask = pad_captions(lavt, texts, images.device)
    if owner != list(range(len(images))):
        images = images[owner]
    if method == "rollout":
        maps = _rolled(lavt, images, ids, mask, read, _stages(stage), backend)
    elif stage is None:
        stages = lavt_word_maps(lavt, images, ids, mask, backend=backend)
        height, width = stages[0].shape[-2:]
        maps = mean_of_stages(stages, (height, width))
    else:
        maps = lavt_word_maps(lavt, images, ids, mask, stage, backend=backend)
    return WordMaps([ExpressionMaps(caption, maps[i, : len(caption.ids)]) for i, caption in enumerate(read)])


def find_expressions(
    lavt: Lavt, method: str, stage: int | None, autocast: torch.dtype | None
) -> Callable[[Tensor, Sequence[Sequence[str]]], WordMaps]:
    """A function of images [I, 3, height, width] and the captions of each image that returns their `WordMaps`.

    Args:
        lavt: the model.
        method, stage: as in `expression_maps`.
        autocast: dtype of autocast; None: no autocast.

    Raises:
        ValueError: another method or stage.
    """
    check_method(method)
    _stages(stage)

    def find(images: Tensor, captions: Sequence[Sequence[str]]) -> WordMaps:
        with torch.autocast(images.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            return expression_maps(lavt, images, captions, stage, method=method)

    return find


def check_method(method: str) -> None:
    """Raise ValueError for a method that LAVT does not have."""
    if method not in LAVT_METHODS:
        raise ValueError(f"method: expected {' or '.join(LAVT_METHODS)} with LAVT; got {method!r}")


def _rolled(
    lavt: Lavt, images: Tensor, ids: Tensor, mask: Tensor, captions: Sequence[Caption], stages: range, backend: str
) -> Tensor:
    """The mean of the stages' rollouts, [B, T, h_0, w_0]; see `lavt_word_rollout`."""
    blocks = [f"layers.{s}.blocks.{b}.attn" for s in range(stages[-1] + 1) for b in range(lavt.config.depths[s])]
    names = [*blocks, *(_WORDS.format(s) for s in stages)]
    with torch.inference_mode():
        trace = _captured(lavt, images, ids, mask, names, stages[-1], backend)
        return torch.stack([lavt_word_rollout(trace, s, captions) for s in stages]).mean(0)


def sum_pieces(maps: Tensor, caption: Caption) -> Tensor:
    """[T, h, w] maps of pieces -> [W, h, w] maps of words: the sum over the pieces of each word.

    Pieces are keys, so a pixel's weight for a word is the sum of its weights for the word's pieces. T may include
    padding. The weights of [CLS] and [SEP] belong to no word.
    """
    return torch.stack(
        [
            maps[[t for t, word in enumerate(caption.word_of) if word == w]].sum(0)
            for w in range(len(caption.words))
        ]
    )  # fmt: skip


def mean_of_stages(maps: Sequence[Tensor], size: tuple[int, int]) -> Tensor:
    """The mean of maps [..., K, h_s, w_s], each interpolated to `size` (bilinear): [..., K, height, width]."""
    scaled = [
        F.interpolate(m.reshape(1, -1, *m.shape[-2:]), size=size, mode="bilinear", align_corners=False) for m in maps
    ]
    return torch.stack(scaled).mean(0).view(*maps[0].shape[:-2], *size)


def pad_captions(
    model: Lavt, captions: Sequence[str], device: torch.device | None = None
) -> tuple[list[Caption], Tensor, Tensor]:
    """The tokenised captions, their ids [B, T] padded to the model's 20 pieces, and the mask [B, T]: False for padding.

    Raises:
        ValueError: the model has no tokenizer, or an invalid caption.

    Warns:
        UserWarning: a caption has more pieces and was cut.
    """
    length = None if model.tokenizer is None else model.tokenizer.max_tokens
    return padded(model.tokenizer, captions, device, length)


def _captured(
    lavt: Lavt, images: Tensor, ids: Tensor, mask: Tensor, names: list[str], last: int, backend: str
) -> Trace:
    """A capture of layers of the backbone, whose pass ends with stage `last`."""
    words = lavt.encode_text(ids, mask)
    with capture(lavt.backbone, names, backend=backend) as trace:
        lavt.backbone(images, words, mask, last=last)
    return trace


def _stages(stage: int | None) -> range:
    """The chosen stage, or all for None."""
    if stage not in (None, 0, 1, 2, 3):
        raise ValueError(f"stage: expected 0, 1, 2 or 3, or None for all; got {stage!r}")
    return range(4) if stage is None else range(stage, stage + 1)


def _lavt(model: nn.Module) -> Lavt:
    """The model, after a check of its class and mode."""
    if not isinstance(model, Lavt):
        raise ValueError(f"model: expected an attnx.models.lavt.Lavt; got {type(model).__name__}")
    if model.training:
        raise ValueError("model: expected eval mode; got training mode; call model.eval()")
    return model


def _checked(model: nn.Module, images: Tensor, ids: Tensor, mask: Tensor) -> Lavt:
    """The model, after a check of the arguments of `lavt_word_maps`."""
    model = _lavt(model)
    model.grids(images)
    if ids.dim() != 2 or len(ids) != len(images) or ids.dtype != torch.int64:
        raise ValueError(f"ids: expected int64 [{len(images)}, T]; got {ids.dtype} {list(ids.shape)}")
    if mask.shape != ids.shape or mask.dtype != torch.bool or not mask.any(1).all():
        raise ValueError(
            f"mask: expected bool {list(ids.shape)}, with a True in each row; got {mask.dtype} {list(mask.shape)}"
        )
    return model
