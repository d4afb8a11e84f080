"""Windows of real blocks against dense maps: one-hot images go through a block's own roll, pad and partition."""

import pytest
import timm
import torch
import transformers
from timm.models import mobilevit, nest, swin_transformer_v2_cr
from torch import nn
from torchvision.models import swin_transformer as vision
from windowed_blocks import CASES, dense_map, lavt_code, samvit, windowed_calls

from attnx.ops.reducers import Reduction
from attnx.trace.qk_record import QKRecord
from attnx.trace.records import MapRecord
from attnx.trace.window_readers import windows_of
from attnx.trace.window_record import PatchMerge, WindowRecord
from attnx.trace.windows import Windows, grid_index, merges, window_index

pytestmark = pytest.mark.long

PADDED = {
    "transformers donut", "transformers maskformer", "torchvision swin", "torchvision swinv2", "lavt", "davit",
    "samvit", "sam", "twins",
}  # fmt: skip


def largest_difference(a, b):
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", CASES)
def test_a_block_and_its_windows_have_the_same_map(name):
    torch.manual_seed(0)
    calls = windowed_calls(*CASES[name]())
    assert calls
    padded = False
    for block, args, kwargs in calls:
        grid = windows_of(block, args, kwargs).grid
        dense, parts = [], []
        for seed in (1, 2):
            whole, windows, maps = dense_map(block, args, kwargs, grid, seed)
            dense.append(whole / whole.sum(-1, keepdim=True))
            parts.append(maps)
        dense = torch.stack(dense)
        record = WindowRecord(MapRecord(torch.cat(parts), rows_sum_to_one=True), windows)
        padded |= windows.padded
        assert record.shape == dense.shape
        assert largest_difference(record.map(), dense) < 1e-12
        assert largest_difference(record.map().sum(-1), torch.ones(())) < 1e-12
        assert largest_difference(record.row_sums(), torch.ones(())) < 1e-12
        r = torch.randn(2, 3, windows.tokens, dtype=torch.float64)
        assert largest_difference(record.vecmat(r), r @ dense) < 1e-12
        for i in (0, windows.tokens // 2, -1):
            assert largest_difference(record.row(i), dense[:, i]) < 1e-12
    assert padded == (name in PADDED or "padded" in name)


def positions(height, width):
    return torch.arange(float(height * width)).view(1, 1, height, width)


class Kept(nn.Module):
    """Keeps its input and returns it."""

    def forward(self, x):
        self.seen = x
        return x


@pytest.mark.parametrize("level", [0, 1])
def test_blocks_of_nest_are_known(level):
    torch.manual_seed(0)
    model = nest.Nest(img_size=48, embed_dims=(16, 16), num_heads=(1, 1), depths=(1, 1), num_levels=2, num_classes=2)
    block = model.levels[level]
    x = torch.zeros(1, 16, *(2 * [12]))
    windows = windows_of(block, (x,), {})
    if level:
        block.pool = nn.Upsample(scale_factor=0.5, mode="nearest")
    with torch.no_grad():
        block.pos_embed.zero_()
    block.transformer_encoder = Kept()
    h, w = windows.grid
    block(positions(h, w).repeat_interleave(1 + level, 2).repeat_interleave(1 + level, 3))
    assert (h, w) == (12 >> level, 12 >> level)
    assert block.transformer_encoder.seen[0, ..., 0].tolist() == windows.index.tolist()


@pytest.mark.parametrize("size", [(8, 12), (7, 11)])
def test_windows_of_mobilevit_are_known(size):
    block = mobilevit.MobileVitBlock(
        4, 4, patch_size=4, group_size=1, transformer_dim=4, transformer_depth=1, num_heads=1, no_fusion=True
    )
    block.conv_kxk = block.conv_1x1 = block.norm = block.conv_proj = nn.Identity()
    block.transformer = Kept()
    windows = windows_of(block, (torch.zeros(1, 4, *size),), {})
    assert windows.grid == (8, 12)
    block(positions(8, 12))
    assert block.transformer.seen[..., 0].tolist() == windows.index.tolist()


def test_windows_of_transformers_mobilevit_are_known():
    config = transformers.MobileViTConfig(
        image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 8, 12, 16, 16, 20, 32], num_attention_heads=4
    )
    layer = transformers.MobileViTModel(config).encoder.layer[2]
    windows = windows_of(layer, (torch.zeros(1, 12, 16, 23),), {})
    assert windows.grid == (8, 12)
    assert layer.unfolding(positions(8, 12))[0][..., 0].tolist() == windows.index.tolist()


