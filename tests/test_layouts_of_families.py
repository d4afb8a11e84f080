"""Layouts of families: the grid comes from what ran before the layer, or the layout is refused with its reason."""

from collections.abc import Callable

import pytest
import timm
import torch
from families_timm import sharpen
from test_families import built
from torch import Tensor, nn

import attnx
from attnx import TokenLayout

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)


def captured(model: nn.Module, *args: object, **kwargs: object) -> attnx.Trace:
    with torch.no_grad(), attnx.capture(model.eval()) as trace:
        model(*args, **kwargs)
    return trace


class Hub(nn.Module):
    """A ViT with the parameter names of the code of DINOv2 and DINOv3: [class token, registers, patches]."""

    def __init__(self, registers: str, count: int = 4) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        setattr(self, registers, nn.Parameter(torch.randn(1, count, 48)) if count else None)
        self.registers = registers
        self.mask_token = nn.Parameter(torch.zeros(1, 48))
        self.patch_embed = nn.Conv2d(3, 48, 14, 14)
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(48, 3) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        extra = [t for t in (self.cls_token, getattr(self, self.registers)) if t is not None]
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in extra), x], 1)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("registers", ["register_tokens", "storage_tokens"])
@pytest.mark.parametrize("count", [0, 4])
def test_registers_of_hub_code(registers: str, count: int, wrapped: bool) -> None:
    model = nn.Sequential(Hub(registers, count)) if wrapped else Hub(registers, count)
    assert captured(model, torch.randn(1, 3, 42, 56)).layout == TokenLayout(1 + count, (3, 4))


def test_two_numbers_of_registers_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = Hub("register_tokens", 4), Hub("register_tokens", 2)
            self.attention = nn.MultiheadAttention(48, 3, batch_first=True)

        def forward(self, images: Tensor) -> Tensor:
            x = self.a(images) + self.b(images)[:, :1]
            return self.attention(x, x, x)[0]

    trace = captured(Two(), torch.randn(1, 3, 42, 56))
    assert trace.layout_of("a.blocks.0.attn") == TokenLayout(5, (3, 4))
    assert trace.layout_of("b.blocks.0.attn") == TokenLayout(3, (3, 4))
    with pytest.raises(ValueError, match="Two does not declare its number of prefix tokens"):
        trace.layout_of("attention")


# {model: (image size, {layer: layout})}. Grids are those of the models' own position embeddings or pooled outputs.
TIMM: dict[str, tuple[dict, tuple[int, int], dict[str, TokenLayout]]] = {
    "vit_small_r26_s32_224": (dict(depth=1, img_size=(96, 64)), (96, 64), {"blocks.0.attn": TokenLayout(1, (3, 2))}),
    "pit_ti_224": (
        {},
        (224, 224),
        {f"transformers.{i}.blocks.0.attn": TokenLayout(1, (n, n)) for i, n in enumerate((27, 14, 7))},
    ),
    "pit_ti_distilled_224": (
        {},
        (224, 224),
        {f"transformers.{i}.blocks.0.attn": TokenLayout(2, (n, n)) for i, n in enumerate((27, 14, 7))},
    ),
    "vitamin_small_224": (dict(depth=1), (224, 224), {"blocks.0.attn": TokenLayout(0, (14, 14))}),
    "xcit_nano_12_p16_224": ({}, (64, 96), {"cls_attn_blocks.0.attn": TokenLayout(1, (4, 6))}),
    "cait_xxs24_224": (dict(depth=1), (224, 224), {"blocks_token_only.0.attn": TokenLayout(1, (14, 14))}),
    "naflexvit_base_patch16_gap": (
        dict(embed_dim=48, depth=2, num_heads=3),
        (64, 96),
        {"blocks.1.attn": TokenLayout(4, (4, 6), cls=False)},
    ),
}


@pytest.mark.parametrize("name", TIMM)
def test_grids_of_timm(name: str) -> None:
    options, size, layouts = TIMM[name]
    trace = captured(timm.create_model(name, **options), torch.randn(1, 3, *size))
    assert {layer: trace.layout_of(layer) for layer in layouts} == layouts


