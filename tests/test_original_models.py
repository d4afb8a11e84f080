"""Whole models of the original repositories: a capture changes no output, and its maps are the original code's softmax.

    ATTNX_CLIP=CLIP ATTNX_DINOV2=dinov2 ATTNX_DINO=dino ATTNX_ALBEF=ALBEF ATTNX_CROSSVIT=CrossViT \\
        ATTNX_SWIN=Swin-Transformer ATTNX_LAVT=LAVT-RIS pytest tests/test_original_models.py

Without a checkout the tests of its models are skipped.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import originals
import pytest
import torch
import torch.nn.functional as F
from eager_reference import eager_attentions, eager_maps
from originals import pixels, words
from test_capture import assert_same_state, state
from test_family_maps import score_of
from torch import Tensor, nn

import attnx

CLOSE = 1e-5
GRADIENTS_CLOSE = 2e-5  # of the largest number of a map
Side = tuple[str, int, tuple[int, int] | None, str]  # kind, number of tokens, grid, part


@dataclass(frozen=True)
class Case:
    """A model of an original repository.

    Args:
        make: makes the model.
        inputs: makes the arguments of its call.
        sides: {glob of layers: (number of layers, side of the queries, side of the keys)}.
        prefix: number of tokens before the patches of its images; the first is the class token. 0: there are none.
        chain: layers of a rollout from the class token to the patches; None: no rollout of the dense maps.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[], tuple[Tensor, ...]]
    sides: dict[str, tuple[int, Side, Side]]
    prefix: int = 0
    chain: str | None = None

    @property
    def images_only(self) -> bool:
        """True if the model takes one tensor of images."""
        return len(self.inputs()) == 1


def alone(layers: int, tokens: int, grid: tuple[int, int]) -> dict[str, tuple[int, Side, Side]]:
    """Sides of a model whose layers all have the tokens of its image."""
    image = ("image", tokens, grid, "")
    return {"*": (layers, image, image)}


def squares(layers: int, *side: Any) -> tuple[int, Side, Side]:
    """Self-attention over one kind of tokens."""
    return layers, side, side


def windows(grids: list[tuple[int, int]], root: str = "", part: str = "") -> dict[str, tuple[int, Side, Side]]:
    """Sides of two blocks in each stage of a Swin with windows of 4 x 4 tokens."""
    return {f"{root}layers.{i}.blocks.*": squares(2, "windows", 16, grid, part) for i, grid in enumerate(grids)}


def with_words(size: int, other: int | None = None) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (pixels(size, other or size), *words())


TEXT = ("text", 12, None)
CLIP_IMAGE = ("image", 17, (4, 4))
ONE = ("queries", 1, None)
ALBEF_TEXT, ALBEF_IMAGE = (*TEXT, "text_encoder"), ("image", 10, (3, 3), "visual_encoder")
BRANCHES = ("image", 37, (6, 6), "patch_embed.0"), ("image", 10, (3, 3), "patch_embed.1")
LAVT_GRIDS = [(16, 15), (8, 8), (4, 4), (2, 2)]

