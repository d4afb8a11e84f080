"""Rows and columns of maps in towers, pools and channels. Layers with different tokens are never multiplied."""

from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn

import attnx
from attnx import TokenLayout

SMALL = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=64)


def siglip(text_tokens: int = 4) -> tuple[nn.Module, dict]:
    import transformers

    text = dict(SMALL, vocab_size=60, max_position_embeddings=text_tokens)
    vision = dict(SMALL, image_size=32, patch_size=16)
    torch.manual_seed(0)
    model = transformers.SiglipModel(transformers.SiglipConfig(text_config=text, vision_config=vision)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    return model, dict(pixel_values=torch.randn(1, 3, 32, 32), input_ids=torch.arange(text_tokens)[None] + 5)


def captured(model: nn.Module, *args: object, **kwargs: object) -> attnx.Trace:
    with torch.no_grad(), attnx.capture(model) as trace:
        model(*args, **kwargs)
    return trace


def test_two_towers_of_one_length_are_not_chained() -> None:
    model, given = siglip()
    trace = captured(model, **given)
    text, image = (trace.sides(f"{part}_model.encoder.layers.0.self_attn") for part in ("text", "vision"))
    assert (text[0].kind, text[0].count, text[0].part) == ("text", 4, "text_model")
    assert (image[1].kind, image[1].grid, image[1].prefix, image[1].part) == ("image", (2, 2), 0, "vision_model")
    for chain in (attnx.rollout, attnx.relevance):
        with pytest.raises(
            ValueError, match=r"4 image tokens of vision_model: .*; 4 text tokens of text_model: text_model\.encoder"
        ):
            chain(trace)
    with pytest.raises(
        ValueError, match=r"layout: expected layers over the same tokens; got .*4 text tokens of text_model"
    ):
        trace.layout  # noqa: B018
    with torch.no_grad(), attnx.capture(model, layers="vision_model.*") as vision:
        model(**given)
    assert torch.equal(attnx.rollout(trace, layers="vision_model.*"), attnx.rollout(vision))
    assert trace.select("vision_model.*").layout == vision.layout == TokenLayout(0, (2, 2))
    with pytest.raises(
        ValueError, match="layers: 'visual' matches no layer of the trace; expected some of vision_model"
    ):
        attnx.rollout(trace, layers="visual")


@pytest.mark.parametrize("family", ["Siglip", "Siglip2"])
def test_pooling_heads_of_transformers(family: str) -> None:
    import transformers

    config = getattr(transformers, f"{family}VisionConfig")(**SMALL, image_size=48, patch_size=16)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}VisionModel")(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    given: dict = dict(pixel_values=torch.randn(1, 3, 48, 48))
    layout = None
    if family == "Siglip2":
        given = dict(
            pixel_values=torch.randn(1, 9, 768),
            pixel_attention_mask=torch.ones(1, 9, dtype=torch.long),
            spatial_shapes=torch.tensor([[3, 3]]),
        )
        layout = TokenLayout(0, (3, 3))
    with torch.no_grad():
        with attnx.capture(model, layout=layout) as trace:
            own = model(**given)
        hidden = own.last_hidden_state
        head = model.head.attention(model.head.probe, hidden, hidden, need_weights=True)[1]
    pool = next(name for name in trace if "head" in name)
    torch.testing.assert_close(trace[pool], head, rtol=1e-4, atol=1e-6)
    assert trace.sides(pool)[0].kind == "queries"
    torch.testing.assert_close(attnx.cls_map(trace).flatten(), head.flatten(), rtol=1e-4, atol=1e-6)
    want = head[0, 0].double()
    for amap in reversed([trace[name] for name in trace if name != pool]):
        want = (want @ amap[0].double() + want) / 2
    torch.testing.assert_close(attnx.rollout(trace).flatten().double(), want, rtol=1e-4, atol=1e-7)
    if family == "Siglip":
        for method, found in (("rollout", attnx.rollout(trace)), ("cls", attnx.cls_map(trace))):
            extract = attnx.Extractor(model, method=method)
            for _ in range(2):
                torch.testing.assert_close(extract(given["pixel_values"]), found, rtol=1e-4, atol=1e-7)


