"""The gradient-weighted map, against autograd through an eager softmax in float64."""

import pytest
import torch
import torch.nn.functional as F

import attnx
from attnx.testing import TABLE, Case, assert_within_budget, oracle_gradient_map, random_inputs, score_size

CASES = (
    *TABLE,
    Case(M=1200, N=1100, B=1, H=2),
    Case(M=1200, N=1100, B=1, H=2, heads="max", bias="1HMN", is_causal=True),
)


def random_gradient(inputs):
    shape = (*inputs.q.shape[:3], inputs.v.shape[3])
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return noise.to(inputs.q)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_autograds(case, clamp):
    inputs = random_inputs(case)
    grad = random_gradient(inputs)
    call = dict(case.options, bias=inputs.bias, clamp=clamp)
    ours = attnx.gradient_map(grad, *inputs[:3], **call, backend="eager")
    exact = oracle_gradient_map(grad, *inputs[:3], **call)
    wide = torch.promote_types(case.dtype, torch.float32)
    torchs = oracle_gradient_map(grad, *inputs[:3], **call, dtype=wide)
    assert ours.dtype == torch.float32
    size = score_size(inputs.q, inputs.k, inputs.bias, case.is_causal, case.scale)
    assert_within_budget(ours, exact, torchs, "gradient map", size)
    assert not ours[exact == 0].any()
    if case.rows is None:
        lse = attnx.attention_lse(*inputs[:3], bias=inputs.bias, is_causal=case.is_causal, scale=case.scale)[1]
        again = attnx.gradient_map(grad, *inputs[:3], **call, lse=lse, backend="eager")
        assert_within_budget(again, exact, torchs, "gradient map from lse", size)


def test_the_clamp_comes_before_the_heads_are_fused():
    # Two heads whose products cancel: their clamped mean is what is left of one.
    q = torch.zeros(1, 2, 1, 4)
    v = torch.ones(1, 2, 1, 4)
    grad = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4).contiguous()
    assert attnx.gradient_map(grad, q, q, v).item() == 2.0
    assert attnx.gradient_map(grad, q, q, v, clamp=False).item() == 0.0


def test_auto_takes_it_on_cpus_and_native_says_that_it_cannot(device):
    inputs = random_inputs(Case(), device=device)
    grad = random_gradient(inputs)
    assert attnx.gradient_map(grad, *inputs[:3]).shape == (2, 20, 20)
    with pytest.raises(NotImplementedError, match=r"native.*no gradient_map"):
        attnx.gradient_map(*(t.cpu() for t in (grad, *inputs[:3])), backend="native")


def test_empty_inputs():
    q, k, v = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 0, 4), torch.ones(1, 2, 0, 5)
    assert attnx.gradient_map(torch.ones(1, 2, 3, 5), q, k, v).shape == (1, 3, 0)
    none = attnx.gradient_map(torch.ones(1, 2, 3, 0), q, q, torch.ones(1, 2, 3, 0))
    assert none.shape == (1, 3, 3)
    assert not none.any()


@pytest.mark.parametrize("wrong", ["shape", "dtype", "kind", "lse", "heads"])
def test_what_does_not_fit_is_said(wrong):
    q = torch.ones(1, 2, 3, 4)
    grad, options = torch.ones(1, 2, 3, 4), {}
    if wrong == "shape":
        grad, expected = torch.ones(1, 2, 3, 5), r"grad: expected torch.float32 \[1, 2, 3, 4\].*\[1, 2, 3, 5\]"
    elif wrong == "dtype":
        grad, expected = grad.double(), "grad: expected torch.float32.*torch.float64"
    elif wrong == "kind":
        grad, expected = None, "grad: expected.*None"
    elif wrong == "lse":
        options, expected = {"lse": torch.ones(1, 2)}, r"lse: expected float32 \[1, 2, 3\]"
    else:
        options, expected = {"heads": "median"}, "heads: expected one of mean"
    with pytest.raises(ValueError, match=expected):
        attnx.gradient_map(grad, q, q, q, **options)


def test_as_an_operator():
    inputs = random_inputs(Case(bias="B1MN"))
    arguments = (random_gradient(inputs), *inputs, False, 0.25, "mean", True, None, None, "auto")
    torch.library.opcheck(torch.ops.attnx.gradient_map, arguments)


def test_no_gradient_of_all_heads_is_made():
    """The peak stays far below one [B, H, M, N] tensor."""
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple) else (out,):
                if isinstance(t, torch.Tensor):
                    largest = max(largest, t.untyped_storage().nbytes())
            return out

    q = torch.randn(1, 12, 700, 64)
    with Watch():
        from attnx.backends import eager
        from attnx.reducers import Heads

        eager.gradient_map(q, q, q, q, None, False, 0.125, Heads.MEAN, True, None, None)
    assert largest <= 5 << 20  # a block of weights is 4 MB; of all heads 24 MB


def test_autocast_decides_the_dtype():
    q = torch.randn(1, 2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(q, q, q)
        low = attnx.gradient_map(torch.ones_like(out), q, q, q)
    half = q.bfloat16()
    assert torch.equal(low, attnx.gradient_map(torch.ones_like(half), half, half, half))
