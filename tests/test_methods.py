"""Methods against their definitions, and against the arithmetic of the references, which is repeated here."""

import math
from collections.abc import Mapping

import pytest
import timm
import torch
from torch import Tensor

import attnx
from attnx import TokenLayout, Trace


def make_trace(
    maps: Mapping[str, Tensor], layout: TokenLayout, heads: str = "mean", rows: tuple | None = None
) -> Trace:
    trace = Trace(torch.nn.Identity(), heads, rows, layout)
    for name, amap in maps.items():
        trace.add(name, amap)
    return trace


def random_maps(layers: int = 4, batch: int = 3, heads: int = 3, n: int = 13, seed: int = 0) -> list[Tensor]:
    """Random maps [B, H, N, N] of each layer, with rows of different entropy."""
    g = torch.Generator().manual_seed(seed)
    return [(3 * torch.randn(batch, heads, n, n, generator=g)).softmax(-1) for _ in range(layers)]


LAYOUT = TokenLayout(1, (3, 4))
FUSE = {"mean": lambda a: a.mean(1), "max": lambda a: a.amax(1), "min": lambda a: a.amin(1)}


def fused_trace(maps: list[Tensor], heads: str = "mean", layout: TokenLayout = LAYOUT) -> Trace:
    return make_trace({f"l{i}": FUSE[heads](m) for i, m in enumerate(maps)}, layout, heads)


def abnar(fused: list[Tensor], residual: float = 0.5) -> Tensor:
    """The definition in float64: the product of row-normalised (1 - a) F + a I."""
    n = fused[0].shape[-1]
    product = torch.eye(n, dtype=torch.float64).expand(len(fused[0]), n, n)
    for f in fused:
        m = (1 - residual) * f.double() + residual * torch.eye(n, dtype=torch.float64)
        product = m / m.sum(-1, keepdim=True) @ product
    return product


def vit_explain(maps: list[Tensor], heads: str, discard: float) -> Tensor:
    """The reference's arithmetic for one image, its quirks included: columns divided by row sums, entry 0 spared."""
    n = maps[0].shape[-1]
    result = torch.eye(n)
    for attention in maps:
        fused = FUSE[heads](attention)[0].clone()
        order = fused.flatten().argsort()
        drop = order[: int(n * n * discard)]
        fused.view(-1)[drop[drop != 0]] = 0
        a = (fused + torch.eye(n)) / 2
        result = (a / a.sum(-1)[None, :]) @ result
    mask = result[0, 1:]
    return mask / mask.max()


