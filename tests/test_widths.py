"""Head dims and value dims of many widths on a GPU. The compiled code depends on the width of a tile."""

import pytest
import torch

import attnx
from attnx.ops.attention_stats import attention_with_stats
from attnx.ops.statistics import NAMES
from attnx.testing import (
    Case,
    assert_attention,
    assert_gradient_map,
    assert_stats,
    oracle_gradient_map,
    random_gradient,
    random_inputs,
)
from on_backends import random_places

WIDTHS = (
    *((48, 16), (16, 48), (48, 48), (64, 16), (64, 32), (32, 64), (32, 16), (64, 64), (80, 48), (48, 80), (72, 72)),
    *((128, 64), (64, 128), (96, 96), (128, 128)),
)


@pytest.mark.gpu
@pytest.mark.parametrize(("D", "Dv"), WIDTHS)
def test_widths(D, Dv, device, poisoned):
    # With two key heads our own kernel is used: the vendor's attention does not support them.
    case = Case(B=1, H=4, Hk=2, M=150, N=300, D=D, Dv=Dv, dtype=torch.float16)
    q, k, v, _ = random_inputs(case, device=device)
    out, amap = attnx.attention(q, k, v, backend="triton")
    assert_attention(out, amap, q, k, v)
    out = attnx.attention(q[:, :, :20], k, v, backend="triton")[0]
    assert_attention(out, attnx.attention_map(q[:, :, :20], k, backend="triton"), q[:, :, :20], k, v)
    grad = random_gradient(case, device=device)
    assert_gradient_map(attnx.gradient_map(grad, q, k, v, backend="triton"), grad, q, k, v)
    places = random_places(case, device=device)
    for rows in (150, 16):
        at = (places[0][:, :rows].contiguous(), places[1])
        stats = attention_with_stats(
            q[:, :, :rows], k, None, heads=None, stats=NAMES, places=at, prefix=3, backend="triton"
        )
        assert_stats(stats[2], q[:, :, :rows], k, places=at, prefix=3)
        short = grad[:, :, :rows], q[:, :, :rows], k, v
        importance = attnx.row_importance(*short, backend="triton")
        weighted = oracle_gradient_map(*short, heads="each", clamp=False)
        torch.testing.assert_close(importance.double(), weighted.abs().sum(-1), rtol=1e-4, atol=1e-4)
