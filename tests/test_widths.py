"""Head dims and value dims of many widths on a GPU. The compiled code depends on the width of a tile."""

import pytest
import torch

import attnx
from attnx.testing import Case, assert_attention, assert_gradient_map, random_gradient, random_inputs

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
