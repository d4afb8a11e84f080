"""The gradient-weighted map, against autograd through an eager softmax in float64."""

import pytest
import torch
import torch.nn.functional as F

import attnx
from attnx.testing import TABLE, Case, assert_gradient_map, random_gradient, random_inputs
from on_backends import takes

CASES = (
    *TABLE,
    Case(M=1200, N=1100, B=1, H=2),
    Case(M=1200, N=1100, B=1, H=2, heads="max", bias="1HMN", is_causal=True),
)


@pytest.mark.parametrize("clamp", [True, False])
@pytest.mark.parametrize(
    ("case", "backend"),
    [(case, name) for case in CASES for name in ("eager", "native") if takes(name, case)],
    ids=str,
)
def test_is_autograds(case, backend, clamp, poisoned):
    q, k, v, bias = random_inputs(case)
    grad = random_gradient(case)
    call = dict(case.options, bias=bias, clamp=clamp)
    ours = attnx.gradient_map(grad, q, k, v, **call, backend=backend)
    assert_gradient_map(ours, grad, q, k, v, **call)
    lse = attnx.attention_lse(q, k, v, bias=bias, is_causal=case.is_causal, scale=case.scale)[1]
    again = attnx.gradient_map(grad, q, k, v, **call, lse=lse, backend=backend)
    assert_gradient_map(again, grad, q, k, v, **call)


def test_the_clamp_comes_before_the_heads_are_fused():
    # The products of the two heads cancel without the clamp. With it, only the positive one remains.
    q = torch.zeros(1, 2, 1, 4)
    v = torch.ones(1, 2, 1, 4)
    grad = torch.tensor([1.0, -1.0]).view(1, 2, 1, 1).expand(1, 2, 1, 4).contiguous()
    assert attnx.gradient_map(grad, q, q, v).item() == 2.0
    assert attnx.gradient_map(grad, q, q, v, clamp=False).item() == 0.0


def test_auto_takes_native_and_eager_what_it_cannot(device):
    for dtype, name in ((torch.float32, "native"), (torch.float16, "eager"), (torch.float64, "eager")):
        case = Case(dtype=dtype)
        inputs, grad = random_inputs(case)[:3], random_gradient(case)
        named = attnx.gradient_map(grad, *inputs, backend=name)
        assert torch.equal(attnx.gradient_map(grad, *inputs), named)


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("bad", ["grad", "v"])
def test_what_is_not_finite_is_seen(bad, backend):
    """As in autograd, a NaN in `grad` makes its row NaN, and a NaN in `v` makes its key NaN, even if masked."""
    case = Case(is_causal=True)
    q, k, v, _ = random_inputs(case)
    grad = random_gradient(case)
    {"grad": grad, "v": v}[bad][1, 2, 5, 3] = torch.nan
    ours = attnx.gradient_map(grad, q, k, v, is_causal=True, backend=backend)
    assert_gradient_map(ours, grad, q, k, v, is_causal=True)
    assert ours.isnan().any()


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
    case = Case(bias="B1MN")
    arguments = (random_gradient(case), *random_inputs(case), False, 0.25, 0.0, "mean", True, None, None, "auto")
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
        from attnx.ops.backends import eager
        from attnx.ops.reducers import Reduction
        from attnx.ops.scores import Scores

        eager.gradient_map(Scores(q, q, None, False, 0.125), q, q, Reduction.MEAN, True, None, None)
    assert largest <= 5 << 20  # a block of weights is 4 MB; of all heads 24 MB


def test_autocast_decides_the_dtype():
    q = torch.randn(1, 2, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = F.scaled_dot_product_attention(q, q, q)
        low = attnx.gradient_map(torch.ones_like(out), q, q, q)
    half = q.bfloat16()
    assert torch.equal(low, attnx.gradient_map(torch.ones_like(half), half, half, half))