@pytest.mark.parametrize("residual", [0.0, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("heads", FUSE)
def test_rollout_is_abnars(heads: str, residual: float) -> None:
    maps = random_maps()
    trace = fused_trace(maps, heads)
    want = abnar([FUSE[heads](m) for m in maps], residual)
    torch.testing.assert_close(attnx.rollout(trace, residual, query="all").double(), want, rtol=1e-5, atol=1e-7)
    ours = attnx.rollout(trace, residual)
    assert ours.shape == (3, 3, 4)
    torch.testing.assert_close(ours.flatten(1).double(), want[:, 0, 1:], rtol=1e-5, atol=1e-7)
    one = attnx.rollout(trace, residual, query=5)
    torch.testing.assert_close(one.flatten(1).double(), want[:, 5, 1:], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("discard", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("heads", FUSE)
def test_rollout_preset_vit_explain(heads: str, discard: float) -> None:
    maps = random_maps(batch=1)
    ours = attnx.rollout(fused_trace(maps, heads), discard=discard, preset="vit-explain")
    torch.testing.assert_close(ours.flatten(), vit_explain(maps, heads, discard), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"discard": 0.8}, {"discard": 0.8, "preset": "vit-explain"}, {"start": 2}])
def test_rollout_of_a_batch_is_that_of_each(options: dict) -> None:
    maps = random_maps()
    together = attnx.rollout(fused_trace(maps), **options)
    for b in range(3):
        alone = attnx.rollout(fused_trace([m[b : b + 1] for m in maps]), **options)
        torch.testing.assert_close(together[b : b + 1], alone)


def test_rollout_discards_each_items_smallest_entries() -> None:
    maps = random_maps(layers=1)
    fused = maps[0].mean(1)
    kept = fused.clone()
    for item in kept:
        threshold = item.flatten().kthvalue(int(13 * 13 * 0.5)).values
        first = item[0, 0].clone()
        item[item <= threshold] = 0
        item[0, 0] = first
    want = abnar([kept])
    ours = attnx.rollout(fused_trace(maps), discard=0.5, query="all")
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-7)
    assert torch.equal(fused, maps[0].mean(1))


def test_rollout_start_and_each() -> None:
    maps = random_maps()
    assert torch.equal(attnx.rollout(fused_trace(maps), start=1), attnx.rollout(fused_trace(maps[1:])))
    each = make_trace({f"l{i}": m for i, m in enumerate(maps)}, LAYOUT, "each")
    for heads in FUSE:
        torch.testing.assert_close(attnx.rollout(each, heads=heads), attnx.rollout(fused_trace(maps, heads)))


def test_rollout_without_class_token() -> None:
    maps = random_maps(n=12)
    layout = TokenLayout(0, (3, 4))
    want = abnar([m.mean(1) for m in maps])
    ours = attnx.rollout(fused_trace(maps, layout=layout))
    torch.testing.assert_close(ours.flatten(1).double(), want.mean(1), rtol=1e-5, atol=1e-7)
    # A final attention-pooling layer is how the model itself reads the patches.
    pool = torch.rand(3, 1, 12).softmax(-1)
    pooled = make_trace({**fused_trace(maps, layout=layout), "pool": pool}, layout)
    want = pool.double() @ want
    torch.testing.assert_close(attnx.rollout(pooled).flatten(1).double(), want[:, 0], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(attnx.cls_map(pooled).flatten(1), pool[:, 0])
    # Registers are neither followed nor counted.
    registers = fused_trace(random_maps(n=14), layout=TokenLayout(2, (3, 4), cls=False))
    assert attnx.rollout(registers).shape == (3, 3, 4)


def test_rollout_of_a_row_without_keys_is_finite() -> None:
    maps = [m.clone() for m in random_maps()]
    for m in maps:
        m[:, :, 3] = 0
    assert attnx.rollout(fused_trace(maps), residual=0.0).isfinite().all()


def test_rollout_errors() -> None:
    maps = random_maps()
    trace = fused_trace(maps)
    with pytest.raises(ValueError, match=r"expected residual in \[0, 1\] and discard in \[0, 1\); got 1.5"):
        attnx.rollout(trace, residual=1.5)
    with pytest.raises(ValueError, match=r"start: expected a layer index in 0..3; got 4"):
        attnx.rollout(trace, start=4)
    with pytest.raises(ValueError, match="preset: expected None or 'vit-explain'; got 'abnar'"):
        attnx.rollout(trace, preset="abnar")
    with pytest.raises(ValueError, match=r"query: expected 'all', 'mean' or an index in -13..12; got 13"):
        attnx.rollout(trace, query=13)
    with pytest.raises(ValueError, match=r"the capture fused them by 'mean'; got 'max'"):
        attnx.rollout(trace, heads="max")
    rows = make_trace({"l0": maps[0].mean(1)[:, :1]}, LAYOUT, rows=(0,))
    with pytest.raises(ValueError, match=r"expected a capture of whole maps, with rows=None; got rows=\[0\]"):
        attnx.rollout(rows)
    with pytest.raises(ValueError, match=r"expected maps of 13 x 13 tokens; got \[9, 9\] from text"):
        attnx.rollout(make_trace({**trace, "text": torch.rand(3, 9, 9)}, LAYOUT))


def test_cls_map_and_layer_maps() -> None:
    maps = random_maps()
    trace = fused_trace(maps)
    torch.testing.assert_close(attnx.cls_map(trace).flatten(1), maps[-1].mean(1)[:, 0, 1:])
    torch.testing.assert_close(attnx.cls_map(trace, "l1").flatten(1), maps[1].mean(1)[:, 0, 1:])
    each = make_trace({f"l{i}": m[:, :, [5, 0]] for i, m in enumerate(maps)}, LAYOUT, "each", (5, 0))
    torch.testing.assert_close(attnx.cls_map(each).flatten(2), maps[-1][:, :, 0, 1:])
    layers = attnx.layer_maps(each, heads="max")
    want = torch.stack([m.amax(1)[:, 0, 1:] for m in maps], 1).unflatten(-1, (3, 4))
    assert layers.names == ("l0", "l1", "l2", "l3")
    assert torch.equal(layers.maps, want)
    assert torch.equal(layers.max, want.amax(1))
    assert torch.equal(layers.min, want.amin(1))
    assert torch.equal(layers.mean, want.mean(1))
    with pytest.raises(ValueError, match=r"expected 0 among rows; got \[5\]"):
        attnx.cls_map(make_trace({"l0": maps[0].mean(1)[:, 5:6]}, LAYOUT, rows=(5,)))
    with pytest.raises(ValueError, match="the model has no class token"):
        attnx.cls_map(fused_trace(random_maps(n=12), layout=TokenLayout(0, (3, 4))))


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 1.0])
def test_mass_mask_is_dinos(keep: float) -> None:
    attentions = torch.rand(6, 35, generator=torch.Generator().manual_seed(0)) ** 3
    # DINO's own steps, one head at a time.
    values, order = torch.sort(attentions)
    values /= torch.sum(values, dim=1, keepdim=True)
    above = torch.cumsum(values, dim=1) > (1 - keep)
    back = torch.argsort(order)
    for head in range(6):
        above[head] = above[head][back[head]]
    assert torch.equal(attnx.mass_mask(attentions.view(6, 5, 7), keep), above.view(6, 5, 7))
    assert torch.equal(attnx.mass_mask(attentions.view(2, 3, 5, 7), keep), above.view(2, 3, 5, 7))


