"""Maps of any token, rows by negative indices, and places of the picture as tokens."""

import numpy as np
import pytest
import timm
import torch
import transformers
from torch import Tensor, nn

import attnx
from attnx.models.lavt import Lavt, LavtConfig

LAYOUT = attnx.TokenLayout(prefix=1, grid=(4, 6))
TOKEN = LAYOUT.token(2, 3)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    small = dict(embed_dim=48, depth=3, num_heads=3, img_size=(64, 96))
    return timm.create_model("vit_tiny_patch16_224", **small).eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def captured(model: nn.Module, images: Tensor, **options: object) -> attnx.Trace:
    with torch.no_grad(), attnx.capture(model, **options) as trace:
        model(images)
    return trace


@pytest.mark.parametrize("heads", ["mean", "max", "each"])
@pytest.mark.parametrize("keep", ["map", "qk"])
def test_rows_and_columns_of_a_token(model: nn.Module, images: Tensor, heads: str, keep: str) -> None:
    each = captured(model, images, heads="each")
    trace = captured(model, images, heads=heads, keep=keep)
    for layer in (0, -1, "blocks.1.attn"):
        weights = {"mean": each[layer].mean(1), "max": each[layer].amax(1), "each": each[layer]}[heads]
        row, column = weights[..., TOKEN, 1:], weights[..., 1:, TOKEN]
        torch.testing.assert_close(attnx.token_map(trace, TOKEN, layer), row.unflatten(-1, (4, 6)))
        torch.testing.assert_close(attnx.token_map(trace, TOKEN, layer, to=True), column.unflatten(-1, (4, 6)))
    torch.testing.assert_close(attnx.token_map(trace, 0), attnx.cls_map(trace))
    torch.testing.assert_close(attnx.token_map(trace, -1), attnx.token_map(trace, 24))
    torch.testing.assert_close(attnx.layer_maps(trace, heads, token=0).maps, attnx.layer_maps(trace, heads).maps)
    torch.testing.assert_close(attnx.layer_maps(trace, heads, token=TOKEN).maps[:, 1], attnx.token_map(trace, TOKEN, 1))


def test_the_column_of_scores_with_a_mask_a_softcap_and_sinks() -> None:
    from attnx.trace.qk_record import QKRecord

    q, k = torch.randn(2, 4, 7, 8), torch.randn(2, 2, 9, 8)
    bias = torch.randn(2, 1, 7, 9).masked_fill(torch.rand(2, 1, 7, 9) < 0.3, -torch.inf)
    bias[0, 0, 3] = -torch.inf  # a row without keys
    for mask in (None, bias, bias[:, :, :1], torch.randn(7, 1)):
        for options in ({}, {"softcap": 2.0}, {"sinks": torch.randn(4)}, {"is_causal": True}):
            _, lse = attnx.attention_lse(q, k, k, bias=mask, **options)
            record = QKRecord(q, k, lse, mask, options.get("is_causal", False), None, softcap=options.get("softcap"))
            record = QKRecord(**{**vars(record), "sinks": options.get("sinks")})
            want = attnx.attention_map(q, k, bias=mask, **options)
            for column in (0, 5, -1):
                torch.testing.assert_close(record.column(column), want[..., column], rtol=1e-5, atol=1e-6)


def test_rows_take_one_integer_and_negatives(model: nn.Module, images: Tensor) -> None:
    whole = captured(model, images)
    for rows, want in ((0, [0]), (-1, [24]), ([0, -1], [0, 24]), (np.int64(3), [3]), (torch.tensor([2, 5]), [2, 5])):
        trace = captured(model, images, rows=rows)
        torch.testing.assert_close(trace[1], whole[1][:, want])
    torch.testing.assert_close(attnx.cls_map(captured(model, images, rows=[-25])), attnx.cls_map(whole))
    torch.testing.assert_close(attnx.token_map(captured(model, images, rows=[-1]), 24), attnx.token_map(whole, 24))
    torch.testing.assert_close(attnx.token_map(captured(model, images, rows=[0, 24]), -1), attnx.token_map(whole, 24))
    for rows in (25, [-26], [0, 25]):
        with pytest.raises(ValueError, match=r"rows: expected integers in -25\.\.24; got \[.*2[56]\]"):
            captured(model, images, rows=rows)
    with pytest.raises(ValueError, match=r"rows: expected an integer or a sequence of integers; got 1\.5"):
        captured(model, images, rows=1.5)


