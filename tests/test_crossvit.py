"""CrossViT: tokens of both branches, rollout over both, and one map from the maps of both.

    ATTNX_CROSSVIT=CrossViT pytest tests/test_crossvit.py

Without the checkout the tests of IBM's class are skipped; the others are not.
"""

import re

import pytest
import torch
from eager_reference import eager_attentions
from original_code import checkout
from own_softmax import load, randomize
from torch import nn

import attnx
from attnx.methods.branches import branch_rollout, branches_of, fuse_branches

pytestmark = pytest.mark.long

timm_crossvit = pytest.importorskip("timm.models.crossvit")

DEPTH = ((1, 2, 0), (1, 1, 0))
WIDTHS = {"embed_dim": (16, 24), "num_heads": (2, 3), "mlp_ratio": (2.0, 2.0, 1.0), "num_classes": 5}


def timm(depth=DEPTH, **options):
    options = {"img_size": 48, "patch_size": (8, 16), "depth": depth, **WIDTHS, **options}
    return randomize(timm_crossvit.CrossVit(**options))


def dagger():
    # Both branches have a grid of 4 x 4, from images of 48 and 64 pixels and several convolutions.
    return timm(multi_conv=True, patch_size=(12, 16), img_scale=(1.0, 64 / 48))


def ibm(depth=DEPTH, patch_size=(8, 16), **options):
    code = load(checkout("ATTNX_CROSSVIT", "IBM/CrossViT") / "models" / "crossvit.py", "original_crossvit")
    block = code.Block
    code.Block = lambda drop, **given: block(proj_drop=drop, **given)  # timm renamed the argument
    sizes = {"img_size": [48] * len(patch_size), "patch_size": patch_size, "depth": depth, "qkv_bias": True, **WIDTHS}
    return randomize(code.VisionTransformer(**(sizes | options)))


MODELS = {
    "timm": timm,
    "scaled": lambda: timm(img_scale=(1.0, 2 / 3)),
    "wide": lambda: timm(img_size=(32, 64)),
    "dagger": dagger,
    "same widths": lambda: timm(embed_dim=(16, 16), num_heads=(2, 2)),
    "fusion depth": lambda: timm(((1, 2, 2), (2, 1, 1))),
    "ibm": ibm,
    "ibm fusion depth": lambda: ibm(((1, 2, 2), (2, 1, 1))),
}
all_models = pytest.mark.parametrize("name", MODELS)


def images(model):
    size = getattr(model, "img_size", None)
    size = size if isinstance(size, tuple) else (48, 48)
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def captured(model, **options):
    with torch.no_grad(), attnx.capture(model, **options) as trace:
        model(images(model))
    return trace