@pytest.mark.parametrize("shift", [0, 2])
def test_q_and_k_give_the_same_as_maps(shift):
    windows = Windows(window_index((9, 10), (4, 5), (shift, shift), False), (9, 10))
    q, k = torch.randn(2, 2 * windows.count, 3, windows.size, 8).unbind(0)
    scores = q @ k.transpose(-1, -2) / 8**0.5
    inner = QKRecord(q, k, scores.logsumexp(-1), None, False, None)
    record, each = WindowRecord(inner, windows), WindowRecord(MapRecord(scores.softmax(-1)), windows)
    held = each.fused(Reduction.MEAN)
    r = torch.rand(2, 4, 90)
    assert each.shape == (2, 3, 90, 90) == each.map().shape
    assert each.row(7).shape == (2, 3, 90)
    assert largest_difference(each.row(7), each.map()[:, :, 7]) < 1e-6
    assert largest_difference(record.vecmat(r), held.vecmat(r)) < 1e-6
    assert largest_difference(record.row(11), held.row(11)) < 1e-6
    assert largest_difference(record.map(), held.map()) < 1e-6
    assert largest_difference(record.row_sums(), held.row_sums()) < 1e-6


def test_without_renormalisation_the_weight_of_padding_is_lost():
    windows = Windows(window_index((3, 3), (2, 2), (0, 0), False), (3, 3))
    maps = torch.randn(4, 4, 4, dtype=torch.float64)
    record = WindowRecord(MapRecord(maps), windows, renormalise=False)
    whole = record.map()
    assert whole[0, 8, 8] == maps[3, 0, 0]
    assert torch.equal(whole[0, 2, [2, 5]], maps[1, 0, [0, 2]])
    r = torch.randn(1, 2, 9, dtype=torch.float64)
    assert largest_difference(record.vecmat(r), r @ whole) < 1e-12
    assert largest_difference(record.row_sums(), whole.sum(-1)) < 1e-12


def test_rows_keep_their_sum_when_padding_is_left_out():
    """The maximum over heads has rows of other sums than 1; a row without padding is as the model computed it."""
    windows = Windows(window_index((3, 3), (2, 2), (0, 0), False), (3, 3))
    maps = torch.rand(4, 4, 4, dtype=torch.float64)
    record = WindowRecord(MapRecord(maps), windows)
    whole = record.map()
    assert torch.equal(whole[0, 4, [0, 1, 3, 4]], maps[0, 3])
    assert whole[0, 8, 8] == maps[3, 0].sum()
    kept = maps[1, 0, [0, 2]]
    assert largest_difference(whole[0, 2, [2, 5]], kept * maps[1, 0].sum() / kept.sum()) < 1e-15
    r = torch.randn(1, 2, 9, dtype=torch.float64)
    assert largest_difference(record.vecmat(r), r @ whole) < 1e-12
    assert largest_difference(record.row_sums(), whole.sum(-1)) < 1e-12
    assert largest_difference(record.row(2), whole[:, 2]) < 1e-12


class Restoration(nn.Module):
    """A block with the names of SwinIR's: the grid is an argument, and `input_resolution` is that of training."""

    window_size, shift_size, input_resolution = 2, 1, (4, 6)

    def forward(self, x, x_size):
        return window_reverse(window_partition(x.roll(self.shift_size), self.window_size), self.window_size)


def window_partition(x, size):
    return x


window_reverse = window_partition


def test_the_grid_of_a_copy_of_swin_is_that_of_its_input():
    block = type("SwinTransformerBlock", (Restoration,), {})()
    assert windows_of(block, (torch.zeros(1, 24, 8), (2, 12)), {}).grid == (2, 12)
    assert windows_of(block, (torch.zeros(1, 24, 8),), {"x_size": (12, 2)}).grid == (12, 2)
    assert windows_of(block, (torch.zeros(1, 24, 8),), {}) is None