def test_what_a_token_map_cannot_read(model: nn.Module, images: Tensor) -> None:
    trace = captured(model, images, rows=[0])
    with pytest.raises(ValueError, match=r"row 5 was not captured: expected 5 among rows; got \[0\]"):
        attnx.token_map(trace, 5)
    with pytest.raises(ValueError, match=r"expected a capture with rows=None for to=True; got rows=\[0\]"):
        attnx.token_map(trace, 5, to=True)
    for token in (25, -26, 1.5, True, None, torch.tensor(2.7), np.array(1.5)):
        with pytest.raises(ValueError, match=r"token: expected an index in -25\.\.24 of layer 'blocks.2.attn'; got"):
            attnx.token_map(trace, token)
    with pytest.raises(KeyError, match="layer 7: expected an index into 3 layers"):
        attnx.token_map(trace, 0, 7)


def test_extractor_of_a_token(model: nn.Module, images: Tensor) -> None:
    trace = captured(model, images, heads="each")
    for token in (TOKEN, -1):
        want = attnx.token_map(trace, token)
        extract = attnx.Extractor(model, method="token", token=token)
        for _ in range(2):
            torch.testing.assert_close(extract(images), want.mean(1), rtol=1e-4, atol=1e-7)
        assert extract.plan.stops
        assert extract.plan.steps[-1].runs == f"keys, and the query of row {token}"
        each = attnx.Extractor(model, method="token", token=token, heads="each", layers=[0, -1])(images)
        torch.testing.assert_close(each[:, 1], want, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(each[:, 0], attnx.token_map(trace, token, 0), rtol=1e-4, atol=1e-7)
    with pytest.raises(ValueError, match="token: expected the index of a token for method 'token'; got None"):
        attnx.Extractor(model, method="token")
    with pytest.raises(ValueError, match="options of method 'cls': expected none; got token"):
        attnx.Extractor(model, method="cls", token=3)
    with pytest.raises(ValueError, match=r"rows: expected integers in -25\.\.24; got \[25\]"):
        attnx.Extractor(model, method="token", token=25)(images)


def test_a_token_beyond_a_smaller_image_is_refused() -> None:
    torch.manual_seed(0)
    small = dict(embed_dim=48, depth=2, num_heads=3, dynamic_img_size=True)
    model = timm.create_model("vit_tiny_patch16_224", **small).eval()
    extract = attnx.Extractor(model, method="token", token=20)
    large, less = torch.randn(1, 3, 96, 96), torch.randn(1, 3, 32, 32)
    extract(large)
    with pytest.raises(ValueError, match=r"rows: expected integers in -5\.\.4; got \[20\]"):
        extract(less)
    last = attnx.Extractor(model, method="token", token=-1)
    for image in (large, large, less):
        torch.testing.assert_close(last(image), attnx.token_map(captured(model, image), -1), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("keep", ["auto", "map", "qk"])
def test_the_last_query_of_images_of_other_sizes(keep: str) -> None:
    torch.manual_seed(0)
    small = dict(embed_dim=48, depth=2, num_heads=3, dynamic_img_size=True)
    model = timm.create_model("vit_tiny_patch16_224", **small).eval()
    extract = attnx.Extractor(model, query=-1, keep=keep)
    for side in (64, 64, 96, 32):
        images = torch.randn(2, 3, side, side)
        want = attnx.rollout(captured(model, images), query=np.int64(-1))
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)


def test_a_token_of_a_model_whose_layout_is_given() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.MultiheadAttention(8, 2, batch_first=True)
            self.second = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            x = images.flatten(2).transpose(1, 2).repeat(1, 1, 3)[..., :8]
            x = x + self.first(x, x, x)[0]
            return x + self.second(x, x, x)[0]

    torch.manual_seed(0)
    model, images, layout = Own().eval(), torch.randn(2, 3, 4, 6), attnx.TokenLayout(prefix=0, grid=(4, 6))
    want = attnx.token_map(captured(model, images, layout=layout), 5)
    extract = attnx.Extractor(model, method="token", token=5, layout=layout)
    torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)


def test_tokens_of_windows() -> None:
    torch.manual_seed(0)
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=(56, 84), depths=(2, 2, 1, 1)).eval()
    trace = captured(model, torch.randn(2, 3, 56, 84))
    for layer in (0, 1, 3):  # the second and fourth are shifted
        windows = trace.windows(layer)
        assert windows is not None
        from attnx.trace.window_record import WindowRecord

        dense = WindowRecord(trace.kept(layer), windows).map()
        for token in (0, 20, -1):
            row, column = dense[:, token], dense[:, :, token]
            torch.testing.assert_close(attnx.token_map(trace, token, layer).flatten(1), row)
            torch.testing.assert_close(attnx.token_map(trace, token, layer, to=True).flatten(1), column)
    with pytest.raises(ValueError, match="rows=None for a layer that attends in windows"):
        attnx.token_map(captured(model, torch.randn(1, 3, 56, 84), rows=[0]), 0, 0)


