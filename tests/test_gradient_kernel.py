"""Triton's gradient-weighted map, on the GPU or in the interpreter, against autograd in float64."""

import pytest
import torch

import attnx
from attnx.testing import Case, assert_gradient_map, random_gradient, random_inputs

_FP16, _BF16 = torch.float16, torch.bfloat16
CASES = (
    *(Case(heads=heads) for heads in ("mean", "max", "min")),
    *(Case(heads=heads, M=24, N=300, dtype=_BF16) for heads in ("mean", "max", "each")),
    # head dims of the two products, and what is left of them
    *(Case(D=D, Dv=Dv, dtype=dtype) for D, Dv, dtype in ((64, 24, _BF16), (72, 16, torch.float32), (48, 80, _FP16))),
    Case(H=2, N=300, D=16, Dv=80),
    Case(B=1, H=2, D=300, Dv=520, bias="1HMN", dtype=_FP16),
    Case(B=1, H=2, D=64, Dv=272),
    Case(bias="1HMN", is_causal=True, H=4, Hk=2),
    Case(bias="B11N", N=300, dtype=_FP16),
    *(Case(mask=shape, dtype=_FP16) for shape in ("B1MN", "BHMN")),
    Case(mask="BHMN", N=300, heads="max"),
    *(Case(is_causal=True, M=M, N=N) for M, N in ((20, 50), (50, 20))),
    Case(M=1, N=300),
    Case(N=1),
    *(Case(layout=layout) for layout in ("packed", "strided", "expanded")),
    *(Case(rows=rows, N=300) for rows in ((19, 3, 3, 0), ())),
    Case(rows=(19, 1, 0), N=300, bias="BHMN", H=4, Hk=2, layout="strided"),
    Case(scale=-0.5, heads="max"),
)


def clamped_or_not(i, case):
    """A case with and without clamping; those of many keys take seconds in the interpreter."""
    many = case.N >= 300
    clamped = pytest.param(case, True, id=f"{case}-True", marks=[pytest.mark.long] if many and i % 3 else [])
    return clamped, pytest.param(case, False, id=f"{case}-False", marks=[pytest.mark.slow] if many else [])


@pytest.mark.triton_kernels
@pytest.mark.parametrize(("case", "clamp"), [each for i, case in enumerate(CASES) for each in clamped_or_not(i, case)])
def test_triton_gives_autograds(case, clamp, device, poisoned):
    q, k, v, bias = random_inputs(case, device=device)
    grad = random_gradient(case, device=device)
    call = dict(case.options, bias=bias, clamp=clamp)
    ours = attnx.gradient_map(grad, q, k, v, **call, backend="triton")
    assert_gradient_map(ours, grad, q, k, v, **call)
    assert torch.equal(ours, attnx.gradient_map(grad, q, k, v, **call, backend="triton"))
    if clamp:
        lse = attnx.attention_lse(q, k, v, bias=bias, is_causal=case.is_causal, scale=case.scale, backend="eager")[1]
        given = attnx.gradient_map(grad, q, k, v, **call, lse=lse, backend="triton")
        assert_gradient_map(given, grad, q, k, v, **call)


@pytest.mark.triton_kernels
def test_triton_sees_what_is_not_finite(device):
    case = Case(N=300)
    q, k, v, _ = random_inputs(case, device=device)
    grad = random_gradient(case, device=device)
    grad[1, 2, 5, 3] = torch.nan
    for clamp in (True, False):
        ours = attnx.gradient_map(grad, q, k, v, clamp=clamp, backend="triton")
        assert_gradient_map(ours, grad, q, k, v, clamp=clamp)