@pytest.mark.parametrize("name", ["xcit_nano_12_p16_224", "cait_xxs24_224"])
def test_class_attention_after_the_trunk(name: str) -> None:
    _, size, layouts = TIMM[name]
    trace = captured(timm.create_model(name), torch.randn(1, 3, *size))
    last = list(trace)[-1]
    grid = next(iter(layouts.values())).grid
    assert torch.equal(attnx.cls_map(trace, layer=-1), trace[last][:, 0, 1:].unflatten(-1, grid))


def test_hybrid_in_an_extractor() -> None:
    model = timm.create_model("vit_small_r26_s32_224", depth=2, img_size=64).eval()
    images = torch.randn(1, 3, 64, 64)
    want = attnx.rollout(captured(model, images))
    extract = attnx.Extractor(model, method="rollout")
    for _ in range(2):
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)


def siglip2(shapes: list[list[int]], patches: int) -> attnx.Trace:
    import transformers

    model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=16))
    mask = torch.tensor([[i < h * w for i in range(patches)] for h, w in shapes]).long()
    return captured(
        model,
        torch.randn(len(shapes), patches, 768),
        pixel_attention_mask=mask,
        spatial_shapes=torch.tensor(shapes),
    )


def test_siglip2_images_of_one_grid() -> None:
    assert siglip2([[2, 3], [2, 3]], 6).layout == TokenLayout(0, (2, 3))


def test_siglip2_images_of_several_grids_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images have different grids, \[\(2, 3\), \(3, 2\)\]; trace.item"):
        siglip2([[2, 3], [3, 2]], 6).layout  # noqa: B018
    with pytest.raises(ValueError, match=r"expected 2 \* 3 patches; got 9, with padding; trace.item"):
        siglip2([[2, 3]], 9).layout  # noqa: B018


@pytest.mark.parametrize("keep", ["map", "qk"])
def test_an_image_of_a_padded_batch_has_its_own_grid(keep: str) -> None:
    import transformers

    config = transformers.Siglip2VisionConfig(**SMALL, num_patches=16, patch_size=16)
    model = sharpen(transformers.Siglip2VisionModel(config).eval())
    patches, shapes = torch.randn(2, 9, 768), [[2, 3], [3, 3]]
    mask = torch.tensor([[i < h * w for i in range(9)] for h, w in shapes]).long()
    with torch.no_grad():
        with attnx.capture(model, keep=keep) as trace:
            model(patches, pixel_attention_mask=mask, spatial_shapes=torch.tensor(shapes))
        for i, (h, w) in enumerate(shapes):
            one = trace.item(i)
            alone = {"pixel_attention_mask": torch.ones(1, h * w).long(), "spatial_shapes": torch.tensor([[h, w]])}
            with attnx.capture(model) as own:
                model(patches[i : i + 1, : h * w], **alone)
            assert one.layout == TokenLayout(0, (h, w))
            assert list(one) == list(own)
            for layer in own:
                torch.testing.assert_close(one[layer], own[layer], rtol=0, atol=1e-5)
            torch.testing.assert_close(attnx.rollout(one), attnx.rollout(own), rtol=0, atol=1e-5)
    with pytest.raises(IndexError, match="got 2 items and 2"):
        trace.item(2)


def test_an_image_of_a_batch_with_windows() -> None:
    model = timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(1, 2, 1, 1)).eval()
    images = torch.randn(2, 3, 56, 56)
    with torch.no_grad(), attnx.capture(model) as trace:
        model(images)
    torch.testing.assert_close(attnx.rollout(trace.item(1)), attnx.rollout(trace)[1:], rtol=0, atol=1e-6)