def test_a_pooling_layer_is_not_the_last_layer_over_patches() -> None:
    torch.manual_seed(0)
    small = dict(embed_dim=48, depth=2, num_heads=3, img_size=32, class_token=False, global_pool="map")
    model = timm.create_model("vit_tiny_patch16_224", **small).eval()
    images = torch.randn(2, 3, 32, 32)
    trace = captured(model, images)
    assert list(trace)[-1] == "attn_pool"
    want = trace["blocks.1.attn"][:, 3].unflatten(1, (2, 2))
    torch.testing.assert_close(attnx.token_map(trace, 3), want)
    torch.testing.assert_close(attnx.token_map(trace, 0, -1), trace[-1][:, 0].unflatten(1, (2, 2)))
    extract = attnx.Extractor(model, method="token", token=3)
    for _ in range(2):
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)


def test_the_last_layer_over_patches_or_windows() -> None:
    from timm.models.vision_transformer_sam import VisionTransformerSAM

    torch.manual_seed(0)
    sizes = dict(img_size=64, patch_size=8, embed_dim=32, depth=3, num_heads=2, window_size=4)
    images = torch.randn(1, 3, 64, 64)
    for last, model in (("blocks.2.attn", VisionTransformerSAM(**sizes, global_attn_indexes=(2,)).eval()),
                        ("blocks.2.attn", VisionTransformerSAM(**sizes, global_attn_indexes=(0,)).eval())):  # fmt: skip
        trace = captured(model, images)
        torch.testing.assert_close(attnx.token_map(trace, 9), attnx.token_map(trace, 9, last))
    with pytest.raises(ValueError, match=r"got blocks\.2\.attn, which attends in windows: use attnx\.capture"):
        attnx.Extractor(model, method="token", token=9)(images)


def test_words_and_pixels_of_cross_attention() -> None:
    torch.manual_seed(0)
    config = LavtConfig(24, (1, 1, 1, 1), (1, 2, 4, 8), 4, text_width=32, text_depth=1, text_heads=2)
    model = Lavt(config).eval()
    with torch.no_grad(), attnx.capture(model, layers="backbone.layers.0.fusion.image_lang_att") as trace:
        model(torch.rand(1, 3, 64, 48), torch.tensor([[101, 3899, 102]]), torch.ones(1, 3, dtype=torch.bool))
    pixels = attnx.token_map(trace, 1, to=True)  # queries are pixels, and keys are words
    torch.testing.assert_close(pixels.flatten(1), trace[0][:, :, 1])
    with pytest.raises(ValueError, match="expected maps over patches of an image; got maps over 3 text tokens"):
        attnx.token_map(trace, 1)


def test_registers_are_tokens() -> None:
    torch.manual_seed(0)
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, image_size=28, patch_size=14, num_register_tokens=4
    )
    trace = captured(transformers.Dinov2WithRegistersModel(config).eval(), torch.randn(1, 3, 28, 42))
    assert str(trace.layout) == "5 + 2 * 3 tokens"
    torch.testing.assert_close(attnx.token_map(trace, 2).flatten(), trace[-1][0, 2, 5:])


def test_patches_and_places_as_tokens() -> None:
    assert [LAYOUT.token(r, c) for r, c in ((0, 0), (0, 5), (1, 0), (3, 5))] == [1, 6, 7, 24]
    video = attnx.TokenLayout(0, (2, 3), frames=2)
    assert video.token(1, 2, frame=1) == 11
    size = (400, 600)  # height, width
    assert LAYOUT.token_at(0, 0, size) == 1
    assert LAYOUT.token_at(599.9, 399.9, size) == 24
    assert LAYOUT.token_at(350, 250, size) == LAYOUT.token(2, 3)
    # Of a crop of the middle 400 x 400 pixels.
    assert LAYOUT.token_at(100, 0, size, crop=(100, 0, 500, 400)) == 1
    assert LAYOUT.token_at(499, 399, size, crop=(100, 0, 500, 400)) == 24
    for place in ((-1, 0), (600, 0), (0, 400), (float("nan"), 0)):
        with pytest.raises(ValueError, match="token_at: expected a place in a picture 600 wide and 400 high"):
            LAYOUT.token_at(*place, size)
    with pytest.raises(ValueError, match=r"of which the model saw x in 100\.\.500, y in 0\.\.400; got 99, 5"):
        LAYOUT.token_at(99, 5, size, crop=(100, 0, 500, 400))
    for patch in ((4, 0), (0, 6), (-1, 0)):
        with pytest.raises(ValueError, match=r"token: expected row in 0\.\.3, column in 0\.\.5; got"):
            LAYOUT.token(*patch)
    with pytest.raises(ValueError, match=r"and frame in 0\.\.1; got 0, 0 and frame 2"):
        video.token(0, 0, frame=2)
