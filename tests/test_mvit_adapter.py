"""timm's MViT v2 calls SDPA in a capture, and computes the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from families_timm import MVIT, sharpen
from own_maps import assert_captured, assert_restored, assert_same_gradients
from timm.models import mvitv2
from torch import Tensor, nn

import attnx
from attnx.trace.adapters import route_to_sdpa

pytestmark = pytest.mark.filterwarnings("error:attnx")
KINDS: dict[str, dict[str, Any]] = {
    "relative positions": {},
    "class token": {"use_cls_token": True},
    "no residual pooling": {"residual_pooling": False},
    "no relative positions": {"rel_pos_type": "none"},
    "max pooling": {"mode": "max", "use_cls_token": True},
    "no pooling": {"stride_q": ((1, 1),) * 4, "stride_kv": ((1, 1),) * 4, "kernel_qkv": (1, 1), "depths": (1, 1, 1, 1)},
}


def build(kind: str) -> tuple[nn.Module, Callable[[], Tensor]]:
    torch.manual_seed(0)
    model = sharpen(mvitv2.MultiScaleVit(replace(MVIT, **KINDS[kind]), img_size=32, num_classes=5))
    images = torch.randn(2, 3, 32, 32)
    return model, lambda: model(images)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_and_outputs_are_the_models_own(kind: str) -> None:
    model, call = build(kind)
    assert_captured(model, call, "MultiScaleAttention")


@pytest.mark.parametrize("kind", ["class token", "max pooling"])
def test_gradients_do_not_change(kind: str) -> None:
    model, call = build(kind)
    assert_same_gradients(model, call)
    assert any("rel_pos" in name and bool(p.grad.any()) for name, p in model.named_parameters() if p.grad is not None)


def test_the_size_of_the_grid_is_returned() -> None:
    model, _ = build("class token")
    block = model.stages[1].blocks[0].attn
    x = torch.randn(2, 65, block.qkv.in_features)
    with torch.no_grad():
        plain, size = block(x, [8, 8])
        with attnx.capture(block) as trace:
            ours, ours_size = block(x, [8, 8])
    assert list(ours_size) == list(size) == [4, 4]
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
    assert trace[""].shape == (2, 17, 17)


def test_autocast() -> None:
    model, call = build("class token")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        plain = call()
        with attnx.capture(model):
            ours = call()
    assert ours.dtype == plain.dtype
    torch.testing.assert_close(ours.float(), plain.float(), rtol=0.05, atol=0.05 * float(plain.abs().max()))


def test_pooling_first_is_left() -> None:
    block = mvitv2.MultiScaleAttentionPoolFirst(16, 16, (4, 4), num_heads=2)
    assert route_to_sdpa(block) == []
    assert_restored(block)