CASES = {
    "CLIP": Case(
        originals.clip,
        originals.clip_inputs,
        {"visual.*": squares(3, *CLIP_IMAGE, "visual"), "transformer.*": squares(2, *TEXT, "")},
        prefix=1,
        chain="visual.*",
    ),
    "CLIP visual": Case(
        lambda: originals.clip().visual, lambda: originals.clip_inputs()[:1], alone(3, 17, (4, 4)), 1, "*"
    ),
    "CLIP RN50": Case(
        partial(originals.clip, resnet=True),
        originals.clip_inputs,
        {
            "visual.attnpool": (1, (*ONE, "visual"), ("image", 5, (2, 2), "visual")),
            "transformer.*": squares(2, *TEXT, ""),
        },
        prefix=1,
    ),
    "CLIP RN50 visual": Case(
        lambda: originals.clip(resnet=True).visual,
        lambda: originals.clip_inputs()[:1],
        {"attnpool": (1, (*ONE, ""), ("image", 5, (2, 2), ""))},
        prefix=1,
    ),
    "DINO": Case(originals.dino, lambda: (pixels(32, 32),), alone(3, 17, (4, 4)), 1, "*"),
    "DINO wide": Case(originals.dino, lambda: (pixels(24, 40),), alone(3, 16, (3, 5)), 1, "*"),
    "DINOv2": Case(originals.dinov2, lambda: (pixels(56, 56),), alone(3, 17, (4, 4)), 1, "*"),
    "DINOv2 registers": Case(
        partial(originals.dinov2, num_register_tokens=4), lambda: (pixels(56, 56),), alone(3, 21, (4, 4)), 5, "*"
    ),
    # The hub's models with registers interpolate their positions in this way.
    "DINOv2 registers wide": Case(
        partial(originals.dinov2, num_register_tokens=4, interpolate_antialias=True, interpolate_offset=0.0),
        lambda: (pixels(42, 70),),
        alone(3, 20, (3, 5)),
        5,
        "*",
    ),
    "DINOv2 chunks": Case(
        partial(originals.dinov2, num_register_tokens=4, block_chunks=3, ffn_layer="swiglufused"),
        lambda: (pixels(56, 56),),
        alone(3, 21, (4, 4)),
        5,
        "*",
    ),
    "ALBEF": Case(
        originals.albef,
        with_words(48),
        {
            "visual_encoder.*": squares(2, *ALBEF_IMAGE),
            "*.attention.self": squares(10, *ALBEF_TEXT),
            "*.crossattention.self": (4, ALBEF_TEXT, ALBEF_IMAGE),
        },
        prefix=1,
        chain="visual_encoder.*",
    ),
    "CrossViT": Case(
        originals.crossvit,
        lambda: (pixels(48, 48),),
        {
            "*.blocks.0.?.attn": squares(2, *BRANCHES[0]),
            "*.blocks.1.?.attn": squares(3, *BRANCHES[1]),
            "*.fusion.0.attn": (2, (*ONE, "patch_embed.0"), BRANCHES[1]),
            "*.fusion.1.attn": (2, (*ONE, "patch_embed.1"), BRANCHES[0]),
        },
        prefix=1,
    ),
    "Swin": Case(partial(originals.swin, 1), lambda: (pixels(32, 32),), windows([(16, 16), (8, 8)])),
    "Swin wide": Case(
        partial(originals.swin, 1, img_size=(16, 48)), lambda: (pixels(16, 48),), windows([(8, 24), (4, 12)])
    ),
    "Swin one window": Case(
        partial(originals.swin, 1, img_size=16), lambda: (pixels(16, 16),), windows([(8, 8), (4, 4)])
    ),
    "SwinV2": Case(partial(originals.swin, 2), lambda: (pixels(32, 32),), windows([(16, 16), (8, 8)])),
    "SwinV2 wide": Case(
        partial(originals.swin, 2, img_size=(16, 48), pretrained_window_sizes=(6, 3)),
        lambda: (pixels(16, 48),),
        windows([(8, 24), (4, 12)]),
    ),
    "LAVT": Case(
        originals.lavt,
        with_words(64, 60),
        {
            "bert_model.*": squares(2, *TEXT, "bert_model"),
            **windows(LAVT_GRIDS, "model.backbone.", "model.backbone"),
            **{
                f"*.layers.{i}.fusion.*": (
                    1,
                    ("queries", h * w, None, "model.backbone") if i else ("image", h * w, (h, w), "model.backbone"),
                    (*TEXT, "bert_model"),
                )
                for i, (h, w) in enumerate(LAVT_GRIDS)
            },
        },
    ),
}
ALL = pytest.mark.parametrize("name", CASES)
CHAINED = pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.chain])
SHIFTED = pytest.mark.parametrize("name", [name for name in CASES if name.startswith("Swin") or name == "LAVT"])
IMAGES_ONLY = pytest.mark.parametrize("name", [n for n, case in CASES.items() if case.images_only and "RN50" not in n])


def built(name: str) -> tuple[nn.Module, Callable[[], Any]]:
    model, inputs = CASES[name].make(), CASES[name].inputs()
    return model, lambda: model(*inputs)


