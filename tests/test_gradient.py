"""Gradients of the op's output equal SDPA's. The map has no gradient."""

import pytest
import torch

import attnx
from attnx.testing import Case, assert_within_budget, random_inputs, score_size, torch_reference

CASES = (
    Case(),
    Case(dtype=torch.bfloat16),
    Case(M=40, N=300, D=24, Dv=40),
    Case(is_causal=True, M=20, N=30),
    Case(is_causal=True, M=30, N=20, scale=-0.7, heads="each"),
    Case(H=4, Hk=2, rows=(3, 19), heads="max"),
    Case(H=6, Hk=1, mask="BHMN"),
    Case(mask="B11N", dtype=torch.float16),
    Case(mask="MN", is_causal=True, layout="packed"),
    *(Case(bias=shape) for shape in ("111N", "B11N", "1HMN", "B1MN", "BHMN", "MN")),
    Case(bias="1HMN", is_causal=True, H=4, Hk=2, rows=(0, 0, 5), layout="strided"),
    Case(bias="B1MN", dtype=torch.bfloat16, layout="expanded"),
    # more rows than one block of weights
    Case(B=1, H=2, M=1200, N=1100, bias="1HMN"),
    Case(B=1, H=2, M=1200, N=1100, Hk=1, bias="111N", is_causal=True),
)


def gradients(call, inputs, dtype):
    """Gradients of q, k, v and a float bias, for one fixed gradient of the output."""
    leaves = [t.detach().to(dtype).requires_grad_() if t is not None and t.is_floating_point() else t for t in inputs]
    out = call(*leaves)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = [t for t in leaves if t is not None and t.requires_grad]
    return torch.autograd.grad(out, wanted, weight.to(inputs.q.dtype).to(out))


def check(case, backend, inputs, dtype, op=attnx.attention):
    def sdpa(q, k, v, bias):
        return torch_reference(q, k, v, bias, case.is_causal, case.scale)[0]

    def ours(q, k, v, bias):
        options = case.options
        if op is attnx.attention_lse:
            options = {name: options[name] for name in ("is_causal", "scale")}
        out, other = op(q, k, v, bias=bias, backend=backend, **options)
        assert not other.requires_grad
        return out

    exact, reference = gradients(sdpa, inputs, torch.float64), gradients(sdpa, inputs, dtype)
    exponent = score_size(inputs.q, inputs.k, inputs.bias, case.is_causal, case.scale)  # the weights are recomputed
    for name, t, wanted, torchs in zip("qkvb", gradients(ours, inputs, dtype), exact, reference, strict=False):
        assert t.dtype == dtype
        if dtype == torch.float64:
            torch.testing.assert_close(t, wanted, rtol=1e-10, atol=1e-12)
        else:
            assert_within_budget(t, wanted, torchs, f"gradient of {name}", exponent)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_is_sdpas(case, device):
    inputs = random_inputs(case, device=device)
    check(case, "eager", inputs, case.dtype)
    if case.dtype == torch.float32:
        check(case, "eager", inputs, torch.float64)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient_beside_the_lse_is_sdpas(case, device):
    check(case, "eager", random_inputs(case, device=device), case.dtype, attnx.attention_lse)


@pytest.mark.triton_kernels
@pytest.mark.parametrize("case", [CASES[i] for i in (1, 2, 6, 8, -4, -3)], ids=str)
def test_gradient_after_the_triton_forward(case, device):
    check(case, "triton", random_inputs(case, device=device), case.dtype)
    check(case, "triton", random_inputs(case, device=device), case.dtype, attnx.attention_lse)


@pytest.mark.parametrize(
    "case",
    [
        Case(M=4, N=5, D=3, Dv=2, H=4, Hk=2, is_causal=True),
        Case(M=4, N=5, D=3, H=2, mask="B1MN"),
        Case(M=4, N=5, D=3, H=2, bias="1HMN"),
        Case(M=4, N=5, D=3, H=2, bias="B11N", rows=(1,), is_causal=True),
    ],
    ids=str,
)
def test_gradcheck(case, device):
    q, k, v, bias = random_inputs(case, device=device)
    leaves = [t.double().requires_grad_() for t in (q, k, v)]
    if case.bias:
        # Finite differences are not defined at minus infinity.
        leaves.append(bias.masked_fill(bias == -torch.inf, 0.0).double().requires_grad_())

    def out(q, k, v, added=None):
        return attnx.attention(q, k, v, bias=bias if added is None else added, **case.options)[0]

    assert torch.autograd.gradcheck(out, leaves)


def test_the_map_carries_no_gradient(device):
    q, k, v, bias = (t.requires_grad_() for t in random_inputs(Case(bias="1HMN"), device=device))
    out, amap = attnx.attention(q, k, v, bias=bias)
    assert out.requires_grad
    assert not amap.requires_grad
    assert not attnx.attention_map(q, k, bias=bias).requires_grad
    assert not attnx.attention_map(q, k, lse=out.sum(-1)).requires_grad
    with pytest.raises(RuntimeError, match="does not require grad"):
        amap.sum().backward()


def test_gradient_stops_where_none_is_wanted(device):
    q, k, v, bias = random_inputs(Case(bias="1HMN"), device=device)
    v.requires_grad_()
    attnx.attention(q, k, v, bias=bias)[0].sum().backward()
    assert v.grad is not None
    assert q.grad is k.grad is bias.grad is None