def test_videos_have_frames() -> None:
    import transformers

    video = torch.randn(1, 4, 3, 48, 64)
    sizes = dict(SMALL, image_size=(48, 64), num_frames=4)
    mae = transformers.VideoMAEModel(transformers.VideoMAEConfig(**sizes, patch_size=16, tubelet_size=2))
    trace = captured(mae, video)
    assert trace.layout == TokenLayout(0, (3, 4), frames=2)
    assert trace.layout.tokens == 24
    assert torch.equal(trace.layout.patches(torch.arange(24)), torch.arange(24).view(2, 3, 4))
    vivit = transformers.VivitModel(transformers.VivitConfig(**dict(sizes, image_size=48), tubelet_size=[2, 16, 16]))
    trace = captured(vivit, video[..., :48])
    assert trace.layout == TokenLayout(1, (3, 3), frames=2)
    maps = attnx.cls_map(trace)
    assert maps.shape == (1, 2, 3, 3)
    assert torch.equal(maps.flatten(1), trace[-1][:, 0, 1:])
    with pytest.raises(ValueError, match="frames >= 1"):
        TokenLayout(0, (2, 2), frames=0)


def test_detection_tokens_of_yolos_follow_the_patches() -> None:
    import transformers

    sizes = dict(SMALL, image_size=[48, 64], patch_size=16, num_detection_tokens=5)
    model = transformers.YolosModel(transformers.YolosConfig(**sizes)).eval()
    images = torch.randn(2, 3, 48, 64)
    trace = captured(model, images)
    assert trace.layout == TokenLayout(1, (3, 4), suffix=5)
    maps = [trace[name].double() for name in trace]
    eye = torch.eye(18, dtype=torch.float64)
    product = eye
    for amap in maps:
        product = (amap + eye) / 2 @ product
    for query in (0, 13, 17):
        want = product[:, query, 1:13].view(2, 3, 4)
        got = attnx.rollout(trace, query=query).double()
        torch.testing.assert_close(got / got.sum((1, 2), keepdim=True), want / want.sum((1, 2), keepdim=True))
    mean = attnx.rollout(trace, query="mean").double()
    want = product[:, 1:13].mean(1)[:, 1:13].view(2, 3, 4)
    torch.testing.assert_close(mean / mean.sum((1, 2), keepdim=True), want / want.sum((1, 2), keepdim=True))
    torch.testing.assert_close(attnx.cls_map(trace), trace[-1][:, 0, 1:13].view(2, 3, 4))
    torch.testing.assert_close(attnx.Extractor(model, "rollout")(images), attnx.rollout(trace))
    with pytest.raises(ValueError, match="suffix >= 0"):
        TokenLayout(0, (2, 2), suffix=-1)


def test_tokens_of_sam_over_the_image() -> None:
    import transformers

    vision = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, output_channels=16, num_pos_feats=8)
    config = transformers.SamConfig(
        vision_config=dict(vision, image_size=64, patch_size=8, window_size=0),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=8, mask_input_channels=4),
        mask_decoder_config=dict(hidden_size=16, num_attention_heads=2, mlp_dim=32, iou_head_hidden_dim=16),
    )
    model = transformers.SamModel(config).eval()
    points = torch.rand(1, 3, 2, 2) * 64  # three prompts of two points
    with torch.no_grad(), attnx.capture(model) as trace:
        model(pixel_values=torch.randn(1, 3, 64, 64), input_points=points)
    layer = "mask_decoder.transformer.final_attn_token_to_image"
    queries, keys = trace.sides(layer)
    assert (queries.kind, queries.count, keys.kind, keys.grid) == ("queries", 8, "image", (8, 8))
    assert keys.layout is not None
    assert keys.layout.patches(trace[layer]).shape == (3, 8, 8, 8)
    back = trace.sides("mask_decoder.transformer.layers.0.cross_attn_image_to_token")
    assert [side.kind for side in back] == ["queries", "tokens"]


def test_queries_of_mask2former_over_each_level() -> None:
    model, call, _ = built("HF Mask2Former")
    with torch.no_grad(), attnx.capture(model) as trace:
        call()
    grids = [trace.sides(f"transformer_module.decoder.layers.{i}.cross_attn")[1].grid for i in range(2)]
    assert grids == [(2, 2), (4, 4)]