TIMM: dict[str, Callable[[], nn.Module]] = {
    "pool, no class token": lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=48, **TINY),
    "pool and class token": lambda: timm.create_model("vit_pe_core_base_patch16_224", img_size=48, **TINY),
    "class token": lambda: timm.create_model("vit_tiny_patch16_224", img_size=48, **TINY),
    "registers": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=42, **TINY),
}
TINY = dict(embed_dim=48, depth=3, num_heads=3)


@pytest.mark.parametrize("family", TIMM)
def test_cls_map_and_extractor_mean_the_same_layer(family: str) -> None:
    torch.manual_seed(0)
    model = TIMM[family]().eval()
    size = 42 if family == "registers" else 48
    images = torch.randn(2, 3, size, size)
    trace = captured(model, images)
    want = attnx.cls_map(trace)
    extract = attnx.Extractor(model, method="cls")
    for _ in range(2):
        torch.testing.assert_close(extract(images), want, rtol=1e-4, atol=1e-7)
    # Where there is a class token, its last block; else the pool's only query.
    last = "attn_pool" if family == "pool, no class token" else "blocks.2.attn"
    torch.testing.assert_close(want, attnx.cls_map(trace, last))
    assert last in str(extract.plan)


def test_channels_are_no_tokens() -> None:
    torch.manual_seed(0)
    model = timm.create_model("xcit_nano_12_p16_224", img_size=64).eval()
    trace = captured(model, torch.randn(1, 3, 64, 64))
    assert trace.sides(0)[1].kind == "channels"
    with pytest.raises(ValueError, match=r"layers: expected self-attention layers over the same tokens.* channels"):
        attnx.rollout(trace)
    with pytest.raises(ValueError, match="got maps over 32 channels"):
        trace.select(0).layout  # noqa: B018