def test_entropy() -> None:
    maps = torch.stack([torch.ones(3, 4), torch.eye(4)[:3] * 7, torch.zeros(3, 4)])
    maps[2, 1, 1] = 0.2
    want = torch.tensor([math.log(12), math.log(3), 0.0])
    torch.testing.assert_close(attnx.entropy(maps), want)
    assert attnx.entropy(torch.zeros(3, 4)).isnan()
    levels = attnx.entropy_levels(torch.tensor([0.9, 0.1, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4]))
    assert levels.tolist() == [3, 0, 2, 1, 2, 0, 3, 1]


def test_pointing_game() -> None:
    maps = torch.zeros(2, 4, 4)
    maps[:, 1, 2] = 1  # peaks around row 12, column 20 of 32
    boxes = torch.tensor([[16, 8, 24, 16], [0, 0, 16, 32]])
    assert attnx.pointing_game(maps, boxes, (32, 32)).tolist() == [True, False]
    with pytest.raises(ValueError, match=r"expected maps \[B, h, w\] and boxes \[B, 4\]"):
        attnx.pointing_game(maps, boxes[:1], (32, 32))


def test_layout() -> None:
    layout = TokenLayout(2, (2, 3))
    assert (layout.tokens, layout.cls, TokenLayout(0, (1, 1)).cls) == (8, True, False)
    assert layout.patches(torch.arange(8)).tolist() == [[2, 3, 4], [5, 6, 7]]
    with pytest.raises(ValueError, match="expected 8 tokens"):
        layout.patches(torch.zeros(1, 9))
    with pytest.raises(ValueError, match="expected prefix and suffix >= 0"):
        TokenLayout(-1, (2, 2))
    with pytest.raises(ValueError, match="expected a prefix of at least 1 with cls=True"):
        TokenLayout(0, (2, 2), cls=True)


def test_layout_that_the_model_does_not_say() -> None:
    block = timm.layers.Attention(48, 3).eval()
    with torch.no_grad():
        with attnx.capture(block) as trace:
            block(torch.randn(1, 16, 48))
        with pytest.raises(ValueError, match=r"does not declare its number of prefix tokens; pass layout="):
            attnx.rollout(trace)
        with attnx.capture(block, layout=TokenLayout(0, (2, 8))) as trace:
            block(torch.randn(1, 16, 48))
        assert attnx.rollout(trace).shape == (1, 2, 8)
        with attnx.capture(block, layout=TokenLayout(1, (4, 4))) as trace:
            block(torch.randn(1, 16, 48))
        with pytest.raises(ValueError, match=r"expected maps of 17 x 17 tokens; got \[16, 16\]"):
            attnx.rollout(trace)


def test_layout_that_does_not_add_up() -> None:
    model = timm.create_model("vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, img_size=48).eval()
    model.num_prefix_tokens = 1
    with torch.no_grad(), attnx.capture(model) as trace:
        model(torch.randn(1, 3, 48, 48))
    model.num_prefix_tokens = 3
    with pytest.raises(ValueError, match=r"expected 3 \+ 3 \* 3 tokens; got maps of 10"):
        trace.layout  # noqa: B018


def test_the_query_was_called_rows() -> None:
    trace = fused_trace(random_maps(2))
    with pytest.warns(DeprecationWarning, match="rows of rollout, gradient_rollout and relevance is now query"):
        former = attnx.rollout(trace, rows="all")
    assert torch.equal(former, attnx.rollout(trace, query="all"))
    with pytest.raises(ValueError, match="expected query alone"):
        attnx.rollout(trace, query=0, rows=1)
