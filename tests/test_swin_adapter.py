"""Window attention that computes its own softmax, captured: the same outputs, gradients and probabilities.

    ATTNX_SWIN=Swin-Transformer ATTNX_LAVT=LAVT-RIS pytest tests/test_swin_adapter.py

Without these checkouts the tests of their classes are skipped; timm's, torchvision's and transformers' are not.
"""

from functools import partial

import pytest
import torch
from original_code import checkout
from own_softmax import check_capture, load, randomize
from torch import nn

from attnx.trace.adapters import route_to_sdpa

pytestmark = pytest.mark.long

timm_v2 = pytest.importorskip("timm.models.swin_transformer_v2")
timm_cr = pytest.importorskip("timm.models.swin_transformer_v2_cr")

SIZES = {"window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 5}


def images(size=32, batch=3):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", ["swin_transformer", "swin_transformer_v2"])
def test_microsoft(name, batch):
    code = load(checkout("ATTNX_SWIN", "microsoft/Swin-Transformer") / "models" / f"{name}.py", f"original_{name}")
    kind = code.SwinTransformer if name == "swin_transformer" else code.SwinTransformerV2
    model = randomize(kind(img_size=32, patch_size=2, **SIZES))
    # Version 2 rounds log 100 to float32, also in float64.
    check_capture(model, images(batch=batch), blocks=4, exact_to=1e-10 if name == "swin_transformer" else 1e-6)


def test_microsofts_version_2_without_bias():
    code = load(checkout("ATTNX_SWIN", "microsoft/Swin-Transformer") / "models" / "swin_transformer_v2.py", "no_bias")
    model = code.SwinTransformerV2(img_size=32, patch_size=2, qkv_bias=False, **SIZES)
    check_capture(randomize(model), images(), blocks=4, exact_to=1e-6)


def test_lavts_copy():
    path = checkout("ATTNX_LAVT", "yz93/LAVT-RIS") / "lib" / "backbone.py"
    code = load(path, "original_lavt", drop=("mmcv_custom", "mmseg"))
    attention = randomize(code.WindowAttention(16, (4, 4), 2))
    x = torch.randn(8, 16, 16)
    mask = torch.zeros(4, 16, 16).masked_fill(torch.rand(4, 16, 16) < 0.3, -100.0)
    check_capture(Outer(attention), x, mask, blocks=1)
    check_capture(Outer(attention), x, blocks=1)


class Outer(nn.Module):
    def __init__(self, attn):
        super().__init__()
        self.attn = attn

    def forward(self, *inputs):
        return self.attn(*inputs)


@pytest.mark.parametrize("separate", [False, True])
def test_timms_version_2(separate):
    model = randomize(timm_v2.SwinTransformerV2(img_size=32, patch_size=2, **SIZES))
    for module in model.modules():
        if isinstance(module, timm_v2.WindowAttention):
            module.qkv_bias_separate = separate
    check_capture(model, images(), blocks=4)


def test_timms_version_2_cr():
    check_capture(randomize(timm_cr.SwinTransformerV2Cr(img_size=32, patch_size=2, **SIZES)), images(), blocks=4)


def torchvision_swin(version, window, size=2):
    code = pytest.importorskip("torchvision.models.swin_transformer")
    parts = {"block": code.SwinTransformerBlockV2, "downsample_layer": code.PatchMergingV2} if version == 2 else {}
    return randomize(code.SwinTransformer([size] * 2, 16, [2, 2], [2, 4], list(window), num_classes=5, **parts))


@pytest.mark.parametrize("shape", [(32, 32), (30, 42), (16, 32), (8, 34)], ids=str)
@pytest.mark.parametrize("version", [1, 2])
def test_torchvision(version, shape):
    """Also padded grids, and grids of one window in one or both directions, which are not shifted."""
    model = torchvision_swin(version, (4, 5) if shape == (30, 42) else (8, 4))
    x = torch.randn(2, 3, *shape)
    check_capture(model, x, blocks=4)


@pytest.mark.parametrize("size", [32, 40])
def test_transformers_version_2(size):
    transformers = pytest.importorskip("transformers")
    config = transformers.Swinv2Config(
        image_size=size,
        patch_size=2,
        embed_dim=16,
        depths=[2, 2],
        num_heads=[2, 4],
        window_size=4,
        hidden_dropout_prob=0.0,
    )
    model = randomize(transformers.Swinv2Model(config))
    check_capture(model, images(size), blocks=4)


def test_transformers_returns_its_own_probabilities():
    transformers = pytest.importorskip("transformers")
    config = transformers.Swinv2Config(
        image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4
    )
    model = randomize(transformers.Swinv2Model(config))
    with torch.no_grad():
        want = model(images(), output_attentions=True)
        undo = route_to_sdpa(model)
        got = model(images(), output_attentions=True)
    assert len(undo) == 4
    assert all(torch.equal(a, b) for a, b in zip(got.attentions, want.attentions, strict=True))
    for each in undo:
        each()


def bound(model):
    undo = route_to_sdpa(model)
    for each in undo:
        each()
    return len(undo)


def test_active_dropout_is_the_classes_own():
    block = randomize(timm_v2.WindowAttention(16, (4, 4), 2, attn_drop=0.5)).train()
    x = torch.randn(2, 16, 16)
    torch.manual_seed(3)
    want = block(x)
    undo = route_to_sdpa(block)
    torch.manual_seed(3)
    assert torch.equal(block(x), want)
    assert len(undo) == 1


class WindowAttention(timm_v2.WindowAttention):
    """A block with one more factor than the known one."""

    def forward(self, x, mask=None):
        return 2 * super().forward(x, mask)


def test_unknown_blocks_are_left():
    assert bound(WindowAttention(16, (4, 4), 2)) == 0
    known = timm_v2.WindowAttention(16, (4, 4), 2)
    assert bound(known) == 1
    known.forward = partial(timm_v2.WindowAttention.forward, known)
    assert bound(known) == 0


def test_another_softmax_is_the_classes_own():
    block = randomize(timm_v2.WindowAttention(16, (4, 4), 2))
    block.softmax = nn.Softmax(dim=-2)
    x = torch.randn(2, 16, 16)
    want = block(x)
    undo = route_to_sdpa(block)
    assert len(undo) == 1
    assert torch.equal(block(x), want)