@pytest.mark.parametrize("queries", [5, 6])
def test_queries_of_detr_over_its_features(queries: int) -> None:
    import transformers

    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = dict(d_model=48, encoder_layers=2, decoder_layers=2, num_queries=queries)
    sizes |= {f"{side}_attention_heads": 3 for side in ("encoder", "decoder")}
    config = transformers.DetrConfig(**sizes, use_timm_backbone=False, backbone=None, backbone_config=backbone)
    trace = captured(transformers.DetrModel(config), torch.randn(1, 3, 64, 96))
    assert trace.layout_of("encoder.layers.1.self_attn") == TokenLayout(0, (2, 3))
    found, image = trace.sides("decoder.layers.1.encoder_attn")
    assert (found.kind, found.count, image.kind, image.grid) == ("queries", queries, "image", (2, 3))
    assert image.layout is not None
    assert image.layout.patches(trace["decoder.layers.1.encoder_attn"]).shape == (1, queries, 2, 3)
    # Even if there are as many queries as positions.
    assert trace.sides("decoder.layers.1.self_attn")[1].kind == "queries"
    with pytest.raises(ValueError, match=r"expected maps over patches of an image; got maps over \d queries"):
        trace.layout_of("decoder.layers.1.self_attn")


class Reader(nn.Module):
    """A class token and words, beside a convolution whose grid has as many positions as there are words."""

    def __init__(self, embedding: str, convolution: Callable[[], nn.Module], late: bool = False) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.add_module(embedding, nn.Embedding(50, 48))
        self.embedding = embedding
        self.convolution = convolution()
        self.late = late
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(48, 3) for _ in range(2))

    def forward(self, images: Tensor, words: Tensor) -> Tensor:
        x = torch.cat([self.cls_token.expand(len(words), -1, -1), getattr(self, self.embedding)(words)], 1)
        seen = None if self.late else self.convolution(images)
        for block in self.blocks:
            x = block(x)
        return x + (self.convolution(images) if seen is None else seen).mean()


CONVOLUTIONS: dict[str, Callable[[], nn.Module]] = {
    "patches": lambda: nn.Conv2d(3, 48, 16, 16),
    "features": lambda: nn.Conv2d(3, 48, 3, 16, 1),
}


@pytest.mark.parametrize("convolution", CONVOLUTIONS)
@pytest.mark.parametrize("embedding", ["word_embeddings", "lookup"])
def test_as_many_words_as_positions_are_no_grid(embedding: str, convolution: str) -> None:
    trace = captured(
        Reader(embedding, CONVOLUTIONS[convolution]), torch.randn(1, 3, 48, 64), torch.arange(12).view(1, 12)
    )
    assert trace.sides(0)[1].grid is None
    with pytest.raises(ValueError, match=r"Reader does not declare its patch grid|got maps over 13 text"):
        trace.layout  # noqa: B018


class Branches(nn.Module):
    """Tokens, and convolutions that run before and after them."""

    def __init__(self, *before: nn.Module, after: nn.Module | None = None) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
        self.before = nn.ModuleList(before)
        self.after = after
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(48, 3) for _ in range(2))

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        for convolution in self.before:
            convolution(images)
        x = torch.cat([self.cls_token.expand(len(tokens), -1, -1), tokens], 1)
        for block in self.blocks:
            x = block(x)
        if self.after is not None:
            self.after(images)
        return x


def test_convolutions_that_do_not_make_the_tokens() -> None:
    images, tokens = torch.randn(1, 3, 48, 64), torch.randn(1, 12, 48)
    two = Branches(nn.Conv2d(3, 48, 16, 16), nn.Conv2d(3, 48, (24, 10), (24, 10)))
    with pytest.raises(ValueError, match=r"several grids make 13 tokens: .*1 \+ 2 \* 6.*1 \+ 3 \* 4"):
        captured(two, images, tokens).layout  # noqa: B018
    for model in (
        Branches(after=nn.Conv2d(3, 48, 16, 16)),
        Branches(after=nn.Conv2d(3, 48, 3, 16, 1)),
        Branches(nn.Conv2d(3, 40, 3, 16, 1)),
    ):
        with pytest.raises(ValueError, match="Branches does not declare its patch grid"):
            captured(model, images, tokens).layout  # noqa: B018
    last_differs = Branches(nn.Conv2d(3, 48, 3, 16, 1), nn.Conv2d(3, 48, 3, 8, 1))
    with pytest.raises(ValueError, match=r"expected 1 \+ 6 \* 8 tokens; got maps of 13"):
        captured(last_differs, images, tokens).layout  # noqa: B018
