"""CrossViT's cross-attention and plain attention, captured: the same outputs, gradients and probabilities.

    ATTNX_CROSSVIT=CrossViT pytest tests/test_crossvit_adapter.py

Without the checkout the test of IBM's class is skipped; the others are not.
"""

import pytest
import torch
from original_code import checkout
from own_softmax import check_capture, load, randomize
from torch import nn

from attnx.trace.adapters import crossvit, plain, route_to_sdpa

timm_crossvit = pytest.importorskip("timm.models.crossvit")

# The two branches have different widths and heads.
SIZES = {"embed_dim": (16, 24), "num_heads": (2, 3), "depth": ((1, 2, 0), (1, 1, 0)), "mlp_ratio": (2.0, 2.0, 1.0)}


class Attention(nn.Module):
    """Attention in the style of timm 0.4."""

    def __init__(self, dim=16, num_heads=2, attn_drop=0.0):
        super().__init__()
        self.num_heads, self.scale = num_heads, 0.3
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.attn_drop, self.proj_drop = nn.Dropout(attn_drop), nn.Dropout(0.0)

    def forward(self, x):
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q @ k.transpose(-2, -1)) * self.scale
        attn = self.attn_drop(attn.softmax(dim=-1))
        x = (attn @ v).transpose(1, 2).reshape(B, N, C)
        return self.proj_drop(self.proj(x))


PlainAttention = Attention


class Residual(PlainAttention):
    """The same names and one more operator."""

    def forward(self, x):
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v + v).transpose(1, 2).reshape(B, N, C)))


class EveryQuery(timm_crossvit.CrossAttention):
    """The same names, and a query for each token."""

    def forward(self, x):
        B, N, C = x.shape
        q = self.wq(x).reshape(B, N, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
        k = self.wk(x).reshape(B, N, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
        v = self.wv(x).reshape(B, N, self.num_heads, C // self.num_heads).permute(0, 2, 1, 3)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)))


Residual.__name__, EveryQuery.__name__ = "Attention", "CrossAttention"


def unfused(model):
    """The model, whose timm blocks compute their softmax themselves."""
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    return randomize(model)


def images():
    return torch.randn(2, 3, 48, 48, generator=torch.Generator().manual_seed(1))


def test_timm():
    model = timm_crossvit.CrossVit(
        img_size=48, img_scale=(1.0, 2 / 3), patch_size=(8, 16), num_classes=5, qkv_bias=True, **SIZES
    )
    check_capture(unfused(model), images(), blocks=len(attention_of(model)))


def attention_of(model):
    return [module for module in model.modules() if type(module).__name__ in ("Attention", "CrossAttention")]


def test_ibm():
    code = load(checkout("ATTNX_CROSSVIT", "IBM/CrossViT") / "models" / "crossvit.py", "original_crossvit")
    block = code.Block
    code.Block = lambda drop, **given: block(proj_drop=drop, **given)  # timm renamed the argument
    model = code.VisionTransformer(
        img_size=(48, 32), patch_size=(8, 16), num_classes=5, qkv_bias=True,
        embed_dim=SIZES["embed_dim"], num_heads=SIZES["num_heads"], depth=SIZES["depth"], mlp_ratio=SIZES["mlp_ratio"],
    )  # fmt: skip
    check_capture(unfused(model), images(), blocks=len(attention_of(model)))


@pytest.mark.parametrize(
    ("block", "adapter"),
    [(Attention(), plain), (timm_crossvit.CrossAttention(16, 2), crossvit)],
    ids=["plain", "cross"],
)
def test_one_block(block, adapter):
    check_capture(nn.Sequential(randomize(block)), torch.randn(3, 7, 16), blocks=1)
    assert len(route_to_sdpa(block)) == 1


@pytest.mark.parametrize(
    ("block", "adapter"),
    [(Attention(attn_drop=0.5), plain), (timm_crossvit.CrossAttention(16, 2, attn_drop=0.5), crossvit)],
    ids=["plain", "cross"],
)
def test_active_dropout_is_the_classes_own(block, adapter):
    x = torch.randn(3, 7, 16)
    torch.manual_seed(3)
    want = block.train()(x)
    assert len(route_to_sdpa(block)) == 1
    torch.manual_seed(3)
    assert torch.equal(block(x), want)


@pytest.mark.parametrize(
    ("block", "adapter"), [(Residual(), plain), (EveryQuery(16, 2), crossvit)], ids=["+", "queries"]
)
def test_similar_blocks_are_left(block, adapter):
    assert route_to_sdpa(block) == []