def grids(model):
    """(rows, columns) of both branches, from the code's own declaration."""
    return [tuple(i // p for i, p in zip(e.img_size, e.patch_size, strict=True)) for e in model.patch_embed]


def softmaxes(model):
    """(branch, fusion block or None, softmax in float64) of each attention layer, in the order of the calls."""
    with torch.no_grad():
        attentions, _ = eager_attentions(model, lambda: model(images(model)))
    names = [n for n, m in model.named_modules() if type(m).__name__ in ("Attention", "CrossAttention")]
    found = [re.fullmatch(r"blocks\.\d+\.(blocks|fusion)\.(\d)\.?(\d*)\.attn", name) for name in names]
    assert len(attentions) == len(found)
    return [
        (int(f[2]), int(f[3] or 0) if f[1] == "fusion" else None, own.raw.double())
        for f, own in zip(found, attentions, strict=True)
    ]


def dense(model, residual, fuse=lambda p: p.mean(1)):
    """The mean of both class tokens' rows of the product of all layers' matrices over N_0 + N_1 tokens, in float64."""
    n = [1 + h * w for h, w in grids(model)]
    total, first, pending = sum(n), (0, n[0]), {}
    product = torch.eye(total, dtype=torch.float64).expand(2, -1, -1)
    for branch, block, heads in softmaxes(model):
        own = slice(first[branch], first[branch] + n[branch])
        matrix = torch.eye(total, dtype=torch.float64).repeat(2, 1, 1)
        if block is None:
            matrix[:, own, own] = residual * matrix[:, own, own] + (1 - residual) * fuse(heads)
        elif block == 0:
            # Columns of the keys: the class token of this branch, and the patches of the other.
            start = first[1 - branch]
            keys = [first[branch], *range(start + 1, start + n[1 - branch])]
            matrix[:, first[branch], first[branch]] = residual
            matrix[:, first[branch], keys] += (1 - residual) * fuse(heads)[:, 0]
            pending[branch] = matrix[:, first[branch]]
            if len(pending) == 1:
                continue
            matrix = torch.eye(total, dtype=torch.float64).repeat(2, 1, 1)
            for b, row in pending.items():
                matrix[:, first[b]] = row
            pending = {}
        else:
            assert torch.equal(heads, torch.ones_like(heads))
            continue
        product = matrix / matrix.sum(-1, keepdim=True) @ product
    return product[:, list(first)].mean(1).split(n, 1)


@all_models
@pytest.mark.parametrize("residual", [0.5, 0.2])
def test_rollout_is_the_dense_product(name, residual):
    model = MODELS[name]()
    want = dense(model, residual)
    got = branch_rollout(captured(model), residual)
    for own, row, grid in zip(got, want, grids(model), strict=True):
        assert own.dtype == torch.float32
        assert own.shape == (2, *grid)
        torch.testing.assert_close(own.double().flatten(1), row[:, 1:], rtol=0, atol=1e-6)
    mass = sum(own.double().sum((1, 2)) for own in got) + sum(row[:, 0] for row in want)
    torch.testing.assert_close(mass, torch.ones(2, dtype=torch.float64), rtol=0, atol=1e-6)


@all_models
def test_sides_and_cls_map(name):
    model = MODELS[name]()
    trace = captured(model)
    for layer, (branch, block, heads) in zip(trace, softmaxes(model), strict=True):
        queries, keys = trace.sides(layer)
        assert keys.count == heads.shape[-1]
        if block:
            assert (queries.count, keys.grid) == (1, None)
            continue
        grid = grids(model)[branch if block is None else 1 - branch]
        assert trace.layout_of(layer) == attnx.TokenLayout(1, grid, True)
        assert queries == keys if block is None else queries.count == 1
        want = heads.mean(1)[:, 0, 1:].float().unflatten(1, grid)
        torch.testing.assert_close(attnx.cls_map(trace, layer=layer), want)


def test_branches_with_the_same_grid_are_told_apart():
    trace = captured(dagger())
    first, second = (trace.sides(f"blocks.0.blocks.{b}.0.attn")[1] for b in (0, 1))
    assert first.grid == second.grid == (4, 4)
    assert first != second


@pytest.mark.parametrize("heads", ["mean", "max"])
def test_records_and_heads_agree(heads):
    model = timm()
    want = branch_rollout(captured(model, heads=heads))
    dense_maps = dense(model, 0.5, lambda p: p.mean(1) if heads == "mean" else p.amax(1))
    for trace in (captured(model, heads=heads, keep="qk"), captured(model, heads="each")):
        got = branch_rollout(trace, heads=heads)
        for own, other, row in zip(got, want, dense_maps, strict=True):
            torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
            torch.testing.assert_close(own.double().flatten(1), row[:, 1:], rtol=0, atol=1e-6)


def test_qk_makes_no_square_map(monkeypatch):
    trace = captured(timm(), keep="qk")
    kind = type(trace.kept(0))

    def refuse(self):
        raise AssertionError("a map was computed")

    monkeypatch.setattr(kind, "map", refuse)
    branch_rollout(trace)


def test_timm_and_ibm_agree():
    theirs, ours = ibm(), timm()
    weights = {re.sub(r"^(pos_embed|cls_token)\.", r"\1_", name): p for name, p in theirs.state_dict().items()}
    ours.load_state_dict(weights)
    for a, b in zip(branch_rollout(captured(theirs)), branch_rollout(captured(ours)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


def test_inside_another_model():
    model = timm()
    inner = captured(model)
    outer = captured(nn.Sequential(model))
    for a, b in zip(branch_rollout(inner), branch_rollout(outer), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("blocks.*.blocks.*", r"blocks.0.fusion.0.attn, .* missing; choose whole blocks, such as layers='blocks\.\*'"),
        ("blocks.*.fusion.*", "blocks.0.blocks.0.0.attn, .* missing"),
        ("blocks.*.*.1.*", "blocks.0.blocks.0.0.attn, .* missing"),
        (["blocks.0.blocks.*", "blocks.0.fusion.0", "blocks.1"], "blocks.0.fusion.1.attn missing"),
        (["blocks.0.blocks.*.0.*", "blocks.0.fusion"], "blocks.0.blocks.1.1.attn missing"),
    ],
)
def test_missing_layers_are_refused(layers, message):
    model = timm()
    for trace in (captured(model, layers=layers), captured(model).select(layers)):
        with pytest.raises(ValueError, match=message):
            branch_rollout(trace)


def test_whole_blocks_can_be_chosen():
    model = timm()
    trace = captured(model)
    last = branch_rollout(trace, layers="blocks.1")
    alone = branch_rollout(captured(model, layers="blocks.1"))
    for a, b in zip(last, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    assert not torch.allclose(last[0], branch_rollout(trace)[0])


def test_refusals():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = timm()

        def forward(self, x):
            return self.model(x) + self.model(x)

    with pytest.raises(ValueError, match="rows=None"):
        branch_rollout(captured(timm(), rows=[0]))
    with pytest.raises(ValueError, match="layout: expected None"):
        branch_rollout(captured(timm(), layout=attnx.TokenLayout(1, (6, 6))))
    with pytest.raises(ValueError, match=r"expected every attention layer .* once.*attn#2"):
        branch_rollout(captured(Twice()))
    with pytest.raises(ValueError, match=r"residual: .*1\.5"):
        branch_rollout(captured(timm()), 1.5)
    with pytest.raises(ValueError, match="'each'"):
        branch_rollout(captured(timm()), heads="each")


def test_other_models_have_no_branches():
    import timm as library

    vit = library.create_model("vit_tiny_patch16_224", img_size=32, depth=1)
    with torch.no_grad(), attnx.capture(vit) as trace:
        vit(torch.zeros(1, 3, 32, 32))
    assert branches_of(trace) is None
    with pytest.raises(ValueError, match=r"expected the layers of a CrossViT; got blocks\.0\.attn"):
        branch_rollout(trace)


def test_three_branches_are_refused():
    three = ibm(
        ((1, 1, 1, 0),), (8, 12, 16), embed_dim=(16, 24, 16), num_heads=(2, 3, 2), mlp_ratio=(2.0, 2.0, 2.0, 1.0)
    )
    with pytest.raises(NotImplementedError, match="expected 2 branches; got 3"):
        branch_rollout(captured(three))


@pytest.mark.parametrize("shapes", [((6, 4), (3, 5)), ((5, 5), (5, 5)), ((2, 7), (3, 1))])
@pytest.mark.parametrize("grid", [None, (4, 3), (7, 9)])
def test_fused_maps_are_sums_over_pixels(shapes, grid):
    maps = [torch.rand(2, *shape) for shape in shapes]
    got = fuse_branches(maps, grid)
    h, w = grid or tuple(map(max, *shapes))
    # An image in which every patch and every cell is a whole number of pixels.
    height, width = (h * shapes[0][0] * shapes[1][0], w * shapes[0][1] * shapes[1][1])
    pixels = torch.zeros(2, height, width, dtype=torch.float64)
    for amap, (rows, columns) in zip(maps, shapes, strict=True):
        tall, wide = height // rows, width // columns
        density = amap.double() / (tall * wide)
        pixels += density.repeat_interleave(tall, 1).repeat_interleave(wide, 2)
    want = pixels.unflatten(2, (w, -1)).sum(-1).unflatten(1, (h, -1)).sum(2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=1e-6)
    torch.testing.assert_close(got.double().sum(), sum(amap.double().sum() for amap in maps), rtol=1e-6, atol=0)


def test_maps_that_do_not_fuse_are_refused():
    for maps in ([], [torch.rand(3, 3)], [torch.rand(1, 3, 3), torch.rand(2, 3, 3)]):
        with pytest.raises(ValueError, match=r"maps: expected \[B, h, w\]"):
            fuse_branches(maps)
    with pytest.raises(ValueError, match=r"grid: .*\(0, 3\)"):
        fuse_branches([torch.rand(1, 3, 3)], (0, 3))