def test_self_and_cross_attention_of_one_length() -> None:
    import transformers

    small = dict(vocab_size=60, d_model=48, d_kv=16, d_ff=64, num_layers=2, num_heads=3, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = transformers.T5Model(transformers.T5Config(**small)).eval()
    ids = torch.arange(5, 11)[None]
    trace = captured(model, input_ids=ids, decoder_input_ids=ids)
    assert len({tuple(amap.shape) for amap in trace.values()}) == 1
    with pytest.raises(ValueError, match="layers: expected self-attention layers over the same tokens"):
        attnx.rollout(trace)

    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.MultiheadAttention(48, 3, batch_first=True)
            self.other = nn.MultiheadAttention(48, 3, batch_first=True)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            x = self.own(x, x, x, need_weights=False)[0]
            return self.other(x, y, y, need_weights=False)[0]

    model = Crossing().eval()
    with torch.no_grad(), attnx.capture(model, layout=TokenLayout(0, (2, 3))) as both:
        model(torch.randn(1, 6, 48), torch.randn(1, 6, 48))
    with pytest.raises(ValueError, match="choose some of one kind"):
        attnx.rollout(both)


def test_layers_of_other_sizes_say_so() -> None:
    torch.manual_seed(0)
    model = timm.create_model("pit_ti_224", img_size=64).eval()
    trace = captured(model, torch.randn(1, 3, 64, 64))
    for method in (attnx.layer_maps, attnx.rollout):
        with pytest.raises(ValueError, match=r"expected (self-attention )?layers over the same tokens"):
            method(trace)


@pytest.mark.parametrize("name", ["num_register_tokens", "n_storage_tokens"])
def test_registers_of_the_original_code(name: str) -> None:
    class Hub(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            setattr(self, name, 4)
            self.cls_token = nn.Parameter(torch.randn(1, 1, 48))
            self.extra = nn.Parameter(torch.randn(1, 4, 48))
            self.patch_embed = nn.Conv2d(3, 48, 14, 14)
            self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(48, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch_embed(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.extra.expand(len(x), -1, -1), x], 1)
            for block in self.blocks:
                x = block(x)
            return x

    trace = captured(Hub().eval(), torch.randn(1, 3, 42, 56))
    assert (trace.layout.prefix, trace.layout.grid) == (5, (3, 4))


def test_select() -> None:
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=48, **TINY).eval()
    trace = captured(model, torch.randn(1, 3, 48, 48))
    assert list(trace.select([0, -1])) == ["blocks.0.attn", "blocks.2.attn"]
    assert list(trace.select("blocks.1")) == ["blocks.1.attn"]
    assert torch.equal(attnx.rollout(trace, layers=["blocks.0", 1]), attnx.rollout(trace.select([0, 1])))
    assert list(trace.select(None)) == list(trace)
    for wrong in (3, "block", [], 1.5):
        with pytest.raises(ValueError, match="layers: "):
            trace.select(wrong)  # type: ignore[arg-type]


class Tower(nn.Module):
    """Blocks over tokens. Patches are made by unfolding, so that no convolution identifies them."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(3 * 64, 48)
        self.blocks = nn.ModuleList(timm.models.vision_transformer.Block(48, 3) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(nn.functional.unfold(x, 8, stride=8).mT)
        for block in self.blocks:
            x = block(x)
        return x


class Pair(nn.Module):
    def __init__(self, named: bool) -> None:
        super().__init__()
        if named:
            self.branch1, self.branch2 = Tower(), Tower()
        else:
            self.towers = nn.ModuleList([Tower(), Tower()])
        self.named = named

    def forward(self, x: Tensor) -> Tensor:
        a, b = (self.branch1, self.branch2) if self.named else self.towers
        return a(x) + b(x)


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("layout", [None, TokenLayout(0, (4, 4))])
def test_towers_that_are_given_the_same_input_are_not_chained(named: bool, layout: TokenLayout | None) -> None:
    torch.manual_seed(0)
    model = Pair(named).eval()
    with torch.no_grad(), attnx.capture(model, layout=layout) as trace:
        model(torch.randn(1, 3, 32, 32))
    for chain in (attnx.rollout, attnx.relevance):
        with pytest.raises(ValueError, match=r"runs beside .*: both have the same input; choose layers="):
            chain(trace, query="all")
    one = "branch2.*" if named else "towers.1.*"
    assert attnx.rollout(trace, layers=one, query="all").shape == (1, 16, 16)


class Branches(nn.Module):
    """Two attention layers, each after a norm: side by side, or one after the other with sums in place."""

    def __init__(self, parallel: bool) -> None:
        super().__init__()
        self.parallel = parallel
        self.embed = nn.Linear(3 * 64, 48)
        self.norms = nn.ModuleList([nn.LayerNorm(48), nn.LayerNorm(48)])
        self.layers = nn.ModuleList(timm.layers.Attention(48, 3) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(nn.functional.unfold(x, 8, stride=8).mT)
        if self.parallel:
            return x + sum(layer(norm(x)) for norm, layer in zip(self.norms, self.layers, strict=True))
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x += layer(norm(x))
        return x


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("parallel", [True, False])
def test_layers_after_norms_of_one_input_run_side_by_side(parallel: bool, mode: type[torch.no_grad]) -> None:
    torch.manual_seed(0)
    model = Branches(parallel).eval()
    with mode(), attnx.capture(model, layout=TokenLayout(0, (4, 4))) as trace:
        model(torch.randn(1, 3, 32, 32))
    if parallel:
        with pytest.raises(ValueError, match=r"layers\.0 runs beside layers\.1|layers\.1 runs beside layers\.0"):
            attnx.rollout(trace)
    else:
        assert attnx.rollout(trace).shape == (1, 4, 4)


class PreNormBlock(nn.Module):
    """A block, not a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(48), timm.layers.Attention(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


def test_blocks_with_norm_in_their_name_follow_one_another() -> None:
    model = nn.Sequential(PreNormBlock(), PreNormBlock()).eval()
    with torch.no_grad(), attnx.capture(model, layout=TokenLayout(0, (4, 4))) as trace:
        model(torch.randn(1, 16, 48))
    assert attnx.rollout(trace).shape == (1, 4, 4)


def test_windows_of_one_head_are_no_heads() -> None:
    class WindowAttention(nn.Module):
        num_heads = 1

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.scaled_dot_product_attention(x, x, x)

    model = nn.Sequential(WindowAttention())
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"got \[2, 9, 16, 16\]; WindowAttention has 1 head"):
        with attnx.capture(model):
            model(torch.randn(2, 9, 16, 8))


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_heads_before_the_batch_are_refused(batch: int) -> None:
    class HeadsFirstAttention(nn.Module):
        num_heads = 4

        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(16, 48)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 3, 0, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v).permute(1, 2, 0, 3).flatten(2)

    model = nn.Sequential(HeadsFirstAttention())
    message = rf"got \[4, {batch}, 17, 17\], with the 4 heads in dimension 0"
    with torch.no_grad(), pytest.raises(RuntimeError, match=message), attnx.capture(model):
        model(torch.randn(batch, 17, 16))