def test_gradients_flow_through_an_index_made_under_inference_mode():
    with torch.inference_mode():
        index = grid_index((6, 10), (3, 5))
    maps = torch.rand(4, 15, 15, requires_grad=True)
    WindowRecord(MapRecord(maps), Windows(index, (6, 10))).vecmat(torch.rand(1, 1, 60)).sum().backward()
    assert maps.grad.abs().sum() > 0


def test_errors_name_what_was_expected():
    windows = Windows(window_index((128, 256), (8, 8), (0, 0), False), (128, 256))
    with pytest.raises(ValueError, match=r"2\^28 elements"):
        WindowRecord(MapRecord(torch.zeros(512, 64, 64)), windows).map()
    with pytest.raises(ValueError, match="windows of 64 tokens"):
        WindowRecord(MapRecord(torch.zeros(512, 49, 49)), windows)
    with pytest.raises(ValueError, match="each of the 4 positions"):
        Windows(torch.tensor([[0, 1, 1, 2]]), (2, 2))
    with pytest.raises(IndexError, match="got 32768"):
        WindowRecord(MapRecord(torch.zeros(512, 64, 64)), windows).row(32768)
    with pytest.raises(ValueError, match="divisor of the grid"):
        grid_index((5, 4), (2, 2))
    with pytest.raises(ValueError, match="merged: expected"):
        PatchMerge((5, 4), (2, 2))


def test_blocks_without_windows_have_none():
    x = torch.rand(1, 4, 16)
    block = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=16, num_heads=2, depth=1).blocks[0]
    assert windows_of(block, (x,), {}) is None
    model, _ = samvit((64, 56))
    assert windows_of(model.blocks[1], (torch.rand(1, 8, 7, 32),), {}) is None
    assert windows_of(nn.Linear(2, 2), (), {}) is None


class SumOfFour(nn.Module):
    def forward(self, x):
        return x.unflatten(-1, (4, -1)).sum(-2)


MERGES = {
    "timm": (lambda: timm.models.swin_transformer.PatchMerging(8), "square"),
    "timm v2": (lambda: timm.models.swin_transformer_v2.PatchMerging(8), "square"),
    "timm v2 cr": (lambda: swin_transformer_v2_cr.PatchMerging(8), "square"),
    "torchvision": (lambda: vision.PatchMerging(8), "square"),
    "torchvision v2": (lambda: vision.PatchMergingV2(8), "square"),
    "transformers": (lambda: transformers.models.swin.modeling_swin.SwinPatchMerging(8), "pair"),
    "transformers v2": (lambda: transformers.models.swinv2.modeling_swinv2.Swinv2PatchMerging((5, 4), 8), "pair"),
    "lavt": (lambda: lavt_code().PatchMerging(8), "sizes"),
}


@pytest.mark.parametrize("grid", [(6, 4), (5, 4), (5, 7), (1, 1)])
@pytest.mark.parametrize("name", MERGES)
def test_merging_passes_equal_parts_to_the_patches(name, grid):
    make, form = MERGES[name]
    module, n = make(), grid[0] * grid[1]
    assert merges(module)
    module.norm, module.reduction = nn.Identity(), SumOfFour()
    eye = torch.eye(n, dtype=torch.float64).view(1, *grid, n)
    rest = {"square": (), "pair": (grid,), "sizes": grid}[form]
    whole = module(eye if form == "square" else eye.flatten(1, 2), *rest).reshape(-1, n)
    whole = whole / whole.sum(-1, keepdim=True)
    merged = (grid[0] + 1) // 2, (grid[1] + 1) // 2
    assert largest_difference(PatchMerge(grid, merged).vecmat(torch.eye(len(whole))[None].double()), whole) < 1e-12


def test_other_classes_of_that_name_do_not_merge():
    assert not merges(timm.models.fasternet.PatchMerging(8))
    assert not merges(nn.Linear(4, 2))