def captured(model: nn.Module, call: Callable[[], Any], **options: Any) -> tuple[attnx.Trace, Any]:
    """The trace and the output of a pass, in which a warning is an error."""
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        # LAVT's own copy of BERT has no adapter.
        warnings.filterwarnings("ignore", message=".*so the model holds the weights")
        with attnx.capture(model, **options) as trace:
            output = call()
    return trace, output


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, as a part of the largest number."""
    assert got.shape == want.shape
    return float((got.double() - want.double()).abs().max() / want.abs().max())


def tensors(output: Any) -> list[Tensor]:
    return [output] if isinstance(output, Tensor) else list(output)


@ALL
def test_outputs_maps_and_the_model_itself(name: str) -> None:
    model, call = built(name)
    with torch.no_grad():
        plain = tensors(call())
        eager, _ = eager_attentions(model, call)
    before = state(model)
    trace, output = captured(model, call)
    assert_same_state(before, state(model))
    assert list(trace) == [attention.name for attention in eager]
    for got, want in zip(tensors(output), plain, strict=True):
        assert relative(got, want) <= CLOSE
    for attention in eager:
        want = attention.map().float()
        assert trace[attention.name].dtype == torch.float32
        torch.testing.assert_close(trace[attention.name], want, rtol=0, atol=CLOSE)
        assert attention.raw.std() > 1e-3 or attention.raw.shape[-1] == 1


@ALL
def test_gradient_maps(name: str) -> None:
    model, call = built(name)
    eager, output = eager_attentions(model, call)
    raw = [attention.raw for attention in eager]
    slopes = torch.autograd.grad(score_of(output), raw, allow_unused=True)
    with attnx.capture(model, grad=True) as trace:
        trace.backward(score_of(call()))
    assert list(trace) == [attention.name for attention in eager]
    for attention, slope in zip(eager, slopes, strict=True):
        assert slope is not None, attention.name
        want = attention.fused((slope * attention.raw.detach()).clamp(min=0))
        assert trace[attention.name].isfinite().all()
        assert relative(trace[attention.name], want) <= GRADIENTS_CLOSE, attention.name


@ALL
def test_sides_and_layouts(name: str) -> None:
    case = CASES[name]
    trace, _ = captured(*built(name))
    for pattern, (number, *expected) in case.sides.items():
        layers = [layer for layer in trace if fnmatchcase(layer, pattern)]
        assert len(layers) == number, pattern
        for layer in layers:
            sides = trace.sides(layer)
            assert [(t.kind, t.count, t.grid, t.part) for t in sides] == expected, layer
            if expected[1][0] == "image":
                assert trace.layout_of(layer) == attnx.TokenLayout(case.prefix, expected[1][2])
            else:
                with pytest.raises(
                    ValueError, match=r"expected maps over|does not declare its number of prefix tokens"
                ):
                    trace.layout_of(layer)
    assert sum(number for number, *_ in case.sides.values()) == len(trace)
    if len({expected[1] for _, *expected in case.sides.values()}) > 1:
        with pytest.raises(ValueError, match="layout: expected layers over the same tokens"):
            trace.layout  # noqa: B018


def dense_product(maps: list[Tensor]) -> Tensor:
    """The product of 0.5 P + 0.5 I over the layers, in float64."""
    product = torch.eye(maps[0].shape[-1], dtype=torch.float64)
    for p in maps:
        product = (0.5 * p.double() + 0.5 * torch.eye(p.shape[-1])) @ product
    return product


@CHAINED
def test_rollout_and_cls_map(name: str) -> None:
    case = CASES[name]
    model, call = built(name)
    own = {layer: maps[0] for layer, maps in eager_maps(model, call)[0].items() if fnmatchcase(layer, str(case.chain))}
    trace = captured(model, call)[0].select(str(case.chain))
    assert list(trace) == list(own)
    grid = trace.layout.grid
    product = dense_product(list(own.values()))
    want = product[:, 0, case.prefix :].unflatten(-1, grid)
    torch.testing.assert_close(attnx.rollout(trace).double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(attnx.rollout(trace, query="all").double(), product, rtol=0, atol=1e-6)
    for layer, p in own.items():
        want = p[:, 0, case.prefix :].unflatten(-1, grid).float()
        torch.testing.assert_close(attnx.cls_map(trace, layer=layer), want, rtol=0, atol=CLOSE)


def test_rollout_of_clips_causal_text() -> None:
    model, call = built("CLIP")
    maps = [maps[0] for layer, maps in eager_maps(model, call)[0].items() if layer.startswith("transformer.")]
    assert len(maps) == 2
    assert all(torch.equal(p, p.tril()) for p in maps)
    got = attnx.rollout(captured(model, call)[0], layers="transformer.*", query="all")
    torch.testing.assert_close(got.double(), dense_product(maps), rtol=0, atol=1e-6)


def test_clips_attention_pooling_with_a_given_layout() -> None:
    model, call = built("CLIP RN50")
    want = eager_maps(model, call)[0]["visual.attnpool"][0]
    layout = attnx.TokenLayout(prefix=1, grid=(2, 2))
    trace, _ = captured(model, call, layers="visual.*", layout=layout)
    torch.testing.assert_close(attnx.cls_map(trace), want[:, 0, 1:].unflatten(-1, (2, 2)), rtol=0, atol=CLOSE)


def window_map(block: nn.Module, maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """The map [B, N, N] of a grid in float64, from the maps [B * nW, K, K] of a block's windows."""
    n, size = grid[0] * grid[1], block.window_size
    index = F.pad(torch.arange(n).view(grid), (0, -grid[1] % size, 0, -grid[0] % size), value=-1)
    index = index.roll((-block.shift_size, -block.shift_size), (0, 1))
    at = index.unfold(0, size, size).unfold(1, size, size).reshape(-1, size * size)
    dense = torch.zeros(len(maps) // len(at), n, n, dtype=torch.float64)
    for i, p in enumerate(maps.double()):
        own = at[i % len(at)]
        real = own >= 0
        kept = p[real][:, real]
        dense[i // len(at), own[real][:, None], own[real]] = kept / kept.sum(-1, keepdim=True)
    return dense


def merging(grid: tuple[int, int]) -> Tensor:
    """[N', N] in float64: each merged patch takes equal parts of its patches."""
    h, w = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    y, x = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    matrix = F.one_hot((y // 2 * w + x // 2).flatten(), h * w).T.double()
    return matrix / matrix.sum(1, keepdim=True)


@SHIFTED
def test_rollout_through_windows(name: str) -> None:
    model, call = built(name)
    trace, _ = captured(model, call)
    product: Tensor | None = None
    grid = (0, 0)
    shifts = set()
    for layer, (p,) in eager_maps(model, call)[0].items():
        if trace.windows(layer) is None:
            continue
        merged, grid = (grid, trace.windows(layer).grid)
        if product is not None and merged != grid:
            product = merging(merged) @ product
        block = model.get_submodule(layer.removesuffix(".attn"))
        shifts.add(block.shift_size)
        step = 0.5 * window_map(block, p, grid) + 0.5 * torch.eye(grid[0] * grid[1])
        product = step if product is None else step @ product
    assert shifts == {0, 2}
    assert product is not None
    chosen = trace.select("model.backbone.layers.*.blocks.*" if name == "LAVT" else None)
    torch.testing.assert_close(attnx.rollout(chosen, query="all").double(), product, rtol=0, atol=2e-6)
    got = attnx.rollout(chosen)
    torch.testing.assert_close(got.flatten(1).double(), product.mean(1), rtol=0, atol=1e-7)
    torch.testing.assert_close(got.sum((1, 2)), torch.ones(2), rtol=0, atol=CLOSE)


@IMAGES_ONLY
def test_the_extractor_gives_the_same(name: str) -> None:
    case = CASES[name]
    model, call = built(name)
    trace, _ = captured(model, call)
    wanted = {"rollout": (attnx.rollout(trace), None)}
    if case.prefix:
        # CrossViT's last self-attention is not its last layer, so it has to be named.
        layer = next(layer for layer in reversed(list(trace)) if "fusion" not in layer)
        wanted["cls"] = attnx.cls_map(trace, layer=layer), layer if name == "CrossViT" else None
    (images,) = case.inputs()
    for method, (want, layers) in wanted.items():
        extract = attnx.Extractor(model, method=method, layers=layers)
        for _ in range(2):
            torch.testing.assert_close(extract(images), want, rtol=0, atol=1e-6)


def test_dinov2s_lists_of_images_need_xformers() -> None:
    model = originals.dinov2(num_register_tokens=4)
    before = state(model)
    images = [pixels(56, 56), pixels(28, 28)]
    with pytest.raises(AssertionError, match="xFormers is required"), attnx.capture(model):
        model.forward_features(images, [None, None])
    assert_same_state(before, state(model))


def test_dinos_own_probabilities_equal_the_maps() -> None:
    model, images = originals.dino(), pixels(32, 32)
    trace, _ = captured(model, lambda: model(images), heads="each")
    torch.testing.assert_close(trace[-1], model.get_last_selfattention(images), rtol=0, atol=CLOSE)
