"""Attention whose input is a feature map: its tokens are the positions of the map, row by row."""

from collections.abc import Callable

import pytest
import timm
import torch
import torch.nn.functional as F
from test_families import built
from torch import Tensor, nn

import attnx


class Attention(nn.Module):
    """One head over all positions of [B, C, h, w], [B, h, w, C], or the frames and tokens of [B, F, N, C]."""

    def __init__(self, channels_last: bool) -> None:
        super().__init__()
        self.channels_last = channels_last

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.channels_last else x.movedim(1, -1)
        tokens = y.flatten(1, 2)[:, None]
        out = F.scaled_dot_product_attention(tokens, tokens, tokens).view_as(y)
        return out if self.channels_last else out.movedim(-1, 1)


class Model(nn.Module):
    """A convolution, `before`, attention."""

    def __init__(self, before: Callable[[Tensor], Tensor], channels_last: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.before = before
        self.attn = Attention(channels_last)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.attn(self.before(self.conv(x)))
        return out


def captured(model: nn.Module, batch: int = 2) -> attnx.Trace:
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(batch, 3, 8, 12, generator=torch.Generator().manual_seed(0)))
    return trace


@pytest.mark.parametrize("channels_last", [True, False])
def test_the_positions_of_a_feature_map_are_the_tokens(channels_last: bool) -> None:
    trace = captured(Model((lambda x: x.movedim(1, -1)) if channels_last else (lambda x: x), channels_last))
    queries, keys = trace.sides("attn")
    assert queries == keys
    assert (keys.kind, keys.grid, keys.prefix) == ("image", (4, 6), 0)


def halves(x: Tensor) -> Tensor:
    """Windows of 4 x 3: [2 B, 4, 3, C]."""
    return x.movedim(1, -1).unflatten(2, (2, 3)).movedim(2, 1).flatten(0, 1)


def as_frames(x: Tensor) -> Tensor:
    """[B, 3 "frames", 8 "tokens", C], which is not the shape of the convolution's output."""
    return x.movedim(1, -1).flatten(1, 2).unflatten(1, (3, 8))


@pytest.mark.parametrize("before", [halves, as_frames])
def test_windows_and_frames_are_not_taken_for_the_image(before: Callable[[Tensor], Tensor]) -> None:
    trace = captured(Model(before))
    assert trace.sides("attn")[1].grid is None
    with pytest.raises(ValueError, match="layout"):
        trace.layout_of("attn")


def test_a_pool_over_a_feature_map_has_its_mean_as_token_0() -> None:
    timm_layers = pytest.importorskip("timm.layers")
    torch.manual_seed(0)
    pool = timm_layers.AttentionPool2d(8, feat_size=(3, 4), num_heads=2)
    model = nn.Sequential(nn.Conv2d(3, 8, 2, stride=2), pool).eval()
    images = torch.randn(2, 3, 6, 8)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    keys = trace.sides("1")[1]
    assert (keys.grid, keys.prefix, keys.cls) == ((3, 4), 1, True)
    amap = attnx.cls_map(trace)
    assert amap.shape == (2, 3, 4)
    torch.testing.assert_close(amap.flatten(1), trace["1"][:, 0, 1:])
    extract = attnx.Extractor(model, "cls")
    torch.testing.assert_close(extract(images), amap)
    assert extract(torch.randn(3, 3, 8, 6)).shape == (3, 4, 3)  # as many tokens, in other rows


class Series(nn.Module):
    """A convolution over time, then attention over the steps."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(2, 16, 3, padding=1)
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(16, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).mT
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_steps_of_a_series_are_no_windows(batch: int) -> None:
    model = Series().eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(batch, 2, 12))
    assert [side.kind for side in trace.sides(0)] == ["tokens", "tokens"]
    assert attnx.rollout(trace, query="all").shape == (batch, 12, 12)


class TwoTowers(nn.Module):
    """An image encoder, and a text encoder whose embedding has a name that says nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = nn.Conv2d(3, 16, 4, 4)
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(16, 2) for _ in range(2))
        self.embed = nn.Embedding(20, 16)
        self.text = nn.ModuleList(timm.models.vision_transformer.Block(16, 2) for _ in range(2))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        x, y = self.visual(images).flatten(2).mT, self.embed(words)
        for image_block, text_block in zip(self.blocks, self.text, strict=True):
            x, y = image_block(x), text_block(y)
        return x.mean() + y


@pytest.mark.parametrize("captions", [2, 3, 4])
def test_texts_are_no_windows_of_the_images(captions: int) -> None:
    model = TwoTowers().eval()
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(2, 3, 8, 12), torch.randint(20, (captions, 5)))
    assert trace.sides("text.0.attn")[1].kind != "windows"
    assert attnx.rollout(trace, layers="text.*", query="all").shape == (captions, 5, 5)


def test_an_item_of_unknown_windows_is_refused() -> None:
    model, call, _ = built("timm hiera")
    with torch.no_grad(), attnx.capture(model) as trace:
        call()
    assert trace.sides(0)[1].kind == "windows"
    with pytest.raises(ValueError, match=r"expected windows of known places; got windows of 64 tokens in blocks\.0"):
        trace.item(0)