@pytest.mark.parametrize("mixer", ["lstm", "function"])
def test_what_mixes_tokens_between_layers_is_seen(mixer: str) -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (timm.layers.Attention(48, 3) for _ in range(2))
            self.lstm = nn.LSTM(48, 48, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x)
            x = self.lstm(x)[0] if mixer == "lstm" else nn.functional.avg_pool1d(x.mT, 3, 1, 1).mT
            return self.second(x)

    name = "lstm" if mixer == "lstm" else "avg_pool1d"
    model = Mixer().eval()
    with torch.no_grad(), attnx.capture(model, layout=TokenLayout(0, (4, 4))) as trace:
        model(torch.randn(1, 16, 48))
    with pytest.raises(ValueError, match=f"only attention mixes tokens; {name} may mix neighbouring tokens"):
        attnx.rollout(trace)


def test_a_layout_that_is_given_is_not_the_texts() -> None:
    import transformers

    text = dict(SMALL, vocab_size=60, max_position_embeddings=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=dict(SMALL, image_size=32, patch_size=16))
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    given = dict(input_ids=torch.tensor([[5, 6, 7, 8, 2]]), pixel_values=torch.randn(1, 3, 32, 32))
    with torch.no_grad(), attnx.capture(model, layout=TokenLayout(1, (2, 2))) as trace:
        model(**given)
    assert trace.sides("text_model.encoder.layers.0.self_attn")[1].kind == "text"
    with pytest.raises(ValueError, match="expected layers over the same tokens"):
        attnx.layer_maps(trace)
    with pytest.raises(ValueError, match="expected maps over patches of an image; got maps over 5 text"):
        attnx.rollout(trace, layers="text_model.*")
    assert attnx.rollout(trace, layers="text_model.*", query="all").shape == (1, 5, 5)
    torch.testing.assert_close(attnx.cls_map(trace), attnx.cls_map(trace, "vision_model.encoder.layers.1.self_attn"))


def test_the_choice_that_an_error_names_works() -> None:
    model, given = siglip()
    trace = captured(model, **given)
    for chain in (attnx.rollout,):
        with pytest.raises(ValueError, match="such as") as error:
            chain(trace)
        choice = str(error.value).rpartition("such as ")[2]
        assert choice.startswith("layers='")
        assert chain(trace, layers=choice.removeprefix("layers='").removesuffix("'")).shape == (1, 2, 2)


def test_cross_attention_within_one_image() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch_embed = nn.Conv2d(3, 48, 8, 8)
            self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(48, 4, 48, batch_first=True), 2)

        def forward(self, images: Tensor) -> Tensor:
            x = self.patch_embed(images).flatten(2).mT
            return self.decoder(x, x.flip(1))

    torch.manual_seed(0)
    trace = captured(Model().eval(), torch.randn(1, 3, 32, 32))
    queries, keys = trace.sides("decoder.layers.0.multihead_attn")
    assert queries != keys
    with pytest.raises(ValueError, match="layers: expected self-attention layers"):
        attnx.rollout(trace)
    with pytest.raises(ValueError, match="layers: expected self-attention layers"):
        attnx.rollout(trace, layers="*multihead_attn")


def test_relevance_of_a_score_that_passes_the_pool_by() -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(**SMALL, image_size=48, patch_size=16)
    model = transformers.SiglipVisionModel(config).eval()
    with attnx.capture(model, grad=True) as trace:
        trace.backward(model(torch.randn(1, 3, 48, 48)).last_hidden_state.sum())
    assert attnx.relevance(trace, query="mean").shape == (1, 3, 3)
    with pytest.raises(RuntimeError, match=r"head.attention: no gradient reached this layer.*pass query='mean'"):
        attnx.relevance(trace)
